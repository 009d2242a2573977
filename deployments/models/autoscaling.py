"""The number of replicas of a model: Serve's own figure, and the demand that only the router knows.

Serve sees the requests that were sent to a model. The router also knows those that went elsewhere, because the model
has no replica or is full, and what the last replica saves (policies/demand.py). A last replica that is worth its price
is kept through a pause, and one that is not is stopped although requests are in flight, which it still answers. The
router knows it some seconds before, so that it sends new requests elsewhere: a request that finds no replica would
start one. serve_config.yaml names the class in a model's `autoscaling_config`:

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

from policies.demand import LEAST

ANSWER_S = 2.0  # time for an answer of the router
log = logging.getLogger("ray.serve")


class DemandPolicy:
    """Autoscaling policy of one model, whose application has its name.

    Args:
        router, namespace: of the router actor.
        every_s: time between two questions to the router.
        stale_s: time after which an answer counts no more.
        notice_s: time for which the router knows that the last replica will stop.
    """

    def __init__(
        self,
        router: str = "router",
        namespace: str = "router",
        every_s: float = 1.0,
        stale_s: float = 15.0,
        notice_s: float = 10.0,
    ):
        self._router = router
        self._namespace = namespace
        self._every_s = every_s
        self._stale_s = stale_s
        self._notice_s = notice_s
        self._actor: Any = None
        self._task: asyncio.Task[None] | None = None
        self._demand = 0.0
        self._answered_s = self._asked_s = -math.inf
        self._spare_s = math.inf  # since when no replica is wanted

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas wanted, and nothing to keep: a new instance begins with Serve's own figure."""
        try:
            return self._wanted(ctx), {}
        except Exception as error:
            log.warning("no figure for %s (%s)", ctx.app_name, type(error).__name__)
            return ctx.target_num_replicas, {}

    def _wanted(self, ctx: AutoscalingContext) -> float:
        now_s = time.monotonic()
        demand = 0.0
        if now_s - self._answered_s < self._stale_s:
            demand = self._demand
        wanted = self.wanted(ctx, demand)
        if demand < 0.0 and ctx.current_num_replicas == 1 and wanted <= 0.0:
            self._spare_s = min(self._spare_s, now_s)
        else:
            self._spare_s = math.inf
        delay_s = ctx.config.downscale_to_zero_delay_s
        if delay_s is None:
            delay_s = ctx.config.downscale_delay_s
        spare_for_s = now_s - self._spare_s
        with suppress(Exception):
            self._ask(str(ctx.app_name), spare_for_s > delay_s - self._notice_s, now_s)
        if 0.0 <= spare_for_s < self._notice_s - delay_s:
            return LEAST  # Serve's own delay is too short for the notice
        return wanted

    @staticmethod
    def wanted(ctx: AutoscalingContext, demand: float) -> float:
        """The number of replicas for the requests that Serve sees, and this many that it does not see.

        Args:
            ctx: Serve's figures.
            demand: of the router; negative for a last replica that is not worth its price.
        """
        target: float = ctx.config.get_target_ongoing_requests()
        requests: float = ctx.total_num_requests
        if demand < 0.0:
            last = ctx.current_num_replicas == 1 and ctx.target_num_replicas <= 1
            wanted = 0.0 if last and not ctx.config.min_replicas else requests
        elif demand <= LEAST:
            wanted = max(requests, demand)
        else:
            wanted = requests + demand
        wanted /= target
        if ctx.current_num_replicas == 0:
            # a replica that is being started is kept, as in Serve's own policy
            wanted = max(float(ctx.target_num_replicas), wanted)
        return wanted

    def _ask(self, model: str, leaves: bool, now_s: float) -> None:
        """Ask the router in the background, unless it was asked just now.

        Args:
            model: the application.
            leaves: whether its last replica will stop soon.
            now_s: monotonic.
        """
        waits = self._task is not None and not self._task.done()
        if waits or now_s - self._asked_s < self._every_s:
            return
        self._asked_s = now_s
        self._task = asyncio.get_running_loop().create_task(self._poll(model, leaves))

    async def _poll(self, model: str, leaves: bool) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                if self._actor is None:
                    self._actor = await asyncio.to_thread(
                        ray.get_actor, self._router, namespace=self._namespace
                    )
                demand = float(await self._actor.demand.remote(model, leaves))
            if math.isfinite(demand):
                self._demand = demand
                self._answered_s = time.monotonic()
        except Exception:
            self._actor = None  # look it up again; a stale demand counts no more
