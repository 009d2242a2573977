"""A restarted learner restores everything that it had learned, from SQLite and from PostgreSQL."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa
from msgspec import structs

from deployments.journal.journal import Journal
from deployments.journal.snapshot import Snapshot
from deployments.journal.tables import SNAPSHOTS
from deployments.router.learner import Learner, Projection
from policies.baselines import Static
from policies.events import Decision, Event, Feedback, Outcome, Record
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.support.postgres import Postgres
from tests.support.requests import make_profile

ARMS = tuple(Arm(name) for name in ("nano", "small", "large", "minilm"))
ROWS = 20_000


def make(url: str) -> Learner:
    return Learner(Journal(url), lambda: Thompson(ARMS))


def decide(learner: Learner, count: int) -> list[Decision]:
    """Make decisions as the router does, and put them into the journal with outcomes and scores."""
    now = time.time()
    requests = [
        Request(learner.ids.new_id(now), make_profile(f"What is {i}?"), Objective())
        for i in range(count)
    ]
    made = learner.policy.decide(
        requests, {}, np.random.default_rng(0), learner.sequence
    )
    learner.record_decisions(
        [structs.replace(decision, time_s=now) for decision in made]
    )
    asyncio.run(
        learner.observe([(d, Outcome(d.id, "ok", 0.1, 0.5, 20, 9)) for d in made], now)
    )
    asyncio.run(
        learner.feedback(
            [Feedback(d.id, i % 2, time_s=now) for i, d in enumerate(made)], now
        )
    )
    return made


def scores(learner: Learner) -> float:
    """Weighted number of scores that the quality model has learned."""
    return float(learner.policy.state()["quality.count"].sum())


def same(one: Learner, other: Learner) -> bool:
    sequence = max(one.sequence, other.sequence) + 1000
    states = []
    scored = max(one.records.scored, other.records.scored) + 1000
    for learner in (one, other):
        learner.policy.advance(sequence, scored)
        learner.policy.decide(
            [Request("-", make_profile(), Objective())],
            {},
            np.random.default_rng(0),
            sequence,
        )
        states.append(learner.policy.state())
    return all(
        np.allclose(states[0][name], states[1][name], rtol=1e-9, atol=1e-9)
        for name in states[0]
    )


def test_the_effects_of_an_event_have_a_fixed_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An event reaches the decision record, the projection, the policy and the journal, in this order."""
    effects: list[str] = []

    class Spy(Projection):
        def record(self, event: Event, record: Record) -> None:
            if isinstance(event, Outcome):
                effects.append(f"record {record.outcome is event}")
            effects.append(f"projection {type(event).__name__}")

    class Policy(Thompson):
        def learn(self, decision: Decision, outcome: Outcome) -> None:
            effects.append("policy Outcome")

        def score(self, *args: object, **options: object) -> None:
            effects.append("policy Feedback")

    journal = Journal("sqlite://")
    monkeypatch.setattr(
        journal, "put", lambda event: effects.append(f"journal {type(event).__name__}")
    )
    learner = Learner(journal, lambda: Policy(ARMS), Spy())
    now = time.time()
    request = Request(learner.ids.new_id(now), make_profile(), Objective())
    (decision,) = learner.policy.decide([request], {}, np.random.default_rng(0), 0)
    learner.record_decisions([decision])
    learner.apply(Outcome(decision.id, "ok", 0.1, 0.5, 20, 9))
    learner.apply(Feedback(decision.id, 1.0, time_s=now))
    assert effects == [
        "projection Decision",
        "journal Decision",
        "record True",
        "projection Outcome",
        "policy Outcome",
        "journal Outcome",
        "projection Feedback",
        "policy Feedback",
        "journal Feedback",
    ]


def test_a_restart_replays_only_the_rows_after_the_snapshot(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart without a snapshot reads each row once; a restart after a snapshot reads only later rows."""
    learner = make(url)
    pages = Journal.pages
    read: list[int] = []

    def counted(journal: Journal, after: int = 0) -> Iterator[list[tuple[int, Event]]]:
        for page in pages(journal, after):
            read.extend(row for row, _ in page)
            yield page

    monkeypatch.setattr(Journal, "pages", counted)
    while learner.journal.last_row < ROWS:
        decide(learner, min(1000, (ROWS - learner.journal.last_row + 2) // 3))
    again = make(url)
    assert again.sequence == learner.sequence and same(learner, again)
    assert read == [*range(1, learner.journal.last_row + 1)]
    read.clear()
    asyncio.run(again.save())
    third = make(url)
    assert same(third, again) and not read


def test_a_score_finds_its_decision_from_before_the_snapshot(url: str) -> None:
    """A score is corrected after the snapshot and after the restart; each correction replaces the earlier one."""
    learner = make(url)
    made = decide(learner, 20)
    asyncio.run(learner.save())
    now = time.time() + 1
    asyncio.run(learner.feedback([Feedback(d.id, 0.25, time_s=now) for d in made], now))
    again = make(url)
    assert same(learner, again)
    for one in (learner, again):
        asyncio.run(
            one.feedback([Feedback(d.id, 0.75, time_s=now + 1) for d in made], now + 1)
        )
        learner.journal = again.journal  # a second writer would be refused
    assert same(learner, again) and scores(again) < 20.001


def test_early_scores_wait_for_their_decision_across_a_restart(url: str) -> None:
    """Scores arrive before a snapshot, and their decision arrives after it."""
    learner = make(url)
    now = time.time()
    request = Request(learner.ids.new_id(now), make_profile(), Objective())
    (decision,) = learner.policy.decide([request], {}, np.random.default_rng(0), 0)
    given = [Feedback(decision.id, score, time_s=now + score) for score in (0.5, 1.0)]
    assert asyncio.run(learner.feedback(given, now)) == ["pending", "pending"]
    asyncio.run(learner.save())
    again = make(url)
    assert again.records.pending == (decision.id,) and scores(again) == 0
    asyncio.run(
        again.observe([(decision, Outcome(decision.id, "ok", 0.1, 0.5, 20, 9))], now)
    )
    record = again.records.get(decision.id)
    assert record is not None and record.scores == {"user": 1.0}
    third = make(url)
    assert scores(third) == pytest.approx(1) and third.records.pending == ()
    assert same(again, third)


def test_a_new_policy_replays_the_whole_journal(url: str) -> None:
    """A policy of another kind replays all rows, at a restart and when it is replaced live."""
    rules = Learner(Journal(url), lambda: Static(ARMS))
    made = decide(rules, 30)
    asyncio.run(rules.save())
    wanted = Thompson(ARMS)
    for i, decision in enumerate(made):
        wanted.learn(decision, Outcome(decision.id, "ok", 0.1, 0.5, 20, 9))
        # The learner dates decisions of a policy that does not learn: no score was known then.
        wanted.score(structs.replace(decision, scored=0), i % 2)
    wanted.advance(30, 30)
    restarted = make(url)
    asyncio.run(rules.replace_policy(lambda: Thompson(ARMS)))
    for learner in (restarted, rules):
        for name, value in wanted.state().items():
            assert np.allclose(
                learner.policy.state()[name], value, rtol=1e-9, atol=1e-9
            ), name


def test_a_snapshot_with_other_features_is_ignored(url: str) -> None:
    """The learner replays the journal instead, and skips decisions that have other features."""
    learner = make(url)
    decide(learner, 10)
    learner.journal.put_snapshot(
        Snapshot("thompson", ("nano",), 3, 1, {"quality.moment": np.zeros((1, 3))})
    )
    old = decide(learner, 1)[0]
    odd = structs.replace(
        old, id="odd", profile=replace(old.profile, features=np.ones(3))
    )
    asyncio.run(learner.observe([(odd, Outcome("odd", "error"))], time.time()))
    again = make(url)
    assert same(learner, again) and again.version == 1


def test_a_restart_uses_the_newest_snapshot(url: str) -> None:
    """The state comes from the newest snapshot even if the rows before it are deleted."""
    learner = make(url)
    decide(learner, 10)
    asyncio.run(learner.save())
    with learner.journal.engine.begin() as connection:
        assert (
            connection.execute(
                sa.select(sa.func.count()).select_from(SNAPSHOTS)
            ).scalar()
            == 1
        )
        connection.exec_driver_sql("DELETE FROM events")
    again = make(url)
    assert same(learner, again) and again.journal.last_row == 30


def test_a_killed_database_loses_no_acknowledged_event(
    postgres: Postgres,
) -> None:
    """PostgreSQL is killed and restarted: acknowledged events are there, and queued events are written then."""
    server = Postgres(
        postgres.bin
    )  # a new one, because a large database recovers slowly
    try:
        learner = make(server.new_url())
        made = decide(learner, 20)
        server.kill()
        now = time.time() + 1
        later = [Feedback(d.id, 0.25, time_s=now) for d in made]
        with pytest.raises(sa.exc.SQLAlchemyError):
            asyncio.run(learner.feedback(later, now))
        server.start()
        assert asyncio.run(learner.feedback(later, now)) == ["duplicate"] * 20
        again = make(learner.journal.engine.url.render_as_string(hide_password=False))
        assert again.journal.last_row == 80 and same(learner, again)
    finally:
        server.stop()
