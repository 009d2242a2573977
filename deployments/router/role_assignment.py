"""Assigns a role to a published policy version, after the version has learned everything that the champion has.

The version replays the journal rows written since it was published, in a thread, with the code that a restart uses.
Events that arrive meanwhile are buffered and applied at the end. So the version learns from each event exactly once,
and no request waits for it.
"""

import asyncio

from deployments.journal.rollout_state import AUTOMATIC
from deployments.journal.snapshot import Snapshot
from deployments.router.learner import Learner
from deployments.router.replay import catch_up
from deployments.router.rollout import Rollout
from policies.base import LearningBuffer


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
