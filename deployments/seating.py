"""How a published version gets a role in the router: caught up with the journal, so that it has learned what all have.

The rows since it was made are folded into it in a thread, by the code that a restart uses; what is learned meanwhile
is recorded and played to it at the end. So each event counts once for it, too, and no request waits.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from math import inf
from types import MappingProxyType
from typing import Any

from deployments.journal import Journal
from deployments.memory import Memory
from deployments.rollout import Rollout
from deployments.snapshot import Snapshot
from policies.base import Policy, rebased
from policies.ledger import Event, Record
from policies.roles import Recorder
from policies.types import Decision


class Branch:
    """A journal as it is seen from one of its rows: a snapshot there, and the rows up to another. Only for reading.

    Args:
        journal: the whole.
        row: where it begins.
        snapshot: what was learned by then; None where the policies know already.
        up_to: its last row.
    """

    def __init__(self, journal: Journal, row: int, snapshot: Snapshot | None, up_to: float = inf):
        self._journal, self._row, self._snapshot, self._up_to = journal, row, snapshot, up_to
        self.salt = journal.salt

    def snapshot(self) -> tuple[int, Snapshot | None]:
        """As Journal's."""
        return self._row, self._snapshot

    @property
    def lineage(self) -> dict[str, Any]:
        """As Journal's, but for the successions after its last row."""
        whole = self._journal.lineage
        return whole | {"successions": [each for each in whole.get("successions", ()) if each["row"] <= self._up_to]}

    def pages(self, after: int = 0) -> Iterator[list[tuple[int, Event]]]:
        """As Journal's."""
        for page in self._journal.pages(after):
            if page[0][0] > self._up_to:
                return
            yield [item for item in page if item[0] <= self._up_to]

    def find_all(self, decision_ids: Collection[str], up_to: float = inf) -> dict[str, list[Event]]:
        """As Journal's."""
        return self._journal.find_all(decision_ids, min(up_to, self._up_to))


def fold(
    branch: Any,
    make: Callable[[], Policy],
    applied: Callable[[Event, Record], None] = lambda _, __: None,
    trust: Mapping[str, Any] = MappingProxyType({}),
) -> Memory:
    """The memory of a policy that learned from this branch, see there; blocking."""
    return Memory(branch, make, applied, trust=trust)


def row_of(snapshot: Snapshot, journal: Journal) -> int:
    """The last row of this journal from which a version has learned; 0 if it learned from another.

    Raises:
        ValueError: it does not say from what it learned, or the rows after that are no longer kept.
    """
    if not snapshot.journal:
        raise ValueError(f"version {snapshot.version} does not say from which rows it learned; choose a newer one")
    row = snapshot.row if snapshot.journal == journal.id else 0
    oldest = next(iter(journal.pages(after=row)), [(row + 1,)])[0][0]
    if oldest > row + 1:
        raise ValueError(
            f"version {snapshot.version} has learned up to row {row} of the journal, of which {oldest} is the oldest "
            "that is kept; choose a newer version, or raise journal_keep_days"
        )
    return row


def catch_up(journal: Journal, snapshot: Snapshot, make: Callable[[], Policy], up_to: float) -> Memory:
    """The memory, with its policy, of a version as it would be, had it learned on up to a row; blocking.

    Raises:
        ValueError: see row_of.
    """
    row = row_of(snapshot, journal)
    held, newest = snapshot.held if row else (), journal.snapshot()[1]
    # versions of before `trust` was published do not listen to those who are known to lie by now
    known = newest.trust if newest else {}
    trust = _recalled(snapshot.trust, known) if snapshot.trust else known
    start = replace(snapshot, held=held, trust=trust)
    if snapshot.journal != journal.id:  # learned elsewhere, by another clock
        first = _first_sequence(journal)
        start = replace(start, trust={}, state=rebased(start.state, start.sequence - first), sequence=first)
    return fold(Branch(journal, row, start, up_to), make)


def _recalled(trust: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """With the decisions that a version does not name (trust.state, brief), as far as the router has them now."""
    keys = {
        name: key if key["decisions"] else key | {"decisions": known.get("keys", {}).get(name, key)["decisions"]}
        for name, key in trust["keys"].items()
    }
    return {**trust, "keys": keys}


def _first_sequence(journal: Journal) -> int:
    """The number of the first decision that a journal has; its router may have begun with a version from elsewhere."""
    for page in journal.pages():
        for _, event in page:
            if isinstance(event, Decision):
                return event.sequence
    return 0


async def operate(memory: Memory, rollout: Rollout, verb: str, reason: str, **options: Any) -> None:
    """Change who has which role; returns when that is durable.

    Args:
        memory: of the router.
        rollout: likewise; its roles are the memory's policy.
        verb: seat (options: role, snapshot, share), vacate (role), promote, rollback, or published (version, of).
        reason: for the history.
        options: see there.

    Raises:
        ValueError: it cannot be done; the message says why.
    """
    if verb == "seat":
        await _seat(memory, rollout, reason, **options)
    elif verb == "vacate":
        if not rollout.vacate(options["role"], reason):
            raise ValueError(f"there is no {options['role']} to take off")
    elif verb == "promote":
        rollout.promote(reason)
    elif verb == "rollback":
        if not rollout.rollback(reason):
            raise ValueError("no promotion is being watched, so no predecessor is alive; promote the version you want")
    elif verb == "published":
        rollout.published(**options)
    else:
        raise ValueError(f"unknown verb '{verb}'; choose one of: seat, vacate, promote, rollback, published")
    await memory.save()


async def _seat(memory: Memory, rollout: Rollout, reason: str, role: str, snapshot: Snapshot, share: float) -> None:
    rollout.candidate(snapshot)  # refuses what does not fit before anything is read
    roles, recorder, row = rollout.roles, Recorder(), memory.journal.last_row
    roles.recorders.append(recorder)
    try:
        await memory.journal.flush()
        branch = await asyncio.to_thread(catch_up, memory.journal, snapshot, lambda: rollout.candidate(snapshot), row)
    finally:
        roles.recorders.remove(recorder)
    if rollout.roles is not roles:
        raise ValueError("the settings changed meanwhile; try again")
    recorder.play(branch.policy)
    branch.policy.advance(memory.sequence)
    rollout.seat(role, branch.policy, snapshot, share, reason)
