"""A journal whose database is away holds a bounded number of rows, and loses nothing that was acknowledged."""

import asyncio
import json
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from deployments.journal import journal as journal_module
from deployments.journal.journal import Journal, JournalFullError
from deployments.journal.tables import SNAPSHOTS
from deployments.router.actor import SETTINGS_KEY
from deployments.router.learner import Learner
from policies.events import Feedback, Outcome
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.deployments.journal.test_journal import make_decision
from tests.deployments.router.test_learner import ARMS
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile


def away(*_: Any) -> None:
    """A database that cannot be reached."""
    raise sa.exc.OperationalError("insert", {}, Exception("away"))


def test_a_full_journal_refuses_events_before_it_applies_them(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that wait stay bounded. What was refused can come again, and then everything is counted once."""
    monkeypatch.setattr(journal_module, "MAX_WAITING_ROWS", 10)
    learner = Learner(Journal(url), lambda: Thompson(ARMS))
    now = time.time()
    requests = [
        Request(learner.ids.new_id(now), make_profile(), Objective()) for _ in range(30)
    ]
    made = learner.policy.decide(requests, {}, np.random.default_rng(0), 0)
    database = learner.journal._write
    monkeypatch.setattr(learner.journal, "_write", away)
    reported = 0
    for decision in made:  # as the router decides, one by one
        reported += learner.record_decisions([decision])
    assert learner.journal.waiting_rows == 10 and reported == 20
    finished = [(d, Outcome(d.id, "ok", 0.1, 0.5, 20, 9)) for d in made]
    scores = [Feedback(d.id, 1.0, time_s=now) for d in made]
    before = learner.policy.state()
    for _ in range(3):
        with pytest.raises(JournalFullError, match="10 rows"):
            asyncio.run(learner.observe(finished, now))
        with pytest.raises(JournalFullError):
            asyncio.run(learner.feedback(scores, now))
    after = learner.policy.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert learner.journal.waiting_rows == 10
    monkeypatch.setattr(learner.journal, "_write", database)
    asyncio.run(learner.journal.flush())
    assert len(asyncio.run(learner.observe(finished, now))) == 30
    assert asyncio.run(learner.feedback(scores, now)) == ["accepted"] * 30
    kinds = [type(event).__name__ for _, event in Journal(url).replay()]
    assert [kinds.count(k) for k in ("Decision", "Outcome", "Feedback")] == [30] * 3


async def test_large_rows_are_bounded_by_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `store_text` a row may have 400,000 characters. What is written makes room again."""
    monkeypatch.setattr(journal_module, "MAX_WAITING_BYTES", 10_000)
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    while not journal.full:
        journal.put(Outcome("d0", "ok", 0.1, 0.5, 20, 9, answer="x" * 3_000))
    assert journal.waiting_rows == 4
    with pytest.raises(JournalFullError):
        journal.check_room()
    await journal.flush()
    assert not journal.full and journal._waiting_bytes == 0


def test_a_failed_write_keeps_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    journal.put(make_decision())
    held = journal._waiting_bytes
    with monkeypatch.context() as patched:
        patched.setattr(journal, "_write", away)
        for _ in range(3):
            with pytest.raises(sa.exc.OperationalError):
                asyncio.run(journal.flush())
    assert journal._waiting_bytes == held > 0 and journal.waiting_rows == 1


def test_a_snapshot_and_a_named_value_replace_those_that_wait(tmp_path: Path) -> None:
    """Otherwise they would add up while the database is away. Events between them stay."""
    url = f"sqlite:///{tmp_path}/journal.db"
    learner = Learner(Journal(url), lambda: Thompson((Arm("small"), Arm("large"))))
    journal = learner.journal
    for i in range(5):
        journal.put(make_decision(i))
        learner.put_snapshot()
        journal.put_metadata("one", b"%d" % i)
        journal.put_metadata("two", b"%d" % (i * i))
    tables = [table for table, _ in journal._queued]
    assert tables.count(SNAPSHOTS) == 1 and journal.waiting_rows == 5 + 1 + 2
    asyncio.run(journal.flush())
    again = Journal(url)
    assert again.snapshot()[0] == 5 and len(list(again.replay())) == 5
    assert (again.metadata("one"), again.metadata("two")) == (b"4", b"16")


def test_feedback_is_refused_while_the_journal_is_full(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are answered, feedback gets a 503, and the outcomes come later."""
    monkeypatch.setattr(journal_module, "MAX_WAITING_ROWS", 3)
    decision_id = gateway.chat().headers["x-router-decision-id"]
    eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    journal = gateway.router.thing._journal
    database = journal._write
    monkeypatch.setattr(journal, "_write", away)
    for _ in range(8):
        assert gateway.chat().status_code == 200
    feedback = {"decision_id": decision_id, "score": 1.0}
    answer = gateway.client.post("/v1/feedback", json=feedback)
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert "rows" not in answer.text
    assert gateway.chat().status_code == 200
    assert journal.waiting_rows <= 3 + 1  # and a snapshot
    monkeypatch.setattr(journal, "_write", database)
    eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    eventually(
        lambda: gateway.client.post("/v1/feedback", json=feedback).status_code == 200
    )
    kinds = [type(event).__name__ for _, event in journal.replay()]
    assert kinds.count("Outcome") == 10 and kinds.count("Feedback") == 1


def test_only_its_user_may_read_a_journal(tmp_path: Path) -> None:
    """It holds the salt. A journal that an earlier release left open is closed."""
    path = tmp_path / "state" / "journal.db"
    before = os.umask(0o000)
    try:
        for _ in range(2):
            journal = Journal(f"sqlite:///{path}")
            journal.put(make_decision())
            asyncio.run(journal.flush())
            files = sorted(path.parent.iterdir())
            assert path in files
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
            journal.engine.dispose()
            for file in path.parent.iterdir():
                file.chmod(0o644)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_journal_does_not_hold_its_own_url(tmp_path: Path) -> None:
    """The URL of an earlier release, which may have a password, is replaced at the next start."""
    first = Gateway(tmp_path)
    with first.client:
        first.chat()
    kept = json.loads(first.settings.model_dump_json())
    kept["journal"] = "postgresql+psycopg://ann:secret@host/name"
    row = (SETTINGS_KEY, json.dumps(kept, separators=(",", ":")).encode())
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", row)
    again = Gateway(tmp_path)
    with again.client:
        again.chat()
        eventually(lambda: not again.router.thing._journal.busy)
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        query = "SELECT value FROM facts WHERE name = ?"
        ((stored,),) = connection.execute(query, [SETTINGS_KEY]).fetchall()
    assert b"secret" not in stored and b'"models":' in stored
    assert b'"journal":' not in stored
