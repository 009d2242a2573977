"""Times the parts that every request passes, in the tree of the working directory, and prints them as JSON.

Command: `python -P timings.py`. It is run by check.py in two trees, by its path, so it imports only what every release
has: `policies`. Figures are microseconds of processor time a request; each is the median over the rounds.
"""

import gc
import json
import sys
from pathlib import Path
from statistics import median
from time import process_time_ns

sys.path.insert(0, str(Path.cwd()))

import numpy as np

from policies.events import Outcome
from policies.profiling import features
from policies.registry import make_policy
from policies.types import Arm, Objective, Request, TaskProfile

REQUESTS = 256
ROUNDS = 15
BATCH = 64
ARMS = 4
TEXT = "A train leaves at 9:40 and arrives at 12:05. How long is the trip? Think step by step, then give JSON."


def decisions(size: int, rounds: int) -> list[float]:
    """Microseconds of a decision, of learning its outcome and of learning its score, in batches of `size`."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(-0.5, 0.5, (REQUESTS, features.D))
    rows[:, 0] = 1.0
    scores = rng.uniform(0.0, 1.0, (REQUESTS, ARMS))
    arms = tuple(Arm(f"arm{k}", output_price_usd=1e-6 * 2.0**k) for k in range(ARMS))
    column = {arm.name: k for k, arm in enumerate(arms)}
    policy = make_policy("thompson", arms)
    objective = Objective(latency_weight=0.01, cost_weight=1.0)
    requests = [
        Request(str(i), TaskProfile(row, "chat", "question", 100), objective)
        for i, row in enumerate(rows)
    ]
    outcome = Outcome("", "ok", 0.1, 0.5, 100, 20)
    found = []
    sequence = 0
    for n in range(rounds + 2):
        begin = process_time_ns()
        for i in range(0, REQUESTS, size):
            made = policy.decide(requests[i : i + size], {}, rng, sequence)
            for j, decision in enumerate(made):
                policy.learn(decision, outcome)
                policy.score(decision, float(scores[i + j, column[decision.arm]]))
            sequence += size
        if n >= 2:  # the first rounds warm up
            found.append((process_time_ns() - begin) / 1000 / REQUESTS)
        gc.collect(0)
    return found


def states(rounds: int) -> list[float]:
    """Microseconds to copy the state of a policy into another one, as a snapshot does."""
    arms = tuple(Arm(f"arm{k}") for k in range(ARMS))
    policy = make_policy("thompson", arms)
    twin = make_policy("thompson", arms)
    found = []
    for _ in range(rounds):
        begin = process_time_ns()
        for _ in range(20):
            twin.restore(policy.state())
        found.append((process_time_ns() - begin) / 1000 / 20)
    return found


def profiles(rounds: int) -> list[float]:
    """Microseconds to profile a text, without its embedding and what a classifier reads in it."""
    found = []
    # earlier releases read the text by lists of words, which is a part of their figure
    reading = {"reading": features.Reading()} if hasattr(features, "Reading") else {}
    for _ in range(rounds):
        begin = process_time_ns()
        for _ in range(200):
            features.profile(
                text=TEXT, embedding=None, task="chat", prompt_tokens=30, **reading
            )
        found.append((process_time_ns() - begin) / 1000 / 200)
    return found


def main() -> None:
    """Print the figures."""
    gc.disable()
    print(
        json.dumps(
            {
                "decide and learn, alone": median(decisions(1, ROUNDS)),
                f"decide and learn, batches of {BATCH}": median(
                    decisions(BATCH, ROUNDS)
                ),
                "profile a text": median(profiles(ROUNDS)),
                "restore a policy": median(states(ROUNDS)),
            }
        )
    )


if __name__ == "__main__":
    main()
