"""Forgotten scores: marks in the journal by which scores count no more, although their rows stay.

A mark is written when an operator goes back to a policy version (router/role_assignment.py). Everything that reads
events from the journal leaves the marked scores out: a restart, a replay, an evaluation, the training of the forecasts.
A mark covers the rows before it only. A score that is sent again later is therefore a new one.

Marks are in a table of their own, because release 0.1.0 fails at an event of a kind that it does not know. The numbers
of marks and of events are one sequence, which says what was written before a mark.
"""

from collections.abc import Iterable, Mapping

import msgspec

from policies.events import Event, Feedback

Numbered = tuple[int, Event]  # an event with the number of its row


class Mark(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Scores that count no more; or, with `cancels`, the withdrawal of an earlier mark.

    since_s: scores that arrived at the gateway at this time or later (Feedback.time_s), in seconds since the epoch.
    up_to: the last row that the mark covers.
    key: only scores that the API key of this name gave; None for those of all keys.
    version: the policy version to which an operator went back.
    reason: why, and by whom.
    time_s: time of the mark.
    cancels: row of a mark that has no effect any more; 0 for none.
    """

    since_s: float = 0.0
    up_to: int = 0
    key: str | None = None
    version: int = 0
    reason: str = ""
    time_s: float = 0.0
    cancels: int = 0

    def covers(self, row: int, event: Event) -> bool:
        """Whether this row is a score that counts no more."""
        return (
            isinstance(event, Feedback)
            and row <= self.up_to
            and event.time_s >= self.since_s
            and (self.key is None or event.is_of_key(self.key))
        )


class ForgottenScores:
    """The marks of one journal.

    Args:
        marks: by the numbers of their rows.
    """

    def __init__(self, marks: Mapping[int, Mark] | None = None):
        self._marks = dict(marks or {})
        self._active = self._find_active()

    def _find_active(self) -> dict[int, Mark]:
        """The marks that have an effect, by the numbers of their rows."""
        cancelled = {mark.cancels for mark in self._marks.values()}
        return {
            row: mark
            for row, mark in self._marks.items()
            if row not in cancelled and mark.up_to > 0
        }

    def add(self, row: int, mark: Mark) -> None:
        """Add a mark, or withdraw the one that it cancels."""
        self._marks = {**self._marks, row: mark}
        self._active = self._find_active()

    def with_mark(self, row: int, mark: Mark) -> "ForgottenScores":
        """These marks and another one."""
        return ForgottenScores({**self._marks, row: mark})

    def after(self, row: int) -> "ForgottenScores":
        """The marks that have an effect and were made after this row."""
        return ForgottenScores(
            {number: mark for number, mark in self._active.items() if number > row}
        )

    def covers(self, row: int, event: Event) -> bool:
        """Whether this row is a score that counts no more."""
        return any(mark.covers(row, event) for mark in self._active.values())

    def keep(self, events: Iterable[Numbered]) -> list[Numbered]:
        """The events that count."""
        active = list(self._active.values())
        if not active:
            return list(events)
        return [
            (row, event)
            for row, event in events
            if not any(mark.covers(row, event) for mark in active)
        ]

    def __bool__(self) -> bool:
        """Whether any mark has an effect."""
        return bool(self._active)
