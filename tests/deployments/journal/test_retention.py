"""Retention: limits the number and the age of the journal's rows, and keeps everything that was learned."""

import asyncio
import time
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from msgspec import structs

from deployments.journal.forgotten import Mark
from deployments.journal.journal import Journal
from deployments.journal.retention import BATCH_ROWS, DAY_S
from deployments.journal.tables import EVENTS, FORGOTTEN
from deployments.router.learner import Learner
from policies.events import EXPIRED, Decision, Feedback, Outcome
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.deployments.router.test_learner import same
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"))


def make(journal: Journal, window_s: float = float("inf")) -> Learner:
    return Learner(journal, lambda: Thompson(ARMS), window_s=window_s)


def decide(learner: Learner, count: int, time_s: float) -> list[Decision]:
    """Put decisions of this time into the journal, with outcomes."""
    requests = [
        Request(learner.ids.new_id(time_s), make_profile(), Objective())
        for _ in range(count)
    ]
    made = learner.policy.decide(
        requests, {}, np.random.default_rng(0), learner.sequence
    )
    made = [structs.replace(decision, time_s=time_s) for decision in made]
    learner.record_decisions(made)
    asyncio.run(
        learner.observe(
            [(d, Outcome(d.id, "ok", 0.1, 0.5, 20, 9)) for d in made], time_s
        )
    )
    return made


def age(journal: Journal, up_to: int, by_s: float) -> None:
    """Make the rows up to this one older."""
    with journal.engine.begin() as connection:
        connection.execute(
            sa.update(EVENTS)
            .where(EVENTS.c.row <= up_to)
            .values(time_s=EVENTS.c.time_s - by_s)
        )


def rows(journal: Journal) -> list[int]:
    with journal.engine.connect() as connection:
        return list(
            connection.execute(sa.select(EVENTS.c.row).order_by(EVENTS.c.row)).scalars()
        )


def test_the_number_of_rows_is_limited(url: str) -> None:
    """Retention deletes the oldest rows in batches; the learned state stays, also after a restart."""
    journal = Journal(url, max_rows=2 * BATCH_ROWS)
    learner = make(journal)
    for _ in range(5):
        made = decide(learner, BATCH_ROWS // 2, time.time())
        asyncio.run(learner.apply_retention(time.time()))
    asyncio.run(learner.apply_retention(time.time()))
    assert (
        0 < len(rows(journal)) <= 2 * BATCH_ROWS
        and max(rows(journal)) == journal.last_row == 5 * BATCH_ROWS
    )
    again = make(Journal(url))
    assert same(learner, again) and again.journal.last_row == journal.last_row
    assert asyncio.run(again.feedback([Feedback(made[-1].id, 1.0)], time.time())) == [
        "accepted"
    ]


def test_the_age_of_rows_is_limited_and_late_feedback_is_refused(url: str) -> None:
    """Feedback is refused as soon as its row is marked for deletion, because a restart could not replay it."""
    journal = Journal(url, keep_days=30)
    now = time.time()
    learner = make(journal)
    old = decide(learner, BATCH_ROWS, now - 31 * DAY_S)
    age(journal, journal.last_row, 31 * DAY_S)
    young = decide(learner, BATCH_ROWS, now)
    asyncio.run(learner.apply_retention(now))
    learned = learner.policy.state()["quality.count"].copy()
    late = [
        Feedback(old[0].id, 1.0, time_s=now),
        Feedback(young[0].id, 1.0, time_s=now),
    ]
    assert asyncio.run(learner.feedback(late, now)) == [EXPIRED, "accepted"]
    asyncio.run(learner.observe([(old[0], Outcome(old[0].id))], now))
    assert learner.policy.state()["quality.count"].sum() - learned.sum() < 1.5
    asyncio.run(learner.apply_retention(now))
    assert rows(journal)[0] == 2 * BATCH_ROWS + 1
    again = make(Journal(url))
    assert asyncio.run(again.feedback(late, now)) == [EXPIRED, "duplicate"]
    assert same(learner, again)


def test_a_clock_that_ran_ahead_does_not_refuse_later_feedback(url: str) -> None:
    """Rows with a time in the future are deleted by number; new scores still count, also after a restart."""
    journal = Journal(url, max_rows=2 * BATCH_ROWS)
    now = time.time()
    learner = make(journal)
    decide(learner, BATCH_ROWS, now)
    age(journal, journal.last_row, -400 * DAY_S)
    young = decide(learner, 2 * BATCH_ROWS, now)
    for _ in range(2):
        asyncio.run(learner.apply_retention(now))
    assert rows(journal)[0] > BATCH_ROWS
    for each in (learner, make(Journal(url))):
        assert each.journal.retention.deleted_before_s <= now
        assert asyncio.run(
            each.feedback([Feedback(young[-1].id, 1.0, time_s=now)], now)
        ) != [EXPIRED]


def test_rows_stay_until_a_durable_snapshot_covers_them(url: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Retention deletes no rows while no snapshot was written."""
    journal = Journal(url, max_rows=BATCH_ROWS)
    now = time.time()
    learner = make(journal)
    decide(learner, 2 * BATCH_ROWS, now)
    assert asyncio.run(journal.retention.apply(now))
    asyncio.run(journal.retention.apply(now))
    assert len(rows(journal)) == 4 * BATCH_ROWS
    assert same(learner, make(Journal(url)))


def test_a_mark_is_deleted_with_the_rows_that_it_covers(url: str) -> None:
    """A later mark stays, and the numbers continue."""
    journal = Journal(url, max_rows=BATCH_ROWS)
    learner = make(journal)
    now = time.time()
    decide(learner, BATCH_ROWS, now)
    journal.put_mark(Mark(up_to=journal.last_row))
    decide(learner, BATCH_ROWS, now)
    kept = journal.put_mark(Mark(up_to=journal.last_row))
    for _ in range(2):
        asyncio.run(learner.apply_retention(now))
    assert 2 * BATCH_ROWS + 1 < rows(journal)[0] < kept
    with journal.engine.connect() as connection:
        assert connection.execute(sa.select(FORGOTTEN.c.row)).scalars().all() == [kept]
    assert Journal(url).last_row == journal.last_row == kept


def test_the_database_file_stops_growing(tmp_path: Path) -> None:
    """SQLite uses the pages of deleted rows again."""
    path = tmp_path / "journal.db"
    sizes = list[int]()
    learner = make(Journal(f"sqlite:///{path}", max_rows=2 * BATCH_ROWS))
    for _ in range(16):
        decide(learner, BATCH_ROWS // 2, time.time())
        asyncio.run(learner.apply_retention(time.time()))
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert learner.journal.last_row == 16 * BATCH_ROWS
    assert sizes[-1] < 1.2 * sizes[8]


def test_feedback_beyond_the_window_is_refused(url: str) -> None:
    """Feedback is refused after the window even if the journal still has its decision."""
    now = time.time()
    learner = make(Journal(url), window_s=3600)
    (old,), (young,) = decide(learner, 1, now - 3700), decide(learner, 1, now)
    given = [Feedback(old.id, 1.0, time_s=now), Feedback(young.id, 1.0, time_s=now)]
    assert asyncio.run(learner.feedback(given, now)) == [EXPIRED, "accepted"]
