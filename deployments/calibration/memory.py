"""Finds the answers of calibrations in the journal.

The id of a decision is derived from a time, the prompt, the size, its weights and the number of the attempt. So the
answers that exist are found by their ids, and an answer that is reported twice counts once. The times are those at
which a series of calibrations began (epochs): feedback for an older decision would be refused.
"""

import json
from collections.abc import Callable, Mapping, Sequence

from deployments.calibration.records import Prompt
from deployments.journal.ids import IdFactory
from policies.evaluation.size_comparison import SizeAnswer, answer_of
from policies.events import Record

ATTEMPTS = 5  # to answer a prompt; further calibrations do not ask again

Pair = tuple[str, str]  # key of a prompt, and name of a size


def is_complete(answer: SizeAnswer | None) -> bool:
    """Whether an answer needs no other attempt: it did not fail, and has a grade."""
    return answer is not None and not answer.failed and answer.score is not None


class AnswerMemory:
    """The answers in one journal.

    Args:
        ids: makes the ids of decisions.
        records: finds the records of decisions in the journal; blocking.
    """

    def __init__(
        self,
        ids: IdFactory,
        records: Callable[[Sequence[str]], dict[str, Record]],
    ):
        self._ids = ids
        self._records = records

    def key(self, prompt: Prompt) -> str:
        """Identifies a prompt with its way of grading; without the salt it says nothing of the text."""
        parts = [prompt.messages, prompt.reference, prompt.rule, prompt.max_tokens]
        return self._ids.hash(json.dumps(parts, ensure_ascii=False))

    def decision_id(
        self, epoch_s: float, pair: Pair, weights: Mapping[str, str], attempt: int
    ) -> str:
        """The id of an attempt.

        Args:
            epoch_s: the time that the id carries.
            pair: the prompt and the size.
            weights: by size, the digest of its weights.
            attempt: from 0.
        """
        key, name = pair
        text = f"{key}/{name}/{weights.get(name, '')}/{attempt}"
        return self._ids.derived_id(epoch_s, text)

    def find(
        self,
        keys: Sequence[str],
        names: Sequence[str],
        weights: Mapping[str, str],
        epochs: Sequence[float],
    ) -> tuple[dict[Pair, SizeAnswer], dict[Pair, int]]:
        """The best answer to each prompt by each size, and the number of attempts in the last epoch; blocking."""
        answers: dict[Pair, SizeAnswer] = {}
        attempts: dict[Pair, int] = {}
        missing = [(key, name) for key in keys for name in names]
        for attempt in range(ATTEMPTS):
            wanted = {
                self.decision_id(epoch_s, pair, weights, attempt): (pair, epoch_s)
                for pair in missing
                for epoch_s in epochs
            }
            records = self._records(list(wanted))
            tried = set()
            for decision_id, record in records.items():
                pair, epoch_s = wanted[decision_id]
                tried.add(pair)
                if epoch_s == epochs[-1]:
                    attempts[pair] = attempt + 1
                answer = answer_of(record, pair[0])
                if answer is not None and not is_complete(answers.get(pair)):
                    answers[pair] = answer
            missing = [
                pair
                for pair in missing
                if pair in tried and not is_complete(answers.get(pair))
            ]
            if not missing:
                break
        return answers, attempts
