"""The command `python -m tests.fuzz`: the full campaign, with its seed, figures and time.

The exit status is 1 if a bar does not hold.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.campaign import MAX_GROWTH_MB, MAX_HOLD_S, generate, mutate
from tests.support.gateway import Gateway


def main() -> None:
    """Play the generated cases, then the mutations, each with a gateway of its own."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=3_000)
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--most-hold-ms",
        type=float,
        default=1000 * MAX_HOLD_S,
        help="CPU time for which one callback may hold the event loop; a slow or busy machine needs more",
    )
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print(f"seed {given.seed}", flush=True)
    held = True
    if given.cases:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            answers = generate(Path(folder), given.cases, given.seed)
        total = sum(answers.values())
        statuses = sorted({status for _, status in answers})
        print(
            f"{total} cases of the OpenAPI schema in {time.perf_counter() - began:.0f} s: statuses {statuses}, "
            "no server error, all errors in OpenAI's shape",
            flush=True,
        )
    if given.mutations:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            gateway = Gateway(Path(folder))
            with gateway.client:
                result = mutate(gateway, given.mutations, given.seed)
        print(
            f"{given.mutations} mutations in {time.perf_counter() - began:.0f} s: "
            f"{dict(sorted(result.statuses.items()))}, {len(result.failures)} wrong answers, event loop held for "
            f"{1000 * result.longest_s:.0f} ms of CPU at most (bar {given.most_hold_ms:.0f}) by {result.longest}, "
            f"{result.grown_mb:.1f} MB more memory (bar {MAX_GROWTH_MB:.0f})"
        )
        for failure in result.failures[:50]:
            print(failure)
        held = result.held(given.most_hold_ms / 1000)
    sys.exit(not held)


if __name__ == "__main__":
    main()
