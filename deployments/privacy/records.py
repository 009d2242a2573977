"""The records of erasures and exports, and the router's methods for them."""

from enum import StrEnum
from typing import Protocol

import msgspec

from deployments.journal.personal_data import Person
from deployments.remote import Method


class ErasureState(StrEnum):
    """How far an erasure has come.

    RUNNING: the journal is being erased. MLFLOW: it is erased, and MLflow's traces are not yet. INTERRUPTED: the router
    ended before the journal was erased; the erasure must be asked for again, because no name is stored with it.
    """

    RUNNING = "running"
    MLFLOW = "waiting for MLflow"
    DONE = "done"
    INTERRUPTED = "interrupted"


class Erasure(msgspec.Struct, frozen=True):
    """One erasure. It does not say whose data were erased.

    id: of the erasure.
    time_s: of its start, in seconds since the epoch.
    whose: "key" or "user".
    state: see ErasureState.
    decisions, scores: numbers of erased decisions, and of erased scores of the key for other decisions.
    traces: ids of the traces that MLflow has not deleted yet.
    """

    id: str
    time_s: float
    whose: str
    state: ErasureState = ErasureState.RUNNING
    decisions: int = 0
    scores: int = 0
    traces: tuple[str, ...] = ()

    def plain(self) -> dict[str, object]:
        """Plain data for operators; the traces as their number."""
        plain: dict[str, object] = msgspec.to_builtins(self)
        return plain | {"traces": len(self.traces)}


class PrivacyHandle(Protocol):
    """The methods of the router actor for erasures and exports (router/actor.py)."""

    erase: Method[[Person], Erasure]
    erasures: Method[[], list[Erasure]]
    personal_ids: Method[[Person], tuple[list[str], list[str]]]
    personal_lines: Method[[list[str]], list[str]]
    traces_erased: Method[[str], None]
