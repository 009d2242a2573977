"""The number of replicas of a model: Serve's own figure, and the demand that only the router knows.

Serve sees the requests that were sent to a model. The router also knows those that went elsewhere, because the model
has no replica or is full (policies/demand.py). serve_config.yaml names the class in a model's `autoscaling_config`:

    policy: {policy_function: "deployments.models.autoscaling:DemandPolicy"}

Serve sends the class by value to its controller, which makes it once and calls it ten times a second, and applies the
delays, factors and bounds of `autoscaling_config` to the number. So this module imports nothing of this project. An
exception would stop the controller's update of the other applications, and a slow call would delay it: none leaves the
class, and it asks the router in the background. Without an answer for a while it is Serve's own rule.
"""

import asyncio
import logging
import math
import time
from contextlib import suppress
from typing import Any

import ray
from ray.serve.config import AutoscalingContext

ANSWER_S = 2.0  # time for an answer of the router
log = logging.getLogger("ray.serve")


class DemandPolicy:
    """Autoscaling policy of one model, whose application has its name.

    Args:
        router, namespace: of the router actor.
        every_s: time between two questions to the router.
        stale_s: time after which an answer counts no more.
    """

    def __init__(
        self,
        router: str = "router",
        namespace: str = "router",
        every_s: float = 1.0,
        stale_s: float = 15.0,
    ):
        self._router = router
        self._namespace = namespace
        self._every_s = every_s
        self._stale_s = stale_s
        self._actor: Any = None
        self._task: asyncio.Task[None] | None = None
        self._demand = 0.0
        self._answered_s = self._asked_s = -math.inf

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas wanted, and nothing to keep: a new instance begins with Serve's own figure."""
        try:
            return self._wanted(ctx), {}
        except Exception as error:
            log.warning("no figure for %s (%s)", ctx.app_name, type(error).__name__)
            return ctx.target_num_replicas, {}

    def _wanted(self, ctx: AutoscalingContext) -> float:
        now_s = time.monotonic()
        with suppress(Exception):
            self._ask(str(ctx.app_name), now_s)
        demand = 0.0
        if now_s - self._answered_s < self._stale_s:
            demand = self._demand
        return self.wanted(ctx, demand)

    @staticmethod
    def wanted(ctx: AutoscalingContext, demand: float) -> float:
        """The number of replicas for the requests that Serve sees, and this many that it does not see."""
        target: float = ctx.config.get_target_ongoing_requests()
        wanted: float = (ctx.total_num_requests + demand) / target
        if ctx.current_num_replicas == 0:
            # a replica that is being started is kept, as in Serve's own policy
            wanted = max(float(ctx.target_num_replicas), wanted)
        return wanted

    def _ask(self, model: str, now_s: float) -> None:
        """Ask the router in the background, unless it was asked just now."""
        waits = self._task is not None and not self._task.done()
        if waits or now_s - self._asked_s < self._every_s:
            return
        self._asked_s = now_s
        self._task = asyncio.get_running_loop().create_task(self._poll(model))

    async def _poll(self, model: str) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                if self._actor is None:
                    self._actor = await asyncio.to_thread(
                        ray.get_actor, self._router, namespace=self._namespace
                    )
                demand = float(await self._actor.demand.remote(model))
            if math.isfinite(demand):
                self._demand = max(0.0, demand)
                self._answered_s = time.monotonic()
        except Exception:
            self._actor = None  # look it up again; a stale demand counts no more
