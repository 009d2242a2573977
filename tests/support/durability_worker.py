"""A learner to be killed: `python -m tests.support.durability_worker URL STREAM` reads rounds from stdin.

For each round it forks a child, which restores a learner from the database and sends the events asked for through
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

from deployments.journal.ids import IdFactory
from deployments.journal.journal import Journal
from deployments.router.learner import Learner
from policies.events import Decision, Feedback, Outcome
from policies.thompson.policy import Thompson, ThompsonSettings
from policies.types import Arm, Objective, Request
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"))
UNMOVED = ThompsonSettings(
    keep=1e12
)  # drift that is detected in random scores discounts nothing
SNAPSHOT_EVERY = 100  # rows
CLIENTS = 16  # at once


@dataclass
class Step:
    """One call of a client: a decision alone (not acknowledged), a decision with its outcome, or a score."""

    decision: Decision
    event: Outcome | Feedback | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """What makes its row in the journal one of a kind."""
        return key_of(self.event or self.decision)


def key_of(event: Decision | Outcome | Feedback) -> tuple[str, str, float]:
    """Decision id, kind or source, and time of an event."""
    if isinstance(event, Feedback):
        return event.decision_id, event.source, event.time_s
    return (
        (event.id, "decision", 0.0)
        if isinstance(event, Decision)
        else (event.decision_id, "outcome", 0.0)
    )


def make_stream(identity: IdFactory, decisions: int, seed: int) -> list[Step]:
    """Make decisions, outcomes and scores as clients send them, with corrections and several sources."""
    rng = np.random.default_rng(seed)
    policy = Thompson(ARMS)
    now = time.time()
    steps: list[Step] = []
    for first in range(0, decisions, 250):
        requests = [
            Request(
                identity.new_id(now),
                make_profile(f"What is {i} plus {i * i}? {'word ' * (i % 9)}"),
                Objective(),
            )
            for i in range(first, min(decisions, first + 250))
        ]
        policy.advance(first, first)
        for decision in policy.decide(requests, {}, rng, first):
            steps.append(Step(decision))
            tokens = int(rng.integers(2, 60))
            latency = float(rng.uniform(0.1, 2))
            status = str(
                rng.choice(
                    ["ok", "error", "disconnected", "rejected"],
                    p=[0.85, 0.07, 0.05, 0.03],
                )
            )
            reason = "length" if rng.random() < 0.1 else "stop"
            outcome = Outcome(
                decision.id, status, 0.05, latency, 20, tokens, finish_reason=reason
            )
            steps.append(Step(decision, outcome))
            if status == "rejected":  # the router refuses scores of refused requests
                continue
            for source in ("user", "judge"):
                for version in range(int(rng.choice([0, 1, 2], p=[0.5, 0.3, 0.2]))):
                    score = Feedback(
                        decision.id,
                        round(float(rng.random()), 3),
                        source,
                        now + version,
                    )
                    steps.append(Step(decision, score))
    return steps


async def work(
    learner: Learner, stream: list[Step], numbers: list[int], die_after: int | None
) -> None:
    """Send these steps with CLIENTS concurrent clients; acknowledge each by its number on stdout.

    With `die_after`, this process kills itself after this many acknowledgements.
    """
    queue = list(reversed(numbers))
    rng = np.random.default_rng()
    now = time.time()
    saved = learner.journal.last_row
    acknowledged = 0

    async def client() -> None:
        nonlocal saved, acknowledged
        while queue:
            number = queue.pop()
            step = stream[number]
            if step.event is None:
                # the decision was made before; this advances the clock of forgetting as in live operation
                request = Request("-", step.decision.profile, Objective())
                learner.policy.decide([request], {}, rng, learner.sequence)
                learner.record_decisions([step.decision])
                continue
            if isinstance(step.event, Outcome):
                await learner.observe([(step.decision, step.event)], now)
            else:
                (status,) = await learner.feedback([step.event], now)
                assert status in ("accepted", "duplicate", "pending"), status
            os.write(1, f"{number}\n".encode())
            acknowledged += 1
            if acknowledged == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if learner.journal.last_row - saved > SNAPSHOT_EVERY:
                saved = learner.journal.last_row
                await learner.save()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def main(url: str, path: Path) -> None:
    """Fork a child for each line of stdin, and report when it has ended."""
    stream: list[Step] = pickle.loads(path.read_bytes())
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            learner = Learner(Journal(url), lambda: Thompson(ARMS, UNMOVED))
            asyncio.run(work(learner, stream, *json.loads(line)))
            os.write(1, b"done\n")
            signal.pause()  # until it is killed
        os.write(1, f"child {child}\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"gone\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
