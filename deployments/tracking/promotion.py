"""The tracker's operations on policy versions: list, show, compare, evaluate, publish and promote.

The router holds the roles; the registry's aliases follow it. Therefore a rollback works without MLflow. A promotion
to champion is refused, before anything changes, unless the log proves that the version is better.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress

from deployments.errors import GateRefusedError, UnknownVersionError
from deployments.journal.rollout_state import AUTOMATIC, OPERATOR
from deployments.router.interface import RolloutSummary, RouterHandle
from deployments.settings import GatewaySettings
from deployments.tracking.deciding_model import context_of
from deployments.tracking.evaluation import Evaluator
from deployments.tracking.model_registry import PolicyRegistry
from policies.rollout.roles import CHALLENGER, CHAMPION, ROLES

log = logging.getLogger(__name__)


class RefusedError(ValueError):
    """An operation is refused; the message says why and what would help."""

    code = "refused"


class AncestorError(RefusedError):
    """The version is an earlier state of the champion."""

    code = "ancestor_of_champion"

    def __init__(self, version: int, champion: int):
        super().__init__(
            f"version {version} is an earlier state of the champion, version {champion}; it cannot be better on its "
            "own log. To go back to what was known then, use `versions restore VERSION --forget SINCE` "
            f"(POST /v1/router/versions/{version}/restore)"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # an actor's error is pickled on its way to the gateway
        return RefusedError, self.args, {"code": self.code}


class PromotionService:
    """Carries out what operators ask of policy versions. Calls take seconds and are not part of any request.

    Args:
        settings: the gateway's settings.
        registry: the registry of policy versions.
        router: handle of the router actor.
        run_id: the MLflow run to which versions and reports belong.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        registry: PolicyRegistry,
        router: RouterHandle,
        run_id: str,
    ):
        self._settings = settings
        self._registry = registry
        self._router = router
        self._run_id = run_id
        self._evaluator = Evaluator(settings)
        # versions that were rolled back and carry the tag that says so
        self._tagged: set[int] = set()
        # serialises promotions and evaluations
        self._lock = asyncio.Lock()
        # serialises changes of the aliases: the tracker's cycle and the operators' commands make them
        self._aliases_lock = asyncio.Lock()

    async def publish(
        self,
        policy: str = "",
        options: Mapping[str, object] | None = None,
        by: str = "",
    ) -> int:
        """Register the current champion, or another policy trained on the whole journal; returns the version.

        Args:
            policy: name of the policy to train; by default the champion's.
            options: options of that policy. With neither, the champion is registered as it is.
            by: name of the operator.
        """
        champion = await self._router.checkpoint.remote()
        tags = {"by": by} if by else {}
        context = context_of(self._settings, await self._router.tuning.remote())
        if not policy and options is None:
            version = await asyncio.to_thread(
                self._registry.publish, champion, self._run_id, tags, context
            )
            await self._change_roles(
                self._router.record_published.remote(
                    version, champion.version, by or AUTOMATIC
                )
            )
            await self.sync_aliases()
            return version
        trained = await asyncio.to_thread(
            self._evaluator.train,
            policy or champion.policy,
            dict(options or {}),
            champion,
        )
        version = await asyncio.to_thread(
            self._registry.publish, trained, self._run_id, tags, context
        )
        await self._change_roles(
            self._router.record_published.remote(version, None, by or AUTOMATIC)
        )
        return version

    async def prune(self) -> None:
        """Remove the oldest versions from the registry; see GatewaySettings.keep_versions."""
        rollout = (await self._router.summary.remote()).rollout
        in_use = {held.version for held in rollout.roles.values()}
        in_use |= {change.version for change in rollout.history}
        removed = await asyncio.to_thread(
            self._registry.prune, self._settings.keep_versions, in_use
        )
        if removed:
            log.info(
                "removed the policy versions %s, beyond the newest %d",
                ", ".join(map(str, removed)),
                self._settings.keep_versions,
            )

    async def list_versions(self) -> list[dict[str, object]]:
        """All versions, newest first."""
        return await asyncio.to_thread(self._registry.list)

    async def show_version(self, version: int) -> dict[str, object]:
        """One version with its newest evaluation report."""
        return await asyncio.to_thread(self._registry.show, version)

    async def evaluate(self, version: int) -> dict[str, object]:
        """Compare a version with the champion on the decisions made since both exist, and attach the report to it.

        Returns:
            The report of promotion_gate.may_promote, with `version`, `champion_version`, `rows` and `evaluated`.
        """
        async with self._lock:
            return await self._evaluate(version)

    async def diff(self, version: int, other: int = 0) -> dict[str, object]:
        """How two versions differ, and how differently they decide; by default `other` is the champion."""
        other = other or await self._champion_version()
        one = await asyncio.to_thread(self._registry.load, version)
        two = await asyncio.to_thread(self._registry.load, other)
        return await asyncio.to_thread(self._evaluator.diff, one, two)

    async def promote(
        self,
        version: int,
        to: str = CHAMPION,
        share: float | None = None,
        override: str = "",
        by: str = "",
    ) -> dict[str, object]:
        """Give a version a role.

        Args:
            version: its number.
            to: the role. Only a promotion to champion must pass the gate.
            share: the challenger's share of the traffic; by default that of the settings.
            override: reason for overriding the gate; recorded on the version.
            by: name of the operator.

        Raises:
            GateRefusedError: the gate refuses the version.
            RefusedError: the router cannot run it.
        """
        if to not in ROLES:
            raise RefusedError(
                f"unknown role '{to}'; choose one of: {', '.join(ROLES)}"
            )
        who = by or OPERATOR
        async with self._lock:
            rollout = (await self._router.summary.remote()).rollout
            challenger = rollout.roles.get(CHALLENGER)
            _require_no_first_day(rollout)
            report = None
            if to == CHAMPION:
                champion = rollout.roles[CHAMPION].version
                if champion:
                    await self._require_no_ancestor(version, champion)
                report = await self._gate_report(version, bool(override))
                if not report["promote"] and not override:
                    raise GateRefusedError(
                        f"{report['reason']}. To promote it all the same, say why: override_gate"
                    )
                # register what the predecessor has learned by now
                await self.publish(by=who)
            reason = str(report["reason"]) if report is not None else ""
            if override:
                reason = f"overriding the gate: {override}"
            if to != CHAMPION or challenger is None or challenger.version != version:
                role = CHALLENGER if to == CHAMPION else to
                snapshot = await asyncio.to_thread(self._registry.load, version)
                if share is None:
                    share = self._settings.rollout.challenger_share
                rollout = await self._change_roles(
                    self._router.assign_role.remote(role, snapshot, share, reason, who)
                )
            if to == CHAMPION:
                rollout = await self._change_roles(
                    self._router.promote.remote(reason, who)
                )
            tags = {f"{to}_since": _now(), f"{to}_by": by}
            if override:
                tags["override_reason"] = override
            await asyncio.to_thread(self._registry.tag, version, tags)
            await self.sync_aliases()
        return {**rollout.plain(), "evaluation": report}

    async def restore(
        self, version: int, since_s: float, key: str | None, reason: str, by: str = ""
    ) -> dict[str, object]:
        """Make a version the champion, as if some of the scores that arrived since then never had.

        The former champion is registered first and stays as the watched predecessor; so is the result afterwards.

        Args:
            version: its number.
            since_s: scores that arrived at this time or later are forgotten, in seconds since the epoch.
            key: forget only scores that the API key of this name gave; None for those of all keys.
            reason: recorded.
            by: name of the operator.

        Raises:
            RefusedError: the router cannot go back to the version; nothing was changed.
        """
        async with self._lock:
            rollout = (await self._router.summary.remote()).rollout
            _require_no_first_day(rollout)
            snapshot = await asyncio.to_thread(self._registry.load, version)
            whose = "all keys" if key is None else f"the key '{key}'"
            text = f"version {version} without the scores of {whose} since {_clock(since_s)}"
            if reason:
                text += f"; {reason}"
            call = self._router.restore_version.remote
            who = by or OPERATOR
            await self._change_roles(call(snapshot, since_s, key, text, True, who))
            await self.publish(by=who)
            rollout = await self._change_roles(
                call(snapshot, since_s, key, text, False, who)
            )
            restored = await self.publish(by=who)
            tags = {"restored_from": version, "forgotten": text}
            await asyncio.to_thread(self._registry.tag, restored, tags)
            rollout = (await self._router.summary.remote()).rollout
        return {**rollout.plain(), "version": restored}

    async def _require_no_ancestor(self, version: int, champion: int) -> None:
        if version != champion and await asyncio.to_thread(
            self._registry.is_ancestor, version, champion
        ):
            raise AncestorError(version, champion)

    async def _change_roles(self, call: Awaitable[RolloutSummary]) -> RolloutSummary:
        """Await a call of the router that changes roles, and turn its refusal into a RefusedError."""
        try:
            return await call
        except ValueError as error:  # Ray raises a copy that is a ValueError, too
            raise RefusedError(str(getattr(error, "cause", error))) from None

    async def sync_aliases(self) -> None:
        """Set the registry's aliases to the router's roles, and tag the versions that were rolled back."""
        async with self._aliases_lock:
            rollout = (await self._router.summary.remote()).rollout
            aliases = {role: held.version for role, held in rollout.roles.items()}
            await asyncio.to_thread(self._registry.set_aliases, aliases)
            for change in rollout.history:
                loser = change.loser
                if not loser or loser in self._tagged:
                    continue
                with suppress(UnknownVersionError):  # an operator has deleted it
                    await asyncio.to_thread(
                        self._registry.tag, loser, {"rolled_back": change.account}
                    )
                self._tagged.add(loser)

    async def _evaluate(self, version: int) -> dict[str, object]:
        champion = await self._champion_version()
        if version == champion:
            raise RefusedError(f"version {version} is the champion")
        await self._require_no_ancestor(version, champion)
        challenger = await asyncio.to_thread(self._registry.load, version)
        # The champion keeps learning and is published repeatedly. Compare with its version that
        # had learned no more than the challenger when the challenger was made.
        opponent = await asyncio.to_thread(
            self._registry.ancestor, champion, challenger.row
        )
        predecessor = await asyncio.to_thread(self._registry.load, opponent)
        report = await asyncio.to_thread(
            self._evaluator.evaluate, challenger, predecessor
        )
        report["version"] = version
        report["champion_version"] = opponent
        report["evaluated"] = _now()
        await asyncio.to_thread(self._registry.attach_report, version, report)
        return report

    async def _gate_report(self, version: int, overridden: bool) -> dict[str, object]:
        """The evaluation report. If the gate is overridden, a failed evaluation is reported and not raised."""
        try:
            return await self._evaluate(version)
        except ValueError as error:
            if not overridden:
                raise
            return {
                "promote": False,
                "reason": f"it could not be evaluated: {error}",
                "version": version,
            }

    async def _champion_version(self) -> int:
        rollout = (await self._router.summary.remote()).rollout
        _require_no_first_day(rollout)
        version = rollout.roles[CHAMPION].version
        if not version:
            raise RefusedError(
                "no version of the champion is registered yet; publish one first"
            )
        return version


def _require_no_first_day(rollout: RolloutSummary) -> None:
    """Refuse an operation on versions while the champion is the team's rule, or the rule is its control."""
    day = rollout.first_day
    if day is not None and day.next_stage:
        raise RefusedError(
            f"the first day is not over (stage: {day.stage}): begin its next stage or roll back first; `status` "
            "compares the policy with the rule"
        )


def _now() -> str:
    return _clock(time.time())


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))
