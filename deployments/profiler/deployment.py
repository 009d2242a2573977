"""The profiler deployment: turns a batch of texts into task profiles."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from deployments import runtime
from deployments.observability import logs
from deployments.profiler.reader import ProfileItem, TextProfiler
from deployments.remote import Method
from deployments.settings import GatewaySettings
from policies.profiling.forecast import Forecaster
from policies.types import TaskProfile

REFRESH_EVERY_S = 2.0
REFRESH_TIMEOUT_S = 5.0
log = logging.getLogger(__name__)


class ProfilerHandle(Protocol):
    """A handle of Ray Serve for the profiler."""

    profile: Method[[list[ProfileItem]], list[TaskProfile]]


class ForecastSource(Protocol):
    """What the profiler needs of a handle of the router actor."""

    forecaster: Method[[int], Forecaster | None]


class Profiler:
    """Profiles texts and adds forecasts of the answers.

    The router learns the forecasts (policies/profiling/forecast.py). The profiler asks the router for a newer version
    every REFRESH_EVERY_S and replaces its own between two batches. Only long texts come here: an ingress profiles a
    short text itself, which is quicker than to send it.

    Args:
        settings: of the gateway.
        connect: gives a handle of the router actor.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        connect: Callable[[GatewaySettings], ForecastSource],
    ):
        runtime.bind_to_loopback()
        logs.configure("profiler")
        self._settings = settings
        self._connect = connect
        self._text_profiler = TextProfiler(settings.profiler)
        self._forecaster = Forecaster.prior(settings.arms())
        self._refreshing: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Start to refresh the forecasts.

        Serve calls this from the start on and every few seconds. The constructor cannot start the refresh, because it
        has no event loop yet.
        """
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._keep_fresh())

    async def _keep_fresh(self) -> None:
        router: ForecastSource | None = None
        while True:
            try:
                if router is None:
                    router = await asyncio.to_thread(self._connect, self._settings)
                newer = await asyncio.wait_for(
                    router.forecaster.remote(self._forecaster.version),
                    REFRESH_TIMEOUT_S,
                )
                self._forecaster = newer or self._forecaster
            except Exception as error:
                log.warning(
                    "no forecasts from the router (%s); going on with the last",
                    type(error).__name__,
                )
                router = None
            await asyncio.sleep(REFRESH_EVERY_S)

    async def profile(self, items: list[ProfileItem]) -> list[TaskProfile]:
        """Profiles with forecasts, in the order of `items`."""
        await self.check_health()
        profiles: list[TaskProfile] = []
        for item in items:
            profiles += self._text_profiler.profile([item])
            await asyncio.sleep(
                0
            )  # a long text takes 30 ms; other calls go on after each
        return self._forecaster.complete(profiles)
