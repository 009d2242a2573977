"""State of release 0.1.0 is opened by this release, and what this release has written is opened by release 0.1.0."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa
import yaml
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pydantic import ValidationError

from deployments.access.api_keys import ApiKeyStore
from deployments.journal import tables
from deployments.journal.journal import Journal
from deployments.operations.config_check import check_config
from deployments.settings import RENAMED, GatewaySettings, Tuning, explain, latest
from deployments.tracking.version_files import load_policy
from policies.events import Feedback
from policies.registry import make_policy
from tests.upgrades import release

ROOT = Path(__file__).resolve().parents[2]
EARLIER = Path(__file__).parent / "release-0.1.0"
COMMIT = "d93726c"  # of release 0.1.0
SCRIPT = Path(__file__).parent / "release.py"


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EARLIER / "expected.json").read_text())
    return found


@pytest.fixture
def url(tmp_path: Path) -> str:
    """URL of a copy of the earlier release's journal."""
    shutil.copy(EARLIER / "journal.db", tmp_path)
    return f"sqlite:///{tmp_path}/journal.db"


@pytest.fixture(scope="module")
def earlier_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of release 0.1.0, from the history of the clone."""
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{COMMIT}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if known.returncode:
        pytest.skip(f"the clone has no commit {COMMIT}: git fetch --unshallow")
    archive = subprocess.run(
        ["git", "archive", COMMIT, "deployments", "policies", "tests/support"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    folder = tmp_path_factory.mktemp("release-0.1.0")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def run(code: Path, verb: str, url: str) -> dict[str, Any]:
    """Run release.py with the code of a release."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), verb, url],
        cwd=code,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert {**found, "posterior": None} == {**wanted, "posterior": None}
    for name, values in wanted["posterior"].items():
        assert np.allclose(found["posterior"][name], values, rtol=1e-9, atol=1e-9), name


def test_a_journal_teaches_the_same(url: str, expected: dict[str, Any]) -> None:
    """The snapshot is restored, and the rows after it are replayed."""
    journal = Journal(url)
    row, snapshot = journal.snapshot()
    assert snapshot is not None and 0 < row < journal.last_row
    assert_same(release.read(url), expected["learned"])


def test_the_journal_of_an_earlier_release_is_recognised(url: str) -> None:
    """It has no record of migrations; afterwards it has one, and it is not migrated a second time."""
    with sa.create_engine(url).connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() is None
    for _ in range(2):
        engine = Journal(url).engine
        with engine.connect() as connection:
            context = MigrationContext.configure(connection)
            assert context.get_current_revision()
            assert not compare_metadata(context, tables._SCHEMA)


def test_the_reply_to_a_repeated_request_has_the_present_name(
    url: str, expected: dict[str, Any]
) -> None:
    """Release 0.1.0 stored `held` for a score that came before its decision."""
    journal = Journal(url)
    with journal.engine.connect() as connection:
        stored = connection.exec_driver_sql("SELECT key, status FROM replies").all()
    ((key, status),) = stored
    assert status == "held"
    reply = journal.reply(key)
    assert reply is not None and reply[1] == "pending"


def test_keys_stay_valid(expected: dict[str, Any]) -> None:
    store = ApiKeyStore(EARLIER / "keys.json")
    for name, secret in expected["keys"].items():
        key = store.find(secret)
        assert key is not None and key.name == name and key.requests_per_minute == 30
        assert store.find(f"{secret}x") is None


def test_a_policy_version_is_loaded(expected: dict[str, Any]) -> None:
    """Its files are those of which the registry has the digest, and it knows what the journal teaches."""
    snapshot = load_policy(EARLIER / "version", 1, expected["digest"])
    policy = make_policy(snapshot.policy, release.ARMS, snapshot.options)
    policy.restore(snapshot.state)
    wanted = expected["learned"]["posterior"]
    for name, values in release.posterior(policy, snapshot.sequence).items():
        assert np.allclose(values, wanted[name], rtol=1e-9, atol=1e-9), name


def test_stored_settings_with_old_names_are_replaced_by_the_given_ones(
    url: str,
) -> None:
    """The journal stores settings; those of release 0.1.0 have keys that were renamed."""
    stored = Journal(url).metadata("settings")
    assert stored is not None and b"journal_keep_days" in stored
    given = GatewaySettings.model_validate({"models": {"small": {}}})
    assert latest(stored, given) is given


def rename(arguments: dict[str, Any]) -> None:
    """Rename the keys of a section of serve_config.yaml as the messages say."""
    for (section, old), new in RENAMED.items():
        parts = [arguments] if not section else [arguments.get(section) or {}]
        if section == "models":
            parts = list(arguments.get("models", {}).values())
        for part in parts:
            if old in part:
                part[new] = part.pop(old)


def test_a_configuration_is_refused_with_the_names_that_are_valid_now() -> None:
    """Once its keys are renamed and a class that is gone is removed, it is valid, and no other key has changed."""
    config = yaml.safe_load((EARLIER / "serve_config.yaml").read_text())
    models = config["applications"][:3]
    problems = check_config(config)
    assert len(problems) == 2 + len(models)
    for model, problem in zip(models, problems):
        kwargs = f"applications.{model['name']}.args.engine_kwargs"
        assert problem.startswith(f"{kwargs}.worker_extension_cls: ")
        assert "remove the line" in problem
    problems = problems[len(models) :]
    assert "'journal_keep_days' is now 'journal_retention_days'" in problems[0]
    for old, new in (
        ("decide_here_s", "snapshot_max_age_s"),
        ("admission.requests", "admission.max_in_flight"),
        ("breaker.open_s", "breaker.cooldown_s"),
    ):
        assert f"'{old}' is now '{new}'" in problems[1]
    assert not any("unknown key" in problem for problem in problems)
    for model in models:
        model["args"]["engine_kwargs"].pop("worker_extension_cls", None)
    gateway = config["applications"][-1]
    rename(gateway["args"])
    rename(gateway["deployments"][0]["user_config"])
    assert check_config(config) == []


def problems(section: str, key: str) -> list[str]:
    """What is wrong with settings that have one key, for the gateway and for its user_config."""
    given: dict[str, Any] = {key: 0.5}
    if section == "models":
        given = {"a": given}
    found = []
    for settings in (GatewaySettings, Tuning):
        try:
            settings.model_validate({section: given} if section else given)
        except ValidationError as error:
            found.append(explain(error))
    return found


@pytest.mark.parametrize(("section", "old"), RENAMED)
def test_each_old_key_is_refused_with_the_new_one(section: str, old: str) -> None:
    """The new key is known at the place where the old one was."""
    new = RENAMED[section, old]
    assert any(
        re.search(rf"{old}' is now '.*{new}'", text) for text in problems(section, old)
    )
    unknown = [
        f"unknown key '{section or new}" in text for text in problems(section, new)
    ]
    # one of the two kinds of settings has no such key, and the other does
    assert sum(unknown) == 1


def test_migrations_only_add(url: str, expected: dict[str, Any]) -> None:
    """Release 0.1.0 reads and writes the tables after each migration: columns stay, and new ones need no value."""
    inspector = sa.inspect(Journal(url).engine)
    for table, columns in expected["tables"].items():
        found = {column["name"]: column for column in inspector.get_columns(table)}
        for name, kind in columns.items():
            assert str(found[name]["type"]) == kind, (table, name)
        for name in found.keys() - columns.keys():
            column = found[name]
            assert column["nullable"] or column["default"] is not None, (table, name)
        assert not inspector.get_unique_constraints(table), table


def test_stored_events_keep_their_fields(url: str, expected: dict[str, Any]) -> None:
    """Release 0.1.0 reads events: it ignores new fields, but needs its own, and tuples of the length that it knows."""
    release.extend(url)
    journal = Journal(url)
    rows = journal.rows(expected["learned"]["last_row"], 10)
    assert {kind for _, _, kind, _ in rows} == set(expected["fields"])
    for _, _, kind, body in rows:
        found = release.shape(msgspec.msgpack.decode(body))
        for name, length in expected["fields"][kind].items():
            assert name in found, (kind, name)
            assert not (length and found[name]) or found[name] == length, (kind, name)


def test_the_earlier_release_goes_on_with_a_journal_of_this_one(
    url: str, expected: dict[str, Any], earlier_code: Path
) -> None:
    """After a rollback nothing is lost: neither what was learned before the upgrade nor what was learned after it."""
    written = release.extend(url)
    assert written["sequence"] == expected["learned"]["sequence"] + 1
    assert_same(run(earlier_code, "read", url), written)
    again = run(earlier_code, "extend", url)
    assert again["sequence"] == written["sequence"] + 1
    # and the upgrade works a second time
    assert_same(release.read(url), again)


def test_the_earlier_release_goes_on_without_the_forgotten_scores(
    url: str, expected: dict[str, Any], earlier_code: Path
) -> None:
    """It knows no marks, and starts from the snapshot taken with one. After the next upgrade the mark counts."""
    known = expected["learned"]
    written = release.forget(url)
    assert written["last_row"] == known["last_row"] + 1
    count = "quality.count"
    assert max(known["posterior"][count]) > 0 == max(written["posterior"][count])
    assert_same(run(earlier_code, "read", url), written)
    again = run(earlier_code, "extend", url)
    assert again["sequence"] == written["sequence"] + 1
    assert max(again["posterior"][count]) > 0
    assert_same(release.read(url), again)
    journal = Journal(url)
    assert journal.last_row == again["last_row"] and journal.forgotten
    scores = [e for _, e in journal.replay() if isinstance(e, Feedback)]
    assert len(scores) == 1
    # a replay of the whole journal teaches the same
    learner = release.open_learner(url)
    learner.policy = make_policy("thompson", release.ARMS)
    learner._replay_journal(ignore_snapshot=True)
    found = release.posterior(learner.policy, learner.sequence)
    assert np.allclose(found[count], again["posterior"][count], rtol=1e-9, atol=1e-9)


def test_a_journal_of_a_newer_release_is_opened(
    url: str, expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A rollback from the next release: its migrations are unknown here, and stay as they are."""
    engine = Journal(url).engine
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE events ADD COLUMN later TEXT")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    assert_same(release.read(url), expected["learned"])
    assert "newer release" in caplog.text
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == "9999"
