"""A recording: what every size answered to the questions of the demo, as lines of JSON.

A line has no text. The questions are generated again from their seed, and a digest shows that they are the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import msgspec
from msgspec import structs

from assets.tasks import Task
from deployments.demonstration.client import Answer

Key = tuple[int, int, str]  # seed, number of the question, model


class RecordedAnswer(msgspec.Struct, frozen=True):
    """The answer of one size to one question.

    seed, number: of the question: the stream of the demo, and the position in it.
    question: digest of the question's text.
    ttft_s, latency_s: seconds to the first and to the last token, measured by the client.
    """

    seed: int
    number: int
    model: str
    kind: str
    question: str
    right: bool
    ttft_s: float
    latency_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def key(self) -> Key:
        """What identifies the answer in a recording."""
        return self.seed, self.number, self.model


def digest(task: Task) -> str:
    """Digest of a question's text."""
    return blake2b(task.question.encode(), digest_size=8).hexdigest()


def recorded(seed: int, number: int, answer: Answer) -> RecordedAnswer:
    """The line of an answer."""
    return RecordedAnswer(
        seed=seed,
        number=number,
        model=answer.model,
        kind=answer.task.kind,
        question=digest(answer.task),
        right=answer.right,
        ttft_s=round(answer.ttft_s, 6),
        latency_s=round(answer.latency_s, 6),
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
    )


class Recording:
    """The file of a recording.

    Args:
        path: the file; it is made with the first answer.

    Raises:
        ValueError: a line is not a recorded answer.
    """

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[Key, RecordedAnswer] = {}
        # An interrupted recorder may have left a part of a line.
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        self._whole_bytes = sum(map(len, whole))
        for number, line in enumerate(whole, start=1):
            try:
                answer = msgspec.json.decode(line, type=RecordedAnswer)
            except msgspec.DecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not a recorded answer: {error}"
                ) from None
            self.answers[answer.key] = answer

    def append(self, answers: Iterable[RecordedAnswer]) -> None:
        """Write answers at the end of the file."""
        added = list(answers)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = b"".join(msgspec.json.encode(answer) + b"\n" for answer in added)
        with self.path.open("ab") as file:
            file.truncate(self._whole_bytes)
            file.write(text)
        self._whole_bytes += len(text)
        self.answers.update((answer.key, answer) for answer in added)

    def seeds(self) -> list[int]:
        """The seeds that have an answer."""
        return sorted({seed for seed, _, _ in self.answers})

    def models(self) -> list[str]:
        """The models that have an answer."""
        return sorted({model for _, _, model in self.answers})

    def stream(
        self, seed: int, tasks: Sequence[Task], models: Sequence[str]
    ) -> "RecordedStream":
        """All answers to the questions of a seed.

        Raises:
            ValueError: answers are missing, or belong to other questions.
        """
        wanted = [
            [(seed, number, model) for model in models] for number in range(len(tasks))
        ]
        missing = sum(key not in self.answers for keys in wanted for key in keys)
        if missing:
            raise ValueError(
                f"{self.path} lacks {missing} of {len(tasks) * len(models)} answers of seed {seed}; record them, or "
                "leave the seed out"
            )
        answers = [[self.answers[key] for key in keys] for keys in wanted]
        for task, row in zip(tasks, answers, strict=True):
            if any(answer.question != digest(task) for answer in row):
                raise ValueError(
                    f"{self.path} has answers to other questions than those of seed {seed}; the tasks have changed "
                    "since, so record it again"
                )
        return RecordedStream(tuple(tasks), tuple(models), answers)


@dataclass(frozen=True)
class RecordedStream:
    """The questions of one seed in the demo's order.

    answers: [N][K] answer of each model to each question.
    """

    tasks: tuple[Task, ...]
    models: tuple[str, ...]
    answers: list[list[RecordedAnswer]]

    def scaled(self, factor: float) -> "RecordedStream":
        """The same answers, with all latencies times a factor."""
        answers = [
            [
                structs.replace(
                    answer,
                    ttft_s=answer.ttft_s * factor,
                    latency_s=answer.latency_s * factor,
                )
                for answer in row
            ]
            for row in self.answers
        ]
        return RecordedStream(self.tasks, self.models, answers)
