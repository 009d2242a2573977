"""The bundled prompts to calibrate the default models: `python -m assets.prompts` writes assets/prompts.jsonl.

The questions are reserved (tasks.is_reserved), so no stream of the demo has any of them. A reference matches the same
replies as the demo's checker (tasks.check) accepts.
"""

import json
import random
import re
from pathlib import Path

from assets import talk
from assets.tasks import KINDS, Task, make_task

COUNT = 150
SEED = 150
MAX_TOKENS = 100  # as the demo asks
PATH = Path(__file__).with_suffix(".jsonl")


def reserved_tasks() -> list[Task]:
    """The tasks of the bundled prompts: every kind about equally often, no question twice.

    Answers that end in "so" are left out: in `tasks.check` these letters begin the answer.
    """
    rng = random.Random(SEED)
    kinds = KINDS + talk.KINDS
    tasks: dict[str, Task] = {}
    while len(tasks) < COUNT:
        kind = kinds[len(tasks) % len(kinds)]
        if kind in talk.KINDS:
            task = talk.make_talk(rng, kind, reserved=True)
        else:
            task = make_task(rng, kind, wishes=False, reserved=True)
        if not task.answer.endswith("so"):
            tasks.setdefault(task.question, task)
    return list(tasks.values())


def pattern(task: Task) -> str:
    """A regular expression for right replies: the rule; or the answer, which words that end in "so " may precede."""
    if task.rule:
        return f"(?is){task.rule}"
    return rf"(?s)(?:.*so )?\s*{re.escape(task.answer)}\s*\.?"


def lines() -> list[str]:
    """The lines of the file."""
    return [
        json.dumps(
            {
                "prompt": task.question,
                "reference": pattern(task),
                "grade": "regex",
                "max_tokens": MAX_TOKENS,
            }
        )
        for task in reserved_tasks()
    ]


if __name__ == "__main__":
    PATH.write_text("".join(f"{line}\n" for line in lines()))
