"""The journal stays as small and as young as it is told to, and forgets nothing that was learned."""

import asyncio
import time
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from msgspec import structs

from deployments.journal import BATCH, DAY_S, Journal
from deployments.memory import EXPIRED, Memory
from deployments.schema import EVENTS
from policies.thompson import Thompson
from policies.types import Arm, Decision, Feedback, Objective, Outcome, Request
from tests.helpers import make_profile
from tests.test_memory import same

ARMS = (Arm("small"), Arm("large"))


def make(journal: Journal, window_s: float = float("inf")) -> Memory:
    return Memory(journal, lambda: Thompson(ARMS), window_s=window_s)


def decide(memory: Memory, count: int, time_s: float) -> list[Decision]:
    """So many decisions made at a time, with outcomes, in the journal."""
    requests = [Request(memory.identity.new_id(time_s), make_profile(), Objective()) for _ in range(count)]
    made = memory.policy.decide(requests, {}, np.random.default_rng(0), memory.sequence)
    made = [structs.replace(decision, time_s=time_s) for decision in made]
    memory.decided(made)
    asyncio.run(memory.observe([(d, Outcome(d.id, "ok", 0.1, 0.5, 20, 9)) for d in made], time_s))
    return made


def age(journal: Journal, up_to: int, by_s: float) -> None:
    """Make rows look older."""
    with journal.engine.begin() as connection:
        connection.execute(sa.update(EVENTS).where(EVENTS.c.row <= up_to).values(time_s=EVENTS.c.time_s - by_s))


def rows(journal: Journal) -> list[int]:
    with journal.engine.connect() as connection:
        return list(connection.execute(sa.select(EVENTS.c.row).order_by(EVENTS.c.row)).scalars())


def test_rows_are_bounded_by_number(url: str) -> None:
    """The oldest go, a batch at a time; what was learned from them stays, also over a restart."""
    journal = Journal(url, max_rows=2 * BATCH)
    memory = make(journal)
    for _ in range(5):
        made = decide(memory, BATCH // 2, time.time())
        asyncio.run(memory.retire(time.time()))
    asyncio.run(memory.retire(time.time()))
    assert 0 < len(rows(journal)) <= 2 * BATCH and max(rows(journal)) == journal.last_row == 5 * BATCH
    again = make(Journal(url))
    assert same(memory, again) and again.journal.last_row == journal.last_row
    assert asyncio.run(again.feedback([Feedback(made[-1].id, 1.0)], time.time())) == ["accepted"]


def test_rows_are_bounded_by_age_and_their_feedback_is_refused(url: str) -> None:
    """From the moment at which they are to go: no score is learned that a restart could not find its decision for."""
    journal, now = Journal(url, keep_days=30), time.time()
    memory = make(journal)
    old = decide(memory, BATCH, now - 31 * DAY_S)
    age(journal, journal.last_row, 31 * DAY_S)
    young = decide(memory, BATCH, now)
    asyncio.run(memory.retire(now))
    learned = memory.policy.state()["quality.count"].copy()
    late = [Feedback(old[0].id, 1.0, time_s=now), Feedback(young[0].id, 1.0, time_s=now)]
    assert asyncio.run(memory.feedback(late, now)) == [EXPIRED, "accepted"]
    asyncio.run(memory.observe([(old[0], Outcome(old[0].id))], now))
    assert memory.policy.state()["quality.count"].sum() - learned.sum() < 1.5
    asyncio.run(memory.retire(now))
    assert rows(journal)[0] == 2 * BATCH + 1
    again = make(Journal(url))
    assert asyncio.run(again.feedback(late, now)) == [EXPIRED, "duplicate"]
    assert same(memory, again)


def test_a_clock_that_ran_ahead_refuses_nothing_later(url: str) -> None:
    """What was written then goes by number like all else, and scores of today still count, also after a restart."""
    journal, now = Journal(url, max_rows=2 * BATCH), time.time()
    memory = make(journal)
    decide(memory, BATCH, now)
    age(journal, journal.last_row, -400 * DAY_S)
    young = decide(memory, 2 * BATCH, now)
    for _ in range(2):
        asyncio.run(memory.retire(now))
    assert rows(journal)[0] > BATCH
    for each in (memory, make(Journal(url))):
        assert each.journal.gone_before_s <= now
        assert asyncio.run(each.feedback([Feedback(young[-1].id, 1.0, time_s=now)], now)) != [EXPIRED]


def test_nothing_goes_before_a_snapshot_has_it(url: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """With the snapshot not on disk, all rows stay."""
    journal, now = Journal(url, max_rows=BATCH), time.time()
    memory = make(journal)
    decide(memory, 2 * BATCH, now)
    assert asyncio.run(journal.retire(now))
    asyncio.run(journal.retire(now))
    assert len(rows(journal)) == 4 * BATCH
    assert same(memory, make(Journal(url)))


def test_the_file_stops_growing(tmp_path: Path) -> None:
    """Freed pages are used again."""
    path, sizes = tmp_path / "journal.db", list[int]()
    memory = make(Journal(f"sqlite:///{path}", max_rows=2 * BATCH))
    for _ in range(16):
        decide(memory, BATCH // 2, time.time())
        asyncio.run(memory.retire(time.time()))
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert memory.journal.last_row == 16 * BATCH
    assert sizes[-1] < 1.2 * sizes[8]


def test_feedback_beyond_the_window_is_refused(url: str) -> None:
    """Though its decision is still there."""
    now = time.time()
    memory = make(Journal(url), window_s=3600)
    (old,), (young,) = decide(memory, 1, now - 3700), decide(memory, 1, now)
    given = [Feedback(old.id, 1.0, time_s=now), Feedback(young.id, 1.0, time_s=now)]
    assert asyncio.run(memory.feedback(given, now)) == [EXPIRED, "accepted"]
