"""Going back to a version: what is known afterwards is what would be known if the forgotten scores had never come."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from deployments.journal.codec import decode
from deployments.journal.journal import Journal
from deployments.journal.snapshot import Snapshot
from deployments.journal.tables import EVENTS
from deployments.router import role_assignment
from deployments.router.learner import Learner
from deployments.router.projections import ScoreProjections
from deployments.router.replay import replay
from policies.events import ANY_OWNER, Decision, Event, Feedback, Outcome
from policies.registry import make_policy
from policies.rollout.roles import CHALLENGER, CHAMPION
from policies.types import Objective, Request
from tests.deployments.router.test_rollout import System, make_settings
from tests.support.requests import make_profile

HOUR = 3600.0
KEYS = ("ann", "ben", "cleo", "dan", "mallory")


class Hours(System):
    """A router whose scores have the times of a day that begins now."""

    def __init__(self, folder: Path, seed: int = 0):
        super().__init__(make_settings(folder), seed)
        self.began_s = time.time() - 5 * HOUR

    def at(self, hours: float) -> float:
        """The time so many hours after the beginning."""
        return self.began_s + hours * HOUR

    async def ask(self, owners: tuple[str, ...], count: int) -> list[Decision]:
        """Answers for these keys by turns, without scores."""
        made: list[Decision] = []
        for i in range(count):
            request = Request(
                self.learner.ids.new_id(time.time()),
                make_profile(f"What is {self.rng.integers(99)}?"),
                Objective(),
                owner=owners[i % len(owners)],
            )
            (decision,) = await self.router.decide([request], "test", {})
            outcome = Outcome(decision.id, "ok", 0.1, 0.3, 20, 9)
            await self.router.observe([(decision, outcome)], "test", {})
            made.append(decision)
        return made

    async def give(
        self,
        decisions: list[Decision],
        score: Callable[[Decision], float],
        hours: float,
    ) -> list[str]:
        """Score these answers within a minute, from this hour on."""
        items = [
            Feedback(
                d.id,
                score(d),
                "user",
                self.at(hours) + i / 100,
                d.owner,
                given_by=d.owner,
            )
            for i, d in enumerate(decisions)
        ]
        statuses = []
        for item in items:
            statuses += await self.router.feedback([item])
        return statuses

    async def restore(
        self, version: Snapshot, hours: float, key: str | None = None
    ) -> Any:
        return await self.router.restore_version(
            version, self.at(hours), key, "a bad hour"
        )

    def rows(self) -> list[tuple[int, Event]]:
        """All events of the journal, the forgotten scores included."""
        with self.learner.journal.engine.connect() as connection:
            found = connection.execute(
                sa.select(EVENTS.c.row, EVENTS.c.kind, EVENTS.c.body).order_by(
                    EVENTS.c.row
                )
            ).all()
        return [(row, decode(kind, body)) for row, kind, body in found]


def good(decision: Decision) -> float:
    return 0.9 if decision.arm == "large" else 0.3


def bad(decision: Decision) -> float:
    return 0.0 if decision.arm == "large" else 1.0


def is_bad(event: Event, since_s: float, key: str | None) -> bool:
    return (
        isinstance(event, Feedback)
        and event.time_s >= since_s
        and (key is None or event.owner == key)
    )


def never_had(
    system: Hours, since_s: float, key: str | None, up_to: float = float("inf")
) -> tuple[Learner, ScoreProjections]:
    """A learner that was given the same events in the same order, without these scores of the rows up to `up_to`."""
    derived = ScoreProjections()
    arms = system.settings.arms()
    learner = Learner(
        Journal("sqlite://"), lambda: make_policy("thompson", arms, {}), derived
    )
    learner.absorb(
        [
            (row, event)
            for row, event in system.rows()
            if row > up_to or not is_bad(event, since_s, key)
        ]
    )
    return learner, derived


def differences(one: Any, other: Any) -> dict[str, float]:
    """The largest difference of each array, relative to its largest number; of copies with the same clocks."""
    clock = int(max(p.state()["quality.reference"][0] for p in (one, other))) + 500
    sequence = int(max(p.state()["ttft.reference"][0] for p in (one, other))) + 500
    states = []
    for policy in (one, other):
        copy = make_policy("thompson", policy.arms, {})
        copy.restore(policy.state())
        copy.advance(sequence, clock)
        states.append(copy.state())
    assert states[0].keys() == states[1].keys()
    return {
        name: float(np.max(np.abs(a - states[1][name])) / max(1.0, np.max(np.abs(a))))
        for name, a in states[0].items()
    }


def check_same(system: Hours, expected: Learner, derived: ScoreProjections) -> None:
    champion = system.rollout.roles.members[CHAMPION]
    found = differences(champion, expected.policy)
    assert max(found.values()) < 1e-9, found
    assert system.learner.reputation.state() == expected.reputation.state()
    projections = system.router._projections
    assert projections.scoring_rates.state() == derived.scoring_rates.state()
    assert projections.arm_stats.totals == derived.arm_stats.totals
    assert projections.arm_stats.figures() == derived.arm_stats.figures()
    assert system.learner.records.scored == expected.records.scored


async def bad_hour(system: Hours) -> tuple[Snapshot, list[Decision]]:
    """A good hour, a version, and an hour in which one key gives and corrects bad scores; returns also its answers."""
    await system.give(await system.ask(KEYS, 200), good, 0.0)
    late = await system.ask(("mallory",), 20)
    await system.give(late[:10], good, 0.5)
    version = await system.version(1)
    hers = []
    for minutes in range(0, 60, 10):
        hours = 1 + minutes / 60
        answers = await system.ask(KEYS, 50)
        hers += [d for d in answers if d.owner == "mallory"]
        await system.give([d for d in answers if d.owner == "mallory"], bad, hours)
        await system.give([d for d in answers if d.owner != "mallory"], good, hours)
        await (
            system.learner.save()
        )  # older snapshots without the bad scores are deleted
    # corrections of good scores, and first scores for answers from before
    await system.give(late, bad, 1.9)
    # the judge scores answers of all keys; no key owns its scores
    judged = [
        Feedback(d.id, 0.7, "judge", system.at(1.95), ANY_OWNER) for d in late[:5]
    ]
    await system.router.feedback(judged)
    return version, hers + late


@pytest.mark.parametrize("key", ["mallory", None])
def test_the_state_is_that_of_a_router_that_never_had_the_scores(
    tmp_path: Path, key: str | None
) -> None:
    """Posterior, drift, reputation, scoring rates, totals and figures; also after a restart and in later replays."""

    async def play() -> None:
        system = Hours(tmp_path)
        version, _ = await bad_hour(system)
        champion = system.rollout.roles.members[CHAMPION]
        expected, derived = never_had(system, system.at(1), key)
        assert max(differences(champion, expected.policy).values()) > 1e-3

        summary = await system.restore(version, 1, key)
        check_same(system, expected, derived)
        assert summary.roles[CHALLENGER].policy == "thompson"
        change = summary.history[-1]
        assert change.what == "restored" and "a bad hour" in change.reason

        again = Hours(tmp_path)
        again.began_s = system.began_s
        check_same(again, expected, derived)

        # a replay of the whole journal leaves the scores out, too
        def make() -> Any:
            return make_policy("thompson", system.settings.arms(), {})

        whole = Learner(Journal(system.settings.journal), make)
        whole.policy = make()
        whole._replay_journal(ignore_snapshot=True)
        found = differences(whole.policy, expected.policy)
        assert max(found.values()) < 1e-9, found
        kept = len(list(whole.journal.scores(10**6)))
        counted = [e for _, e in whole.journal.replay() if isinstance(e, Feedback)]
        assert kept > len(counted)

    asyncio.run(play())


def test_a_score_that_is_sent_again_counts_as_a_new_one(tmp_path: Path) -> None:
    """The same source scores the same answers after the restore, once more; also after a restart."""

    async def play() -> None:
        system = Hours(tmp_path)
        version, answers = await bad_hour(system)
        await system.restore(version, 1, "mallory")
        row = system.learner.journal.last_row
        statuses = await system.give(answers, lambda _: 0.45, 3)
        assert set(statuses) == {"accepted"}
        expected, derived = never_had(system, system.at(1), "mallory", up_to=row)
        for one in (system, Hours(tmp_path)):
            counted = one.learner.records.get(answers[-1].id)
            assert counted is not None and counted.scores["user"] == 0.45
            assert one.router._projections.arm_stats.totals == derived.arm_stats.totals
            assert one.learner.reputation.state() == expected.reputation.state()

    asyncio.run(play())


def test_events_that_arrive_during_the_restore_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions, outcomes and scores count once, whether the replay or its end takes them in."""
    monkeypatch.setattr("deployments.router.role_assignment.FEW_EVENTS", 10)
    monkeypatch.setattr("policies.thompson.drift.THRESHOLD", float("inf"))
    arrived = threading.Event()

    def wait_and_replay(*arguments: Any) -> Learner:
        assert arrived.wait(60)
        return replay(*arguments)

    monkeypatch.setattr(role_assignment, "replay", wait_and_replay)

    async def play() -> None:
        system = Hours(tmp_path)
        version, _ = await bad_hour(system)
        began = system.learner.journal.last_row
        restoring = asyncio.create_task(system.restore(version, 1, "mallory"))
        await asyncio.sleep(0)
        while not restoring.done():
            await system.give(await system.ask(KEYS, 5), good, 2.5)
            if system.learner.journal.last_row > began + 30:
                arrived.set()
            await asyncio.sleep(0)
        await restoring
        ended = max(system.learner.journal.forgotten._marks)
        assert ended > began + 20
        await system.learner.journal.flush()
        assert len([row for row, _ in system.rows() if began < row < ended]) > 20
        expected, derived = never_had(system, system.at(1), "mallory", up_to=began)
        found = differences(system.rollout.roles.members[CHAMPION], expected.policy)
        # after the restore the predecessor decides, too, and each of the two has its own evidence of drift
        own = {name: d for name, d in found.items() if not name.startswith("drift.")}
        assert max(own.values()) < 1e-9, own
        assert system.learner.reputation.state() == expected.reputation.state()
        totals = system.router._projections.arm_stats.totals
        assert totals == derived.arm_stats.totals

    asyncio.run(play())


def test_restoring_twice_forgets_both(tmp_path: Path) -> None:
    """The second restore to the same version keeps what the first one has forgotten out."""

    async def play() -> None:
        system = Hours(tmp_path)
        version, _ = await bad_hour(system)
        await system.restore(version, 1, "mallory")
        await system.restore(version, 1.5, "ann")
        rows = [
            (row, event)
            for row, event in system.rows()
            if not is_bad(event, system.at(1), "mallory")
            and not is_bad(event, system.at(1.5), "ann")
        ]
        derived = ScoreProjections()
        expected = Learner(
            Journal("sqlite://"),
            lambda: make_policy("thompson", system.settings.arms(), {}),
            derived,
        )
        expected.absorb(rows)
        check_same(system, expected, derived)

    asyncio.run(play())


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_rollback_lets_the_scores_count_again(tmp_path: Path, by_hand: bool) -> None:
    """The predecessor is the champion again, with everything that has arrived since; also if the watch rolls back."""

    async def play() -> None:
        system = Hours(tmp_path)
        version, answers = await bad_hour(system)
        before, _ = never_had(system, float("inf"), None)
        await system.restore(version, 1, "mallory")
        if by_hand:
            await system.router.roll_back("a mistake")
        else:
            system.rollout.roll_back("by the watch")
            await system.router._undo_restore()
            await system.learner.save()
        for one in (system, Hours(tmp_path)):
            found = differences(one.rollout.roles.members[CHAMPION], before.policy)
            assert max(found.values()) < 1e-9, found
            assert one.learner.reputation.state() == before.reputation.state()
            record = one.learner.records.get(answers[0].id)
            assert record is not None and record.scores["user"] == bad(answers[0])
            assert not one.learner.journal.forgotten
            assert list(one.rollout.roles.members) == [CHAMPION]
        assert await system.give(answers[:1], bad, 1) == ["duplicate"]

    asyncio.run(play())


def test_a_version_that_knows_the_scores_is_refused(tmp_path: Path) -> None:
    """A version registered in the bad hour is refused, for going back and for every other role."""

    async def play() -> None:
        system = Hours(tmp_path)
        version, _ = await bad_hour(system)
        tainted = replace(await system.version(2), version=2)
        row = system.learner.journal.last_row
        with pytest.raises(ValueError, match=r"version 2 has learned from \d+ of the"):
            await system.restore(tainted, 1, "mallory")
        assert system.learner.journal.last_row == row
        await system.restore(version, 1, "mallory")
        with pytest.raises(ValueError, match="choose a version that was registered"):
            await system.assign(role="shadow", snapshot=replace(tainted, version=7))

    asyncio.run(play())


def test_a_version_whose_rows_are_gone_is_refused(tmp_path: Path) -> None:
    """The message names the oldest row that is kept; rows from before the version may be gone."""

    async def play() -> None:
        system = Hours(tmp_path)
        version, _ = await bad_hour(system)
        journal = system.learner.journal

        def delete(up_to: int) -> None:
            with journal.engine.begin() as connection:
                connection.execute(sa.delete(EVENTS).where(EVENTS.c.row <= up_to))
            journal.retention.deletable_row = up_to

        delete(version.row)
        await system.restore(version, 1, "mallory")
        await system.router.roll_back("again")
        delete(version.row + 1)
        with pytest.raises(ValueError, match="oldest that is kept"):
            await system.restore(version, 1, "mallory")

    asyncio.run(play())


def test_the_forecasts_are_trained_without_the_scores(tmp_path: Path) -> None:
    """The trainer reads the journal again, and its next fit has none of the forgotten scores."""

    async def play() -> None:
        system = Hours(tmp_path)
        version, answers = await bad_hour(system)
        trainer = system.router._trainer
        await trainer.run_once()
        before = trainer.forecaster.version
        await system.restore(version, 1, "mallory")
        assert trainer.forecaster.version > before
        trainer._cooldown_until_s = 0.0
        assert await trainer.run_once()
        read = {r.decision.id: r for r in trainer._recent.newest(())}
        first, late = answers[0], answers[-20]
        assert read[first.id].scores == {} and read[late.id].scores["user"] == good(
            late
        )

    asyncio.run(play())
