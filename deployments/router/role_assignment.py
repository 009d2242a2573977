"""Assigns a role to a published policy version, after the version has learned everything that the champion has.

The version replays the journal rows written since it was published, in a thread, with the code that a restart uses.
Events that arrive meanwhile are buffered and applied at the end. So the version learns from each event exactly once,
and no request waits for it.

Going back to a version is the same without some of the scores (journal/forgotten.py). The decision records, the
reputation of keys and all that scores change beside the policy are derived again, too. What was known before is stored,
so that a rollback can restore it exactly.
"""

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import replace

from msgspec import structs

from deployments.journal.codec import encode
from deployments.journal.forgotten import ForgottenScores, Mark, Numbered
from deployments.journal.journal import Journal
from deployments.journal.rollout_state import AUTOMATIC
from deployments.journal.snapshot import SNAPSHOT, Snapshot
from deployments.router.learner import Learner
from deployments.router.projections import RouterProjections, ScoreProjections
from deployments.router.replay import (
    JournalView,
    catch_up,
    replay,
    require_unforgotten,
    row_of,
)
from deployments.router.rollout import Rollout
from policies.base import LearningBuffer
from policies.feedback.reputation import with_latest, without_decisions
from policies.rollout.roles import CHAMPION, state_of

BEFORE = "before_restore"  # name in the journal's metadata of what was known before the last restore
# events that arrived during a replay and are applied at once, while requests wait
FEW_EVENTS = 200
log = logging.getLogger(__name__)


async def assign_role(
    learner: Learner,
    rollout: Rollout,
    role: str,
    snapshot: Snapshot,
    share: float,
    reason: str,
    by: str = AUTOMATIC,
) -> None:
    """Make a version the challenger or the shadow.

    Args:
        learner: the router's learner; its policy is `rollout.roles`.
        rollout: the router's rollout.
        role: challenger or shadow.
        snapshot: the version.
        share: share of the traffic for a challenger, in [0, 1].
        reason: stored in the history.
        by: as in RoleChange.

    Raises:
        ValueError: the version does not fit, or cannot learn from the journal; the message says why.
    """
    rollout.build_policy(snapshot)  # refuses an unsuitable version before the replay
    roles = rollout.roles
    buffer = LearningBuffer()
    row = learner.journal.last_row
    roles.buffers.append(buffer)
    try:
        await learner.journal.flush()
        caught_up = await asyncio.to_thread(
            catch_up,
            learner.journal,
            snapshot,
            lambda: rollout.build_policy(snapshot),
            row,
        )
    finally:
        roles.buffers.remove(buffer)
    if rollout.roles is not roles:
        raise ValueError("the settings changed meanwhile; try again")
    buffer.play(caught_up.policy)
    caught_up.policy.advance(learner.sequence, learner.records.scored)
    rollout.assign_role(role, caught_up.policy, snapshot, share, reason, by)


# --- going back -------------------------------------------------------------------------------------------------------


async def check_restore(
    learner: Learner, rollout: Rollout, version: Snapshot, mark: Mark
) -> Snapshot:
    """Check that the router can go back to a version, and complete what the version leaves out.

    Args:
        learner: the router's learner.
        rollout: the router's rollout.
        version: the version.
        mark: the scores to forget.

    Returns:
        The version with the latest decisions of each API key.

    Raises:
        ValueError: the version does not fit, the journal no longer has the rows since then, or the version has learned
            from the scores itself; the message says why and what would help.
    """
    journal = learner.journal
    rollout.build_policy(version, champion=True)
    if version.journal != journal.id:
        raise ValueError(
            f"version {version.version} has learned from another journal; choose one of this journal"
        )
    if version.totals is None:
        raise ValueError(
            f"version {version.version} does not hold the scoring rates of that time; choose a newer one"
        )
    await journal.flush()
    return await asyncio.to_thread(_completed, journal, version, mark)


def _completed(journal: Journal, version: Snapshot, mark: Mark) -> Snapshot:
    row = row_of(version, journal)
    require_unforgotten(version.version, row, journal, ForgottenScores({row + 1: mark}))
    counted = (
        score
        for number, score in journal.scores(row)
        if not journal.forgotten.covers(number, score)
    )
    return replace(version, trust=with_latest(version.trust, counted))


async def restore_version(
    learner: Learner,
    rollout: Rollout,
    projections: RouterProjections,
    version: Snapshot,
    mark: Mark,
    by: str = AUTOMATIC,
) -> None:
    """Make a version the champion as if the marked scores had never arrived.

    Args:
        learner: the router's learner; its policy is `rollout.roles`.
        rollout: the router's rollout.
        projections: the router's projections.
        version: the version.
        mark: the scores to forget; those that arrive from now on count.
        by: see RoleChange.

    Raises:
        ValueError: see check_restore.
    """
    if not learner.consistent:
        raise ValueError(
            "the router lacks events of its journal since a replay failed; reload the settings first"
        )
    journal = learner.journal
    roles = rollout.roles
    mark = structs.replace(mark, up_to=journal.last_row)
    version = await check_restore(learner, rollout, version, mark)
    forgotten = journal.forgotten.with_mark(journal.last_row + 1, mark)
    successor, derived = await _derive(learner, rollout, version, forgotten)
    # no await from here on: the router changes from one state to the other between two events
    if rollout.roles is not roles:
        raise ValueError("the settings changed meanwhile; try again")
    before = learner.snapshot()
    row = journal.last_row + 1
    rollout.restore_champion(successor.policy, version, row, mark.reason, by)
    journal.put_mark(mark)
    journal.put_metadata(BEFORE, encode(before))
    _take_over(learner, projections, successor, derived, version)


async def undo_restore(
    learner: Learner, rollout: Rollout, projections: RouterProjections
) -> None:
    """Let the scores count again that a version had forgotten which was rolled back since."""
    journal = learner.journal
    row = rollout.undo_row
    roles = rollout.roles
    mark = Mark(cancels=row, time_s=time.time(), reason="rolled back")
    await journal.flush()
    stored = await asyncio.to_thread(journal.metadata, BEFORE)
    before = SNAPSHOT.decode(stored) if stored else None
    if before is not None and rollout.is_champions(before):
        before = replace(before, state=state_of(before.state, CHAMPION))
        forgotten = journal.forgotten.with_mark(journal.last_row + 1, mark)
        successor, derived = await _derive(learner, rollout, before, forgotten)
        if rollout.roles is not roles or rollout.undo_row != row:
            return  # the next maintenance tries again
        rollout.replace_champion(successor.policy)
        _take_over(learner, projections, successor, derived, before)
    else:
        log.warning(
            "the state before the restore is not there; only the marks are withdrawn"
        )
    rollout.undo_row = 0
    journal.put_mark(mark)
    journal.put_metadata(BEFORE, b"")
    learner.put_snapshot()


def forget_decisions(learner: Learner, rollout: Rollout, gone: Collection[str]) -> None:
    """Remove these decisions from all that names them, in memory and in the stored state before a restore."""
    learner.forget_decisions(gone)
    rollout.forget_decisions(gone)
    stored = learner.journal.metadata(BEFORE)
    if stored:
        before = SNAPSHOT.decode(stored)
        seen = {"rewarded": [d for d in before.rollout["rewarded"] if d not in gone]}
        rewards = before.rollout.get("rewards", {})
        counted = [d for d in rewards.get("counted", ()) if d not in gone]
        before = replace(
            before,
            held=tuple(d for d in before.held if d not in gone),
            trust=without_decisions(before.trust, gone),
            rollout=before.rollout | seen | {"rewards": rewards | {"counted": counted}},
        )
        learner.journal.put_metadata(BEFORE, encode(before))


def _take_over(
    learner: Learner,
    projections: RouterProjections,
    successor: Learner,
    derived: ScoreProjections,
    snapshot: Snapshot,
) -> None:
    projections.take_over(derived, snapshot)
    learner.take_over(successor)
    learner.put_snapshot()


async def _derive(
    learner: Learner, rollout: Rollout, base: Snapshot, forgotten: ForgottenScores
) -> tuple[Learner, ScoreProjections]:
    """Replay the rows after a snapshot without some scores, and the events that arrive meanwhile.

    Returns:
        A learner that has learned everything that the journal has at this moment, and what it derived beside.
    """
    journal = learner.journal
    tap: list[Numbered] = []
    journal.taps.append(tap)
    try:
        view = JournalView(journal, base.row, base, journal.last_row, forgotten)
        await journal.flush()
        derived = ScoreProjections()
        successor = await asyncio.to_thread(
            replay, view, lambda: rollout.build_policy(base, champion=True), derived
        )
        while len(tap) > FEW_EVENTS:
            arrived = list(tap)
            tap.clear()
            await journal.flush()
            await asyncio.to_thread(successor.absorb, arrived)
    finally:
        journal.taps = [other for other in journal.taps if other is not tap]
    successor.absorb(tap)
    for change in learner.revisions.changes[len(successor.revisions.changes) :]:
        successor.policy.discount(change.arm, change.keep)
    successor.sequence = learner.sequence
    successor.policy.advance(learner.sequence, successor.records.scored)
    return successor, derived
