"""A router's memory to be killed: `python -m tests.durability_worker URL STREAM` reads rounds from stdin.

For each round it forks a child, which restores its memory from the database and sends the events asked for through
it, many at a time, writing the number of each to stdout once it is acknowledged. Forking keeps a round short: what
takes long is importing numpy and sqlalchemy.
"""

import asyncio
import json
import os
import pickle
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deployments.identity import Identity
from deployments.journal import Journal
from deployments.memory import Memory
from policies.thompson import Settings, Thompson
from policies.types import Arm, Decision, Feedback, Objective, Outcome, Request
from tests.helpers import make_profile

ARMS = (Arm("small"), Arm("large"))
UNMOVED = Settings(keep=1e12)  # a change that the watch finds (in random scores) takes nothing away
SNAPSHOT_EVERY = 100  # rows
CLIENTS = 16  # at once


@dataclass
class Step:
    """One call of a client: the decision alone (it is not acknowledged), with its outcome, or a score."""

    decision: Decision
    event: Outcome | Feedback | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """What makes its row in the journal one of a kind."""
        return key_of(self.event or self.decision)


def key_of(event: Decision | Outcome | Feedback) -> tuple[str, str, float]:
    """Decision, kind or source, and time of an event."""
    if isinstance(event, Feedback):
        return event.decision_id, event.source, event.time_s
    return (event.id, "decision", 0.0) if isinstance(event, Decision) else (event.decision_id, "outcome", 0.0)


def make_stream(identity: Identity, decisions: int, seed: int) -> list[Step]:
    """Decisions, outcomes and scores as clients send them: corrections, several sources, cut-off answers."""
    rng, policy, now = np.random.default_rng(seed), Thompson(ARMS), time.time()
    steps: list[Step] = []
    for first in range(0, decisions, 250):
        requests = [
            Request(identity.new_id(now), make_profile(f"What is {i} plus {i * i}? {'word ' * (i % 9)}"), Objective())
            for i in range(first, min(decisions, first + 250))
        ]
        for decision in policy.decide(requests, {}, rng, first):
            steps.append(Step(decision))
            tokens, latency = int(rng.integers(2, 60)), float(rng.uniform(0.1, 2))
            status = str(rng.choice(["ok", "error", "disconnected", "rejected"], p=[0.85, 0.07, 0.05, 0.03]))
            reason = "length" if rng.random() < 0.1 else "stop"
            outcome = Outcome(decision.id, status, 0.05, latency, 20, tokens, finish_reason=reason)
            steps.append(Step(decision, outcome))
            for source in ("user", "judge"):
                for version in range(int(rng.choice([0, 1, 2], p=[0.5, 0.3, 0.2]))):
                    score = Feedback(decision.id, round(float(rng.random()), 3), source, now + version)
                    steps.append(Step(decision, score))
    return steps


async def work(memory: Memory, stream: list[Step], numbers: list[int], die_after: int | None) -> None:
    """Send these steps, so many at a time; each is acknowledged by its number on stdout.

    die_after: how many acknowledgements this process lives for; None: until another kills it.
    """
    queue, rng, now = list(reversed(numbers)), np.random.default_rng(), time.time()
    saved, acknowledged = memory.journal.last_row, 0

    async def client() -> None:
        nonlocal saved, acknowledged
        while queue:
            number = queue.pop()
            step = stream[number]
            if step.event is None:
                # the choice itself was made before; this lets the clock of forgetting run as it does live
                request = Request("-", step.decision.profile, Objective())
                memory.policy.decide([request], {}, rng, memory.sequence)
                memory.decided([step.decision])
                continue
            if isinstance(step.event, Outcome):
                await memory.observe([(step.decision, step.event)], now)
            else:
                (status,) = await memory.feedback([step.event], now)
                assert status in ("accepted", "duplicate", "held"), status
            os.write(1, f"{number}\n".encode())
            acknowledged += 1
            if acknowledged == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if memory.journal.last_row - saved > SNAPSHOT_EVERY:
                saved = memory.journal.last_row
                await memory.save()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def main(url: str, path: Path) -> None:
    """Fork a child for each line of stdin, and say when it is gone."""
    stream: list[Step] = pickle.loads(path.read_bytes())
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            memory = Memory(Journal(url), lambda: Thompson(ARMS, UNMOVED))
            asyncio.run(work(memory, stream, *json.loads(line)))
            os.write(1, b"done\n")
            signal.pause()  # until it is killed
        os.write(1, f"child {child}\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"gone\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
