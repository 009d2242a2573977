"""The router's part of privacy: erases a person's rows without a change of what was learned, and exports them.

The order of an erasure loses nothing: the decisions are removed from memory, a snapshot with everything learned becomes
durable, and only then the rows up to that snapshot are erased. The tracker deletes the traces in MLflow, and tries
again while MLflow is away.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection

import msgspec
import numpy as np

from deployments.journal.codec import decode
from deployments.journal.journal import Journal
from deployments.journal.personal_data import Found, Person
from deployments.privacy.records import Erasure, ErasureState
from policies.events import Decision, Feedback, Outcome

METADATA = "erasures"  # name of the erasures in the journal's metadata
MAX_KEPT = 100  # latest erasures that are over
ROUNDS = 10  # of one erasure: outcomes and scores of the decisions may arrive meanwhile
log = logging.getLogger(__name__)


class PrivacyService:
    """The erasures and exports of one router.

    Args:
        journal: the router's journal.
        forget: removes decisions from everything in memory that names them, and other decisions from the decision
            records alone, because a score of theirs is erased; what was learned stays.
        save: writes a snapshot and returns its row when it is durable.
        digest: the digest of an idempotent request with a score.
        trace_id: id of the trace of a decision in MLflow.
        traced: whether there is an MLflow whose traces must be deleted.
    """

    def __init__(
        self,
        journal: Journal,
        forget: Callable[[Collection[str], Collection[str]], None],
        save: Callable[[], Awaitable[int]],
        digest: Callable[[Feedback], str],
        trace_id: Callable[[str], str],
        traced: Callable[[], bool],
    ):
        self._journal = journal
        self._forget = forget
        self._save = save
        self._digest = digest
        self._trace_id = trace_id
        self._traced = traced
        self._erasing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Erasure]] = set()
        stored = journal.metadata(METADATA)
        kept = msgspec.msgpack.decode(stored, type=list[Erasure]) if stored else []
        self._erasures = {erasure.id: _interrupted(erasure) for erasure in kept}

    def erasures(self) -> list[Erasure]:
        """The latest erasures, oldest first."""
        return list(self._erasures.values())

    async def erase(self, person: Person) -> Erasure:
        """Erase everything that is stored of a person; it goes on if the caller no longer waits.

        Returns:
            The erasure, when no row of the person is left in the journal.
        """
        erasure = Erasure(
            secrets.token_hex(8), time.time(), "key" if person.key else "user"
        )
        self._put(erasure)
        task = asyncio.ensure_future(self._run(erasure, person))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _run(self, erasure: Erasure, person: Person) -> Erasure:
        try:
            async with self._erasing:
                erasure = await self._erase(erasure, person)
        except Exception:
            self._put(msgspec.structs.replace(erasure, state=ErasureState.INTERRUPTED))
            raise
        log.info(
            "erased %d decisions and %d scores of a %s",
            erasure.decisions,
            erasure.scores,
            erasure.whose,
        )
        return erasure

    async def _erase(self, erasure: Erasure, person: Person) -> Erasure:
        journal = self._journal
        personal = journal.personal_data
        await journal.flush()
        found = await asyncio.to_thread(personal.find, person)
        others = found.scores_for_others()
        digests = await asyncio.to_thread(self._digests, found)
        traces: tuple[str, ...] = ()
        if self._traced():
            traces = tuple(map(self._trace_id, sorted(found.decisions)))
        # stored before the rows are gone, which would no longer say which traces they had
        erasure = msgspec.structs.replace(
            erasure,
            decisions=len(found.decisions),
            scores=len(others),
            traces=traces,
        )
        self._put(erasure)
        for _ in range(ROUNDS if found else 0):
            self._forget(found.decisions, others)
            row = await self._save()
            await personal.erase(found, row, digests)
            # an outcome or a score may have arrived after the snapshot
            await journal.flush()
            left = await asyncio.to_thread(personal.with_rows, found.decisions)
            if not left:
                break
        else:
            if found:
                raise RuntimeError(f"{len(left)} decisions still get rows")
        # a reader may have looked up a decision meanwhile
        self._forget(found.decisions, others)
        await personal.compact()
        state = ErasureState.MLFLOW if erasure.traces else ErasureState.DONE
        erasure = msgspec.structs.replace(erasure, state=state)
        self._put(erasure)
        await journal.flush()
        return erasure

    def _digests(self, found: Found) -> set[str]:
        """Digests of the idempotent requests that gave scores of these rows."""
        scores = self._journal.personal_data.scores_of(found.decisions)
        return {self._digest(score) for score in (*scores, *found.scores.values())}

    async def traces_erased(self, erasure_id: str) -> None:
        """The tracker has deleted the traces of an erasure."""
        erasure = self._erasures.get(erasure_id)
        if erasure is None or not erasure.traces:
            return
        state = erasure.state
        if state is ErasureState.MLFLOW:
            state = ErasureState.DONE
        self._put(msgspec.structs.replace(erasure, traces=(), state=state))
        await self._journal.flush()
        await self._journal.personal_data.compact()

    def _put(self, erasure: Erasure) -> None:
        self._erasures[erasure.id] = erasure
        over = [e.id for e in self._erasures.values() if not e.traces]
        for erasure_id in over[:-MAX_KEPT]:
            del self._erasures[erasure_id]
        self._journal.put_metadata(
            METADATA, msgspec.msgpack.encode(list(self._erasures.values()))
        )

    # --- export -------------------------------------------------------------------------------------------------

    async def personal_ids(self, person: Person) -> tuple[list[str], list[str]]:
        """The ids of a person's decisions; and the scores that the person's key gave for others', as lines of JSON."""
        await self._journal.flush()
        found = await asyncio.to_thread(self._journal.personal_data.find, person)
        others = [
            _line({"score": score})
            for score in found.scores.values()
            if score.decision_id not in found.decisions
        ]
        return sorted(found.decisions), others

    async def personal_lines(self, decision_ids: list[str]) -> list[str]:
        """Everything that the journal has of these decisions: a line of JSON for each."""
        return await asyncio.to_thread(self._lines, decision_ids)

    def _lines(self, decision_ids: list[str]) -> list[str]:
        lines = {
            decision_id: dict[str, object](decision=None, outcome=None, scores=[])
            for decision_id in decision_ids
        }
        for kind, body in self._journal.personal_data.bodies_of(decision_ids):
            event = decode(kind, body)
            if isinstance(event, Decision):
                lines[event.id]["decision"] = event
            elif isinstance(event, Outcome):
                lines[event.decision_id]["outcome"] = event
            else:
                scores = lines[event.decision_id]["scores"]
                assert isinstance(scores, list)
                scores.append(event)
        # a second answer that was announced may never have been given
        return [_line(line) for line in lines.values() if any(line.values())]


def _interrupted(erasure: Erasure) -> Erasure:
    """An erasure as it stands after a restart."""
    if erasure.state is not ErasureState.RUNNING:
        return erasure
    return msgspec.structs.replace(erasure, state=ErasureState.INTERRUPTED)


def _line(content: object) -> str:
    return msgspec.json.encode(content, enc_hook=_as_list).decode()


def _as_list(value: object) -> list[float]:
    if isinstance(value, np.ndarray):
        numbers: list[float] = value.tolist()
        return numbers
    raise NotImplementedError(f"cannot export a {type(value).__name__}")
