"""Accuracy and latency of each model by kind of task, measured through a running gateway: `make models`."""

import argparse
import random
from collections import defaultdict

import numpy as np

from assets import talk
from assets.tasks import KINDS, make_task
from deployments.demonstration.client import (
    DEFAULT_URL,
    Answer,
    chat_models,
    run_stream,
)
from deployments.demonstration.run import level_of


def table(answers: dict[str, list[Answer]], kinds: list[str]) -> str:
    """A Markdown table: for each kind of task the share of right answers and the mean latency of each model."""
    names = list(answers)
    lines = ["| kind | " + " | ".join(f"{n} right | {n} s" for n in names) + " |"]
    lines.append("|---|" + "---:|---:|" * len(names))
    by_kind: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for name, given in answers.items():
        for answer in given:
            by_kind[name, answer.task.kind].append(answer)
            by_kind[name, "all"].append(answer)
    for kind in (*kinds, "all"):
        cells = []
        for name in names:
            group = by_kind[name, kind]
            right = float(np.mean([a.right for a in group]))
            cells.append(f"{right:.0%} | {np.mean([a.latency_s for a in group]):.3f}")
        title = kind if kind == "all" else f"{kind} ({level_of(kind)})"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Ask every model the same tasks, one at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--each", type=int, default=50, help="tasks of each kind")
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    models = chat_models(arguments.url)
    tasks = [make_task(rng, kind) for kind in KINDS for _ in range(arguments.each)]
    if talk.MODEL in models:
        tasks += [
            talk.make_talk(rng, kind)
            for kind in talk.KINDS
            for _ in range(arguments.each)
        ]
    kinds = list(dict.fromkeys(task.kind for task in tasks))
    rng.shuffle(tasks)
    answers = {
        name: run_stream(
            arguments.url, tasks, lambda _, name=name: name, name, concurrency=1
        )  # type: ignore[misc]
        for name in models
    }
    print(table(answers, kinds))
    for name, given in answers.items():
        tokens = np.mean([a.output_tokens for a in given])
        print(f"{name}: {tokens:.1f} tokens per answer")


if __name__ == "__main__":
    main()
