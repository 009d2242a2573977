"""What operators do with policy versions: look at them, evaluate, try, promote, roll back; a part of the tracker.

The router is the one that knows who has which role; the registry's aliases follow it. So a rollback works without
MLflow, and a promotion is refused before anything happens if the log does not show that it is one.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from deployments.evaluation import Evaluator
from deployments.settings import GatewaySettings
from deployments.snapshot import Snapshot
from deployments.versions import Registry, UnknownVersionError
from policies.roles import CHALLENGER, CHAMPION, ROLES


class RefusedError(ValueError):
    """What was asked for is not done; the message says why and what would help."""


class Promotions:
    """The verbs, each blocking for seconds at most; nothing in here is on a request's way.

    Args:
        settings: of the gateway.
        registry: where the versions are.
        router: handle of the router actor.
        run_id: of the run to which versions and reports belong.
    """

    def __init__(self, settings: GatewaySettings, registry: Registry, router: Any, run_id: str):
        self._settings, self._registry, self._router, self._run_id = settings, registry, router, run_id
        self._evaluator = Evaluator(settings)
        self._tagged: set[int] = set()  # versions that were rolled back, and say so
        self._lock = asyncio.Lock()  # one change, or one evaluation, at a time

    async def publish(self, policy: str = "", options: Mapping[str, Any] | None = None, by: str = "") -> int:
        """Register the champion as it is now; or another policy, that learns from the whole journal first."""
        champion: Snapshot = await self._router.checkpoint.remote()
        tags = {"by": by} if by else {}
        if not policy and options is None:
            version = await asyncio.to_thread(self._registry.publish, champion, self._run_id, tags)
            await self._change("published", "", version=version, of=champion.version)
            await self.mirror()
            return version
        name = policy or champion.policy
        made = await asyncio.to_thread(self._evaluator.learned, name, dict(options or {}), champion)
        return await asyncio.to_thread(self._registry.publish, made, self._run_id, tags)

    async def list(self) -> list[dict[str, Any]]:
        """All versions, the newest first."""
        return await asyncio.to_thread(self._registry.list)

    async def show(self, version: int) -> dict[str, Any]:
        """One version, with the newest report on it."""
        return await asyncio.to_thread(self._registry.show, version)

    async def evaluate(self, version: int) -> dict[str, Any]:
        """Judge a version beside the champion on what was decided since both were made; attached to the version.

        Returns:
            The report of gate.may_promote, with `version`, `champion_version`, `rows` and `evaluated`.
        """
        async with self._lock:
            return await self._evaluate(version)

    async def diff(self, version: int, other: int = 0) -> dict[str, Any]:
        """What two versions (by default the champion is the other) differ in, and how differently they decide."""
        numbers = (version, other or await self._champion())
        mine, theirs = [await asyncio.to_thread(self._registry.load, number) for number in numbers]
        return await asyncio.to_thread(self._evaluator.diff, mine, theirs)

    async def promote(
        self, version: int, to: str = CHAMPION, share: float | None = None, override: str = "", by: str = ""
    ) -> dict[str, Any]:
        """Give a version a role.

        Args:
            version: which.
            to: champion asks the gate first; challenger and shadow do not.
            share: of the traffic, for a challenger; by default the settings'.
            override: the reason for which the gate is passed by, recorded on the version.
            by: who asks.

        Raises:
            RefusedError: the gate does not let it through, or it does not fit.
        """
        if to not in ROLES:
            raise RefusedError(f"unknown role '{to}'; choose one of: {', '.join(ROLES)}")
        async with self._lock:
            summary = (await self._router.summary.remote())["rollout"]
            seats, report = summary["roles"], None
            if to == CHAMPION:
                report = await self._judged(version, bool(override))
                if not report["promote"] and not override:
                    raise RefusedError(f"{report['reason']}. To promote it all the same, say why: override_gate")
                await self.publish(by=by)  # what the predecessor knows now is kept as a version, too
            reason = f"by {by or 'an operator'}" + (f", overriding the gate: {override}" if override else "")
            if to != CHAMPION or seats.get(CHALLENGER, {}).get("version") != version:
                role = CHALLENGER if to == CHAMPION else to
                snapshot = await asyncio.to_thread(self._registry.load, version)
                given = self._settings.rollout.share if share is None else share
                summary = await self._change("seat", reason, role=role, snapshot=snapshot, share=given)
            if to == CHAMPION:
                summary = await self._change("promote", reason)
            noted = {f"{to}_since": _now(), f"{to}_by": by} | ({"override_reason": override} if override else {})
            await asyncio.to_thread(self._registry.tag, version, noted)
            await self.mirror()
        return {**summary, "evaluation": report}

    async def _change(self, verb: str, reason: str, **options: Any) -> dict[str, Any]:
        try:
            summary: dict[str, Any] = await self._router.rollout.remote(verb, reason, options)
            return summary
        except ValueError as error:  # Ray's copy of it is a ValueError, too
            raise RefusedError(str(getattr(error, "cause", error))) from None

    async def mirror(self) -> None:
        """Have the registry's aliases, and its tags on what was rolled back, follow the router."""
        summary = (await self._router.summary.remote())["rollout"]
        wanted = {role: int(seat["version"]) for role, seat in summary["roles"].items()}
        await asyncio.to_thread(self._registry.set_aliases, wanted)
        for change in summary["history"]:
            if (loser := change.get("loser")) and loser not in self._tagged:
                with suppress(UnknownVersionError):  # somebody tidied up
                    await asyncio.to_thread(self._registry.tag, loser, {"rolled_back": change["reason"]})
                self._tagged.add(loser)

    async def _evaluate(self, version: int) -> dict[str, Any]:
        champion = await self._champion()
        if version == champion:
            raise RefusedError(f"version {version} is the champion")
        mine = await asyncio.to_thread(self._registry.load, version)
        # the champion goes on learning and is published again and again: take it as it was when the other was made
        before = await asyncio.to_thread(self._registry.ancestor, champion, mine.row)
        theirs = await asyncio.to_thread(self._registry.load, before)
        report = await asyncio.to_thread(self._evaluator.evaluate, mine, theirs)
        report |= {"version": version, "champion_version": before, "evaluated": _now()}
        await asyncio.to_thread(self._registry.attach, version, report)
        return report

    async def _judged(self, version: int, overridden: bool) -> dict[str, Any]:
        """The report; where the gate is passed by anyway, also one that says why there can be none."""
        try:
            return await self._evaluate(version)
        except ValueError as error:
            if not overridden:
                raise
            return {"promote": False, "reason": f"it could not be evaluated: {error}", "version": version}

    async def _champion(self) -> int:
        version = (await self._router.summary.remote())["rollout"]["roles"][CHAMPION]["version"]
        if not version:
            raise RefusedError("no version of the champion is registered yet; publish one first")
        return int(version)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
