"""Backup and restore of an instance, while writers go on."""

import asyncio
import json
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from deployments.access import api_keys
from deployments.journal.journal import Journal
from deployments.operations.backup import (
    ARTEFACTS,
    JOURNAL,
    MANIFEST,
    MLFLOW,
    BackupError,
    Sources,
    backup,
    restore,
)
from deployments.router.learner import Learner
from policies.events import Decision, Feedback, Outcome
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.support.postgres import Postgres
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"))


def make(url: str) -> Learner:
    return Learner(Journal(url), lambda: Thompson(ARMS))


class Writers(threading.Thread):
    """Appends decisions, outcomes and scores until it is stopped.

    Attributes:
        acknowledged: time of each acknowledgement, by decision.
    """

    def __init__(self, url: str):
        super().__init__()
        self.learner = make(url)
        self.acknowledged: dict[str, float] = {}
        self.stopped = threading.Event()

    def run(self) -> None:
        asyncio.run(self._work())

    async def _work(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(4)))

    async def _client(self) -> None:
        learner = self.learner
        rng = np.random.default_rng(0)
        while not self.stopped.is_set():
            now = time.time()
            request = Request(learner.ids.new_id(now), make_profile(), Objective())
            (decision,) = learner.policy.decide([request], {}, rng, learner.sequence)
            learner.record_decisions([decision])
            outcome = Outcome(decision.id, "ok", 0.1, 0.3, 20, 9)
            await learner.observe([(decision, outcome)], now)
            await learner.feedback([Feedback(decision.id, 0.8, time_s=now)], now)
            self.acknowledged[decision.id] = time.time()
            if len(self.acknowledged) % 50 == 0:
                await learner.save()

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.acknowledged) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.acknowledged) >= count


def make_instance(folder: Path, url: str = "") -> Sources:
    """An instance with keys and MLflow's files, as the launcher leaves them."""
    state = folder / "var"
    (state / "mlflow/art/1/run/artifacts").mkdir(parents=True)
    with sqlite3.connect(state / "mlflow/mlflow.db") as database:
        database.execute("CREATE TABLE versions (name TEXT)")
        database.execute("INSERT INTO versions VALUES ('router-policy')")
    (state / "mlflow/art/1/run/artifacts/policy.json").write_text("{}")
    api_keys.add(state / "keys.json", "ann", ("infer",))
    config = folder / "serve_config.yaml"
    journal = f"      journal: {url}\n" if url else ""
    config.write_text(
        "applications:\n"
        "  - name: gateway\n"
        "    import_path: deployments.app:gateway\n"
        "    args:\n"
        f"{journal}"
        "      mlflow_uri: http://127.0.0.1:5000\n"
        "      models: {small: {}, large: {}}\n"
    )
    return Sources.of(config, state)


def posterior(learner: Learner) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = learner.policy.state()
    return state


def test_a_backup_under_load_has_every_event_acknowledged_before_it_began(
    tmp_path: Path,
) -> None:
    """The restored journal has them all, and the learner restores to the posterior of those rows."""
    url = f"sqlite:///{tmp_path}/var/journal.db"
    sources = make_instance(tmp_path)
    assert sources.journal == url
    writers = Writers(url)
    writers.start()
    try:
        writers.wait_for(120)
        began = dict(writers.acknowledged)
        said = backup(sources, tmp_path / "backup")
        during = len(writers.acknowledged)
        writers.wait_for(during + 20)
    finally:
        writers.stopped.set()
        writers.join()
    assert any("signs versions" in line for line in said)

    told = restore(tmp_path / "backup", tmp_path / "new")
    assert any(str(tmp_path / "new" / JOURNAL) in line for line in told)
    restored = make(f"sqlite:///{tmp_path}/new/{JOURNAL}")
    assert restored.journal.id == writers.learner.journal.id
    events = restored.journal.find_all(list(began))
    lacking = [name for name, found in events.items() if len(found) < 3]
    assert len(began) >= 120 and not lacking
    # the posterior of exactly these rows, derived without the snapshot
    whole = make("sqlite://")
    whole.absorb(list(restored.journal.replay()))
    clocks = restored.sequence + 500, restored.records.scored + 500
    for learner in (whole, restored):
        learner.policy.advance(*clocks)
    for name, array in posterior(whole).items():
        assert np.allclose(array, posterior(restored)[name], rtol=1e-9, atol=1e-9), name
    keys = api_keys.read(tmp_path / "new/keys.json")
    assert [key.name for key in keys.values()] == ["ann"]
    with sqlite3.connect(tmp_path / "new" / MLFLOW) as database:
        assert database.execute("SELECT * FROM versions").fetchall()
    assert (tmp_path / "new" / ARTEFACTS / "1/run/artifacts/policy.json").exists()


def test_all_files_are_private(tmp_path: Path) -> None:
    """Folders have the mode 0700 and files 0600, whatever the umask."""
    make(f"sqlite:///{tmp_path}/var/journal.db")
    before = os.umask(0)
    try:
        backup(make_instance(tmp_path), tmp_path / "backup")
        restore(tmp_path / "backup", tmp_path / "new")
    finally:
        os.umask(before)
    for top in ("backup", "new"):
        for path in (tmp_path / top, *(tmp_path / top).rglob("*")):
            mode = path.stat().st_mode & 0o777
            assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("file", [JOURNAL, "keys.json", "serve_config.yaml"])
def test_a_changed_or_missing_file_is_found(tmp_path: Path, file: str) -> None:
    """The restore names the file and writes nothing."""
    make(f"sqlite:///{tmp_path}/var/journal.db")
    backup(make_instance(tmp_path), tmp_path / "backup")
    with (tmp_path / "backup" / file).open("r+b") as changed:
        changed.seek(20)
        changed.write(b"\1\2\3")
    with pytest.raises(BackupError, match=f"{file} is not the file that was backed up"):
        restore(tmp_path / "backup", tmp_path / "new")
    (tmp_path / "backup" / file).unlink()
    with pytest.raises(BackupError, match=f"{file} is missing"):
        restore(tmp_path / "backup", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folders_that_are_not_empty_are_refused(tmp_path: Path) -> None:
    """Neither a backup nor a restore overwrites anything; a backup that was not finished is none."""
    make(f"sqlite:///{tmp_path}/var/journal.db")
    sources = make_instance(tmp_path)
    backup(sources, tmp_path / "backup")
    for refused in (
        lambda: backup(sources, tmp_path / "backup"),
        lambda: restore(tmp_path / "backup", tmp_path / "var"),
    ):
        with pytest.raises(BackupError, match="is not empty"):
            refused()
    (tmp_path / "backup" / MANIFEST).unlink()
    with pytest.raises(BackupError, match="was not finished"):
        restore(tmp_path / "backup", tmp_path / "new")


def test_what_cannot_be_copied_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another MLflow is left out with a sentence; a PostgreSQL journal without pg_dump is an error with a way out."""
    make(f"sqlite:///{tmp_path}/var/journal.db")
    sources = make_instance(tmp_path)
    text = sources.config.read_text()
    sources.config.write_text(text.replace("127.0.0.1:5000", "user@mlflow.example"))
    said = backup(Sources.of(sources.config, tmp_path / "var"), tmp_path / "one")
    assert any("not copied: the policy versions" in line for line in said)
    assert not any("user@" in line for line in said)
    shutil.rmtree(tmp_path / "var")
    remote = make_instance(tmp_path, "postgresql+psycopg://u@nowhere/x")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BackupError, match="pg_dump is not installed here"):
        backup(remote, tmp_path / "two")
    with pytest.raises(BackupError, match="no configuration of a gateway"):
        Sources.of(tmp_path / "var/keys.json", tmp_path / "var")


def test_a_journal_in_postgresql_is_dumped_and_restored(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load; the new database must be empty."""
    monkeypatch.setenv("PATH", f"{postgres.bin}:{os.environ['PATH']}")
    url = postgres.new_url()
    writers = Writers(url)
    writers.start()
    try:
        writers.wait_for(40)
        began = list(writers.acknowledged)
        backup(make_instance(tmp_path, url), tmp_path / "backup")
    finally:
        writers.stopped.set()
        writers.join()
    manifest = json.loads((tmp_path / "backup" / MANIFEST).read_text())
    assert manifest["journal"] == "postgresql"
    with pytest.raises(BackupError, match="name an empty database"):
        restore(tmp_path / "backup", tmp_path / "new")
    with pytest.raises(BackupError, match="is not empty"):
        restore(tmp_path / "backup", tmp_path / "new", url)
    other = postgres.new_url()
    restore(tmp_path / "backup", tmp_path / "new", other)
    restored = make(other)
    found = restored.journal.find_all(began)
    assert all(isinstance(events[0], Decision) for events in found.values())
    assert all(len(events) == 3 for events in found.values())
    whole = make("sqlite://")
    whole.absorb(list(restored.journal.replay()))
    clocks = restored.sequence + 500, restored.records.scored + 500
    for learner in (whole, restored):
        learner.policy.advance(*clocks)
    for name, array in posterior(whole).items():
        assert np.allclose(array, posterior(restored)[name], rtol=1e-9, atol=1e-9), name
