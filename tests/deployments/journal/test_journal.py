"""The journal stores what was acknowledged, and returns it unchanged."""

import asyncio
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa

from deployments.journal.codec import decode, encode
from deployments.journal.forgotten import Mark
from deployments.journal.journal import Journal
from deployments.journal.snapshot import Snapshot
from deployments.journal.tables import EVENTS, FORGOTTEN
from policies.events import Decision, Feedback, Outcome
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.support.requests import make_profile


def make_decision(i: int = 0):  # type: ignore[no-untyped-def]
    policy = Thompson([Arm("small"), Arm("large")])
    request = Request(
        f"d{i}", make_profile(), Objective(max_cost_usd=0.1, models=("small",))
    )
    return policy.decide([request], {}, np.random.default_rng(i), i)[0]


async def test_events_are_stored_exactly(url: str) -> None:
    """The journal returns events in their order, with floats exact to the last bit and infinities."""
    decision = make_decision()
    events = [
        decision,
        Outcome("d0", "ok", 0.1, 1 / 3, 20, 7),
        Feedback("d0", 0.1 + 0.2, "judge", 5.0),
    ]
    journal = Journal(url)
    for event in events:
        journal.put(event)
    await journal.flush()
    (_, first), *rest = Journal(url).replay()
    assert [event for _, event in rest] == events[1:]
    assert (
        first.objective == decision.objective and first.estimates == decision.estimates
    )
    assert np.array_equal(first.profile.features, decision.profile.features)
    assert (
        first.profile.kind == decision.profile.kind
        and first.policy_version == decision.policy_version
    )
    assert [len(Journal(url).find_all(["d0"], up_to)["d0"]) for up_to in (99, 2)] == [
        3,
        2,
    ]


async def test_only_the_newest_snapshots_are_kept(url: str) -> None:
    """The journal returns the newest snapshot, with the row after which it was taken."""
    journal = Journal(url)
    for i in range(6):
        journal.put(make_decision(i))
        journal.put_snapshot(
            Snapshot("thompson", ("small",), i, 2, {"x": np.array([[i / 3]])})
        )
        await journal.flush()
    row, snapshot = Journal(url).snapshot()
    assert row == 6 and snapshot is not None and snapshot.sequence == 5
    assert np.array_equal(snapshot.state["x"], [[5 / 3]])


async def test_rows_stay_queued_when_the_database_fails(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails raises, loses nothing, and succeeds later."""
    journal = Journal(url)
    journal.put(make_decision())

    def broken(_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_write", broken)
        with pytest.raises(OSError, match="disk full"):
            await journal.flush()
    await journal.flush()
    assert len(list(Journal(url).replay())) == 1


async def test_a_cancelled_flush_writes_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that is cancelled during a write neither loses rows nor causes a second write."""
    journal = Journal(url)
    write = Journal._write
    go_on = threading.Event()
    journal.put(make_decision())
    monkeypatch.setattr(
        journal, "_write", lambda rows: (go_on.wait(60), write(journal, rows))
    )

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(journal.flush(), 0.05)
    journal.put(Outcome("d0"))
    go_on.set()
    await journal.flush()
    assert [row for row, _ in Journal(url).replay()] == [1, 2]


def test_sqlite_writes_durably(tmp_path: Path) -> None:
    """SQLite reports journal_mode=WAL and synchronous=FULL."""
    with Journal(f"sqlite:///{tmp_path}/journal.db").engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


async def test_a_write_with_a_lost_acknowledgement_is_not_repeated(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks after a commit: the retry finds the rows and writes only the following ones."""
    journal = Journal(url)
    insert = Journal._insert

    def lost(rows: list) -> None:
        insert(journal, rows)
        raise ConnectionError("the server went away")

    journal.put(make_decision())
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_insert", lost)
        with pytest.raises(ConnectionError):
            await journal.flush()
    journal.put(Outcome("d0"))
    await journal.flush()
    assert [row for row, _ in Journal(url).replay()] == [1, 2]


async def test_a_second_writer_is_refused(url: str) -> None:
    """Two routers on one journal would mix their rows, so the later write fails."""
    first = Journal(url)
    second = Journal(url)
    first.put(Feedback("d0", 1.0))
    await first.flush()
    second.put(Feedback("d1", 1.0))
    with pytest.raises(RuntimeError, match="let only one router write"):
        await second.flush()
    assert [event.decision_id for _, event in Journal(url).replay()] == ["d0"]


def test_the_salt_is_permanent(url: str) -> None:
    """A reopened journal has the same salt; another journal has another one."""
    assert Journal(url).salt == Journal(url).salt and len(Journal(url).salt) == 32
    assert Journal(url).salt != Journal("sqlite://").salt


async def test_an_old_journal_gets_missing_columns_and_tables(url: str) -> None:
    """Opening an old journal adds missing columns and tables; its rows get the present time."""
    journal = Journal(url)
    journal.put(make_decision())
    journal.put_snapshot(Snapshot("thompson", ("small",), 1, 2, {}))
    await journal.flush()
    with journal.engine.begin() as connection:
        for change in (
            "ALTER TABLE events DROP COLUMN time_s",
            "ALTER TABLE snapshots DROP COLUMN cut",
            "ALTER TABLE snapshots DROP COLUMN gone_before_s",
            "DROP TABLE replies",
            "DROP TABLE facts",
            "DROP TABLE forgotten",
            "DROP TABLE alembic_version",
        ):
            connection.exec_driver_sql(change)
    again = Journal(url, keep_days=1)
    assert [event.id for _, event in again.replay()] == ["d0"] and again.snapshot()[
        0
    ] == 1
    assert (await again.retention.apply(time.time())) is False
    again.put_reply("key", "digest", "accepted")
    await again.flush()
    assert again.reply("key") == ("digest", "accepted") and again.reply("other") is None


def scores(journal: Journal) -> list[str]:
    """The decisions whose scores count."""
    return [event.decision_id for _, event in journal.replay()]  # type: ignore[union-attr]


async def test_a_mark_is_in_a_table_of_its_own_and_keeps_its_place(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It covers the scores before it and none after it, also after a restart and a lost acknowledgement."""
    journal = Journal(url)
    insert = Journal._insert

    def lost(rows: list) -> None:
        insert(journal, rows)
        raise ConnectionError("the server went away")

    journal.put(Feedback("before", 1.0, time_s=5.0))
    row = journal.put_mark(Mark(since_s=5.0, up_to=1, reason="a bad hour"))
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_insert", lost)
        with pytest.raises(ConnectionError):
            await journal.flush()
    # the mark is the last row, and no snapshot says so
    assert row == 2 and Journal(url).last_row == 2
    assert journal.put(Feedback("after", 1.0, time_s=6.0)) == 3
    await journal.flush()
    again = Journal(url)
    for one in (journal, again):
        assert scores(one) == ["after"]
        assert one.forgotten.after(1) and not one.forgotten.after(2)
    with again.engine.connect() as connection:
        events = connection.execute(sa.select(EVENTS.c.row, EVENTS.c.kind)).all()
        marks = connection.execute(sa.select(FORGOTTEN.c.row)).scalars().all()
    assert events == [(1, "feedback"), (3, "feedback")] and marks == [2]
    assert again.put_mark(Mark(cancels=row)) == 4
    await again.flush()
    assert scores(again) == scores(Journal(url)) == ["before", "after"]


async def test_marks_among_the_events_are_moved(url: str) -> None:
    """Between two releases, marks were events of a kind that release 0.1.0 cannot read."""
    journal = Journal(url)
    journal.put(Feedback("before", 1.0, time_s=5.0))
    await journal.flush()
    mark = Mark(since_s=5.0, up_to=1, reason="a bad hour")
    with journal.engine.begin() as connection:
        FORGOTTEN.drop(connection)
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
        row = {"row": 2, "kind": "forgotten", "decision_id": "", "time_s": 7.0}
        connection.execute(sa.insert(EVENTS), [{**row, "body": encode(mark)}])
    again = Journal(url)
    assert scores(again) == [] and again.last_row == 2
    with again.engine.connect() as connection:
        kinds = connection.execute(sa.select(EVENTS.c.kind)).scalars().all()
        moved = connection.execute(sa.select(FORGOTTEN)).all()
    assert kinds == ["feedback"] and moved == [(2, encode(mark), 7.0)]


def test_decisions_of_the_first_version_are_decoded() -> None:
    """The first version stored estimates as maps, with fields that no longer exist."""
    decision = make_decision()
    raw = msgspec.msgpack.decode(encode(decision))
    raw["estimates"] = [
        {**e._asdict(), "sampled_quality": 0.5} for e in decision.estimates
    ]
    for late in ("prompt_hash", "prompt"):
        del raw[late]
    again = decode("decision", msgspec.msgpack.encode(raw))
    assert isinstance(again, Decision) and again.estimates == decision.estimates
    assert np.array_equal(again.profile.features, decision.profile.features)
