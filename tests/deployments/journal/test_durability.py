"""Durability: a learner killed at any moment loses no acknowledged event and counts none twice.

ROUTER_KILLS sets the number of kills (200 for the whole proof); the default keeps the test short.
"""

import asyncio
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deployments.journal.ids import IdFactory
from deployments.journal.journal import Journal
from deployments.router.learner import Learner
from policies.base import State
from policies.events import Feedback, Outcome, visible_flaw
from policies.thompson.policy import Thompson
from policies.types import Objective, Request
from tests.support.durability_worker import ARMS, UNMOVED, Step, key_of, make_stream
from tests.support.requests import make_profile

ROOT = Path(__file__).resolve().parents[3]
WATCH = ("drift.better", "drift.worse", "quality.cuts")
KILLS = int(os.environ.get("ROUTER_KILLS", "20"))


def settled(policy: Thompson, sequence: int) -> State:
    """The policy's state with its clock of forgetting at one decision, so that two states can be compared.

    The clock moves in steps, so both states advance to a step that is far ahead.
    """
    policy.advance(sequence + 1000, sequence + 1000)
    policy.decide(
        [Request("-", make_profile(), Objective())],
        {},
        np.random.default_rng(0),
        sequence + 1000,
    )
    return policy.state()


def reference(stream: list[Step]) -> Thompson:
    """A policy that learned each event once, without decision records and journal.

    A decision has one vote, the mean of its sources' last scores, unless its answer shows a flaw.
    """
    policy = Thompson(ARMS, UNMOVED)
    votes = dict[str, dict[str, Feedback]]()
    flawed = set[str]()
    for step in stream:
        if isinstance(step.event, Outcome):
            policy.learn(step.decision, step.event)
            if visible_flaw(step.decision, step.event):
                flawed.add(step.decision.id)
        elif isinstance(step.event, Feedback):
            mine = votes.setdefault(step.decision.id, {})
            if (
                step.event.source not in mine
                or mine[step.event.source].time_s < step.event.time_s
            ):
                mine[step.event.source] = step.event
    for decision in (step.decision for step in stream if step.event is None):
        mine = [vote.score for vote in votes.get(decision.id, {}).values()]
        if mine and decision.id not in flawed:
            policy.score(decision, sum(mine) / len(mine))
    return policy


def difference(one: State, other: State) -> float:
    """The largest difference; relative for values above 1."""
    return max(
        float(
            (np.abs(one[n] - other[n]) / np.maximum(1, np.abs(other[n]))).max(
                initial=0.0
            )
        )
        for n in one
    )


class Victim:
    """The worker process and the steps that it has acknowledged."""

    def __init__(self, url: str, stream: list[Step], path: Path):
        path.write_bytes(pickle.dumps(stream))
        command = [
            sys.executable,
            "-m",
            "tests.support.durability_worker",
            url,
            str(path),
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._worker = subprocess.Popen(
            command, cwd=ROOT, text=True, env=environment, **pipes
        )  # type: ignore[call-overload]
        self.acknowledged: set[int] = set()

    def round(
        self,
        numbers: list[int],
        acknowledgements: int | None,
        then_s: float = 0.0,
        die_after: int | None = None,
    ) -> bool:
        """Let the worker send these steps, and kill it.

        Args:
            numbers: the steps.
            acknowledgements: kill the worker after this many acknowledgements; None: when it has finished.
            then_s: wait this long before the kill.
            die_after: the worker kills itself after this many acknowledgements; so it dies in the middle of its work,
                however fast the machine is.

        Returns:
            Whether the worker was killed before it had finished.
        """
        self._worker.stdin.write(json.dumps([numbers, die_after]) + "\n")
        self._worker.stdin.flush()
        child = int(self._worker.stdout.readline().split()[1])
        acknowledged = 0
        done = False
        wanted = len(numbers) if acknowledgements is None else acknowledgements
        while die_after is None and acknowledged < wanted and not done:
            line = self._read_line()
            assert line != "gone", "the child ended by itself; stderr says why"
            done = line == "done"
            acknowledged += 1
        if die_after is None:
            time.sleep(then_s)
            os.kill(child, signal.SIGKILL)
        while (line := self._read_line()) != "gone":
            done = done or line == "done"
        return not done

    def _read_line(self) -> str:
        line: str = self._worker.stdout.readline().strip()
        assert line, "the worker is gone"
        if line.isdigit():
            self.acknowledged.add(int(line))
        return line

    def end(self) -> None:
        self._worker.stdin.close()
        self._worker.wait(10)


@dataclass(frozen=True)
class Kills:
    """What the kills have done.

    kills, interrupted: number of kills, and of those before the worker had finished.
    events: number of outcomes and scores that were sent.
    lost: acknowledged events that the journal does not have.
    twice: events that the journal has twice.
    apart: largest difference of the restored posterior from the reference; relative for values above 1.
    """

    kills: int
    interrupted: int
    events: int
    lost: int
    twice: int
    apart: float


@pytest.mark.slow
def test_a_killed_learner_loses_and_repeats_nothing(url: str, tmp_path: Path) -> None:
    """SIGKILL at random moments: 0 lost events, 0 repeated events, the posterior of an uninterrupted process."""
    found = kill_often(url, tmp_path, KILLS)
    print(found)
    assert (found.lost, found.twice) == (0, 0) and found.apart <= 1e-9
    assert found.interrupted > KILLS / 3


def kill_often(url: str, folder: Path, least: int, decisions: int = 30) -> Kills:
    """Send a stream of events through a learner that is killed at least this often, and check what it restores.

    Args:
        url: of the journal's database.
        folder: for the stream.
        least: number of kills.
        decisions: number of decisions in the stream for each kill; steps that remain after the last kill are sent, too.
    """
    journal = Journal(url)
    rng = random.Random(3)
    stream = make_stream(IdFactory(journal.salt), decisions * least, seed=1)
    victim = Victim(url, stream, folder / "stream")
    sent_decisions = set[int]()
    there = Counter[tuple[str, str, float]]()
    row = 0
    kills = 0
    interrupted = 0
    todo = list(range(len(stream)))
    lost = 0
    latest = dict[tuple[str, str], float]()
    while todo or kills < least:
        todo = [
            n
            for n in range(len(stream))
            if n not in victim.acknowledged
            and (stream[n].event or n not in sent_decisions)
        ]
        # the next steps out of order, and some acknowledged steps a second time
        window = todo[:100] + rng.sample(
            sorted(victim.acknowledged), min(20, len(victim.acknowledged))
        )
        for i in range(len(window)):
            j = min(len(window) - 1, i + rng.randrange(12))
            window[i], window[j] = window[j], window[i]
        sent_decisions |= {
            n for n in window if stream[n].event is None
        }  # a decision is made only once
        acknowledgements = rng.choice([0, rng.randrange(60)]) if kills < least else None
        events = sum(stream[n].event is not None for n in window)
        die_after = (
            rng.randrange(1, events)
            if kills % 2 and kills < least and events > 1
            else None
        )
        interrupted += victim.round(
            window, acknowledgements, rng.uniform(0.0, 0.05), die_after
        )
        kills += 1
        for page in journal.pages(after=row):
            for key in (key_of(event) for _, event in page):
                there[key] += 1
                latest[key[:2]] = max(latest.get(key[:2], 0.0), key[2])
            row = page[-1][0]
        # a score that arrives after its own correction is not written, but the correction must be
        lost += sum(
            latest.get(stream[n].key[:2], -1.0) < stream[n].key[2]
            for n in victim.acknowledged
        )
    victim.end()

    twice = sum(count - 1 for count in there.values())
    events = sum(isinstance(step.event, Outcome | Feedback) for step in stream)
    restored = Learner(Journal(url), lambda: Thompson(ARMS, UNMOVED))
    wanted = settled(reference(stream), restored.sequence)
    watched = restored.policy.state()
    # drift detection is a sequential test: it depends on the order of rows, which the reference ignores
    wanted = {name: value for name, value in wanted.items() if name not in WATCH}
    apart = difference(wanted, settled(restored.policy, restored.sequence))
    asyncio.run(
        restored.replace_policy(lambda: Other(ARMS, UNMOVED))
    )  # from the empty state, without a snapshot
    again = {
        name: value for name, value in restored.policy.state().items() if name in WATCH
    }
    apart = max(
        apart,
        difference(wanted, settled(restored.policy, restored.sequence)),
        difference(again, watched),
    )
    return Kills(kills, interrupted, events, lost, twice, apart)


class Other(Thompson):
    """A Thompson policy with another name: no snapshot fits it, but the estimates of the journal's decisions do."""

    name = "thomp"  # of which "thompson" is a version
