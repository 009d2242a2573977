"""Killed at any moment, the router's memory has lost nothing that it acknowledged and counts nothing twice.

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

from deployments.identity import Identity
from deployments.journal import Journal
from deployments.memory import Memory
from policies.base import State
from policies.signals import implied
from policies.thompson import Thompson
from policies.types import Feedback, Objective, Outcome, Request
from tests.durability_worker import ARMS, UNMOVED, Step, key_of, make_stream
from tests.helpers import make_profile

ROOT = Path(__file__).resolve().parent.parent
WATCH = ("drift.better", "drift.worse", "quality.cuts")
KILLS = int(os.environ.get("ROUTER_KILLS", "20"))


def settled(policy: Thompson, sequence: int) -> State:
    """Its state with the clock of forgetting at the same decision, so that two can be compared.

    It moves in steps: one that is far enough ahead is taken by both.
    """
    policy.decide([Request("-", make_profile(), Objective())], {}, np.random.default_rng(0), sequence + 1000)
    return policy.state()


def reference(stream: list[Step]) -> Thompson:
    """Each event once, without ledger and journal: the last vote of each source, an implied one if no other."""
    policy, votes = Thompson(ARMS, UNMOVED), dict[str, dict[str, Feedback]]()
    outcomes: dict[str, Feedback | None] = {}
    for step in stream:
        if isinstance(step.event, Outcome):
            policy.learn(step.decision, step.event)
            outcomes[step.decision.id] = implied(step.decision, step.event, 0.0)
        elif isinstance(step.event, Feedback):
            mine = votes.setdefault(step.decision.id, {})
            if step.event.source not in mine or mine[step.event.source].time_s < step.event.time_s:
                mine[step.event.source] = step.event
    for decision in (step.decision for step in stream if step.event is None):
        for vote in votes.get(decision.id, {}).values():
            policy.score(decision, vote.score)
        if decision.id not in votes and outcomes[decision.id] is not None:
            policy.score(decision, 0.0, weight=0.25)
    return policy


def difference(one: State, other: State) -> float:
    """The largest, relative to what is larger than 1."""
    return max(float((np.abs(one[n] - other[n]) / np.maximum(1, np.abs(other[n]))).max(initial=0.0)) for n in one)


class Victim:
    """The worker, and what it has acknowledged."""

    def __init__(self, url: str, stream: list[Step], path: Path):
        path.write_bytes(pickle.dumps(stream))
        command = [sys.executable, "-m", "tests.durability_worker", url, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._worker = subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)  # type: ignore[call-overload]
        self.acknowledged: set[int] = set()

    def round(
        self, numbers: list[int], acknowledgements: int | None, then_s: float = 0.0, die_after: int | None = None
    ) -> bool:
        """Let it send these steps; kill it so long after so many acknowledgements (None: when it is done).

        With `die_after` it kills itself then, which is in mid-work however slow or fast the machine is.

        Returns:
            Whether it was killed in mid-work.
        """
        self._worker.stdin.write(json.dumps([numbers, die_after]) + "\n")
        self._worker.stdin.flush()
        child, heard, done = int(self._worker.stdout.readline().split()[1]), 0, False
        wanted = len(numbers) if acknowledgements is None else acknowledgements
        while die_after is None and heard < wanted and not done:
            done = self._hear() == "done"
            heard += 1
        if die_after is None:
            time.sleep(then_s)
            os.kill(child, signal.SIGKILL)
        while (line := self._hear()) != "gone":
            done = done or line == "done"
        return not done

    def _hear(self) -> str:
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
    """How often it was killed, how often in mid-work; events sent, acknowledged ones that were lost, and those that
    were written twice; the largest difference of the restored posterior, relative where it is large.
    """

    kills: int
    interrupted: int
    events: int
    lost: int
    twice: int
    apart: float


def test_kill_nine_at_any_moment(url: str, tmp_path: Path) -> None:
    """Acknowledged events lost: 0; counted twice: 0; the posterior is that of a process that never died."""
    found = kill_often(url, tmp_path, KILLS)
    print(found)
    assert (found.lost, found.twice) == (0, 0) and found.apart <= 1e-9
    assert found.interrupted > KILLS / 3


def kill_often(url: str, folder: Path, least: int, decisions: int = 30) -> Kills:
    """Send a stream of events through a memory that is killed at least so often, and compare what is left of it.

    `decisions` of the stream are made for each of these kills; what the last of them left undone is sent as well.
    """
    journal, rng = Journal(url), random.Random(3)
    stream = make_stream(Identity(journal.salt), decisions * least, seed=1)
    victim = Victim(url, stream, folder / "stream")
    told, there, row, kills, interrupted = set[int](), Counter[tuple[str, str, float]](), 0, 0, 0
    todo, lost, latest = list(range(len(stream))), 0, dict[tuple[str, str], float]()
    while todo or kills < least:
        todo = [n for n in range(len(stream)) if n not in victim.acknowledged and (stream[n].event or n not in told)]
        # a window of what is due, out of order; then again some of what was acknowledged
        window = todo[:100] + rng.sample(sorted(victim.acknowledged), min(20, len(victim.acknowledged)))
        for i in range(len(window)):
            j = min(len(window) - 1, i + rng.randrange(12))
            window[i], window[j] = window[j], window[i]
        told |= {n for n in window if stream[n].event is None}  # a decision is only ever made once
        acknowledgements = rng.choice([0, rng.randrange(60)]) if kills < least else None
        events = sum(stream[n].event is not None for n in window)
        die_after = rng.randrange(1, events) if kills % 2 and kills < least and events > 1 else None
        interrupted += victim.round(window, acknowledgements, rng.uniform(0.0, 0.05), die_after)
        kills += 1
        for page in journal.pages(after=row):
            for key in (key_of(event) for _, event in page):
                there[key] += 1
                latest[key[:2]] = max(latest.get(key[:2], 0.0), key[2])
            row = page[-1][0]
        # a score that came after its own correction is not written: the correction must be there
        lost += sum(latest.get(stream[n].key[:2], -1.0) < stream[n].key[2] for n in victim.acknowledged)
    victim.end()

    twice = sum(count - 1 for count in there.values())
    events = sum(isinstance(step.event, Outcome | Feedback) for step in stream)
    restored = Memory(Journal(url), lambda: Thompson(ARMS, UNMOVED))
    wanted = settled(reference(stream), restored.sequence)
    watched = restored.policy.state()
    # the watch for change is a sequential test: it goes by the order of the rows, which the reference does not know
    wanted = {name: value for name, value in wanted.items() if name not in WATCH}
    apart = difference(wanted, settled(restored.policy, restored.sequence))
    asyncio.run(restored.rebuild(lambda: Other(ARMS, UNMOVED)))  # from the empty state, without any snapshot
    again = {name: value for name, value in restored.policy.state().items() if name in WATCH}
    apart = max(apart, difference(wanted, settled(restored.policy, restored.sequence)), difference(again, watched))
    return Kills(kills, interrupted, events, lost, twice, apart)


class Other(Thompson):
    """The same by another name: no snapshot is of use to it; what it expects is what the first expected."""

    name = "thomp"  # of which "thompson" is a version
