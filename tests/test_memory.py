"""A restart finds all that was learned, quickly, whatever the database and however long the journal."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa
from msgspec import structs

from deployments.journal import Journal
from deployments.memory import Memory
from deployments.schema import SNAPSHOTS
from deployments.snapshot import Snapshot
from policies.ledger import Event
from policies.static import Static
from policies.thompson import Thompson
from policies.types import Arm, Decision, Feedback, Objective, Outcome, Request
from tests.helpers import make_profile
from tests.postgres import Postgres

ARMS = tuple(Arm(name) for name in ("nano", "small", "large", "minilm"))
ROWS = 20_000


def make(url: str) -> Memory:
    return Memory(Journal(url), lambda: Thompson(ARMS))


def decide(memory: Memory, count: int) -> list[Decision]:
    """Decisions as the router makes them, with outcomes and scores, in the journal."""
    now = time.time()
    requests = [Request(memory.identity.new_id(now), make_profile(f"What is {i}?"), Objective()) for i in range(count)]
    made = memory.policy.decide(requests, {}, np.random.default_rng(0), memory.sequence)
    memory.decided([structs.replace(decision, time_s=now) for decision in made])
    asyncio.run(memory.observe([(d, Outcome(d.id, "ok", 0.1, 0.5, 20, 9)) for d in made], now))
    asyncio.run(memory.feedback([Feedback(d.id, i % 2, time_s=now) for i, d in enumerate(made)], now))
    return made


def scores(memory: Memory) -> float:
    """How many scores its quality model has learned, by weight."""
    return float(memory.policy.state()["quality.count"].sum())


def same(one: Memory, other: Memory) -> bool:
    sequence, states = max(one.sequence, other.sequence) + 1000, []
    for memory in (one, other):
        memory.policy.decide([Request("-", make_profile(), Objective())], {}, np.random.default_rng(0), sequence)
        states.append(memory.policy.state())
    return all(np.allclose(states[0][name], states[1][name], rtol=1e-9, atol=1e-9) for name in states[0])


def test_a_long_journal_is_read_once_and_after_a_snapshot_not_at_all(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart without a snapshot folds each row once; one after a snapshot reads only the rows after it."""
    memory, pages = make(url), Journal.pages
    read: list[int] = []

    def counted(journal: Journal, after: int = 0) -> Iterator[list[tuple[int, Event]]]:
        for page in pages(journal, after):
            read.extend(row for row, _ in page)
            yield page

    monkeypatch.setattr(Journal, "pages", counted)
    while memory.journal.last_row < ROWS:
        decide(memory, min(1000, (ROWS - memory.journal.last_row + 2) // 3))
    again = make(url)
    assert again.sequence == memory.sequence and same(memory, again)
    assert read == [*range(1, memory.journal.last_row + 1)]
    read.clear()
    asyncio.run(again.save())
    third = make(url)
    assert same(third, again) and not read


def test_scores_of_decisions_before_the_snapshot_find_them(url: str) -> None:
    """Corrected after the snapshot, and again after the restart: each takes back what it replaces."""
    memory = make(url)
    made = decide(memory, 20)
    asyncio.run(memory.save())
    now = time.time() + 1
    asyncio.run(memory.feedback([Feedback(d.id, 0.25, time_s=now) for d in made], now))
    again = make(url)
    assert same(memory, again)
    for one in (memory, again):
        asyncio.run(one.feedback([Feedback(d.id, 0.75, time_s=now + 1) for d in made], now + 1))
        memory.journal = again.journal  # the second writer would be refused
    assert same(memory, again) and scores(again) < 20.001


def test_what_is_held_is_still_held_after_a_restart(url: str) -> None:
    """Scores that came before a snapshot, their decision after it."""
    memory, now = make(url), time.time()
    request = Request(memory.identity.new_id(now), make_profile(), Objective())
    (decision,) = memory.policy.decide([request], {}, np.random.default_rng(0), 0)
    given = [Feedback(decision.id, score, time_s=now + score) for score in (0.5, 1.0)]
    assert asyncio.run(memory.feedback(given, now)) == ["held", "held"]
    asyncio.run(memory.save())
    again = make(url)
    assert again.ledger.held == (decision.id,) and scores(again) == 0
    asyncio.run(again.observe([(decision, Outcome(decision.id, "ok", 0.1, 0.5, 20, 9))], now))
    record = again.ledger.get(decision.id)
    assert record is not None and record.scores == {"user": 1.0}
    third = make(url)
    assert scores(third) == pytest.approx(1) and third.ledger.held == ()
    assert same(again, third)


def test_another_policy_learns_from_the_whole_journal(url: str) -> None:
    """At a restart under other settings, and live."""
    rules = Memory(Journal(url), lambda: Static(ARMS))
    made = decide(rules, 30)
    asyncio.run(rules.save())
    wanted = Thompson(ARMS)
    for i, decision in enumerate(made):
        wanted.learn(decision, Outcome(decision.id, "ok", 0.1, 0.5, 20, 9))
        wanted.score(decision, i % 2)
    restarted = make(url)
    asyncio.run(rules.rebuild(lambda: Thompson(ARMS)))
    for memory in (restarted, rules):
        for name, value in wanted.state().items():
            assert np.allclose(memory.policy.state()[name], value, rtol=1e-9, atol=1e-9), name


def test_a_snapshot_that_does_not_fit_is_no_obstacle(url: str) -> None:
    """Made by a version with other features: what can be learned from the rows is learned."""
    memory = make(url)
    decide(memory, 10)
    memory.journal.put_snapshot(Snapshot("thompson", ("nano",), 3, 1, {"quality.moment": np.zeros((1, 3))}))
    old = decide(memory, 1)[0]
    odd = structs.replace(old, id="odd", profile=replace(old.profile, features=np.ones(3)))
    asyncio.run(memory.observe([(odd, Outcome("odd", "error"))], time.time()))
    again = make(url)
    assert same(memory, again) and again.version == 1


def test_the_newest_snapshot_is_the_one_that_counts(url: str) -> None:
    """Only the rows after it are read."""
    memory = make(url)
    decide(memory, 10)
    asyncio.run(memory.save())
    with memory.journal.engine.begin() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(SNAPSHOTS)).scalar() == 1
        connection.exec_driver_sql("DELETE FROM events")
    again = make(url)
    assert same(memory, again) and again.journal.last_row == 30


def test_a_database_that_dies_loses_nothing_that_was_acknowledged(postgres: Postgres) -> None:
    """PostgreSQL is killed in mid-work and comes back: what it had said is there, what it had not is written then."""
    server = Postgres(postgres.bin)  # of its own: a large one recovers slowly
    try:
        memory = make(server.new_url())
        made = decide(memory, 20)
        server.kill()
        now = time.time() + 1
        later = [Feedback(d.id, 0.25, time_s=now) for d in made]
        with pytest.raises(sa.exc.SQLAlchemyError):
            asyncio.run(memory.feedback(later, now))
        server.start()
        assert asyncio.run(memory.feedback(later, now)) == ["duplicate"] * 20
        again = make(memory.journal.engine.url.render_as_string(hide_password=False))
        assert again.journal.last_row == 80 and same(memory, again)
    finally:
        server.stop()
