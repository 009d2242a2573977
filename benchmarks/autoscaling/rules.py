"""Rules for the number of replicas of a size, with Ray Serve's control loop on a simulated clock."""

from collections import deque
from dataclasses import dataclass

from ray.serve import autoscaling_policy as serve
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.models.autoscaling import DemandPolicy

PUSH_S = 10.0  # between two reports of Serve's handles


@dataclass(frozen=True)
class Rule:
    """How many replicas the sizes have.

    name: what the rule does. knob: the setting by which it differs from others of that name.
    demand: whether the router's demand counts, as with DemandPolicy.
    wake_up: whether a request that a size without a replica could answer sends a wake-up request to it.
    least: replicas that a larger size has at least; the smallest size has one at least.
    target: requests in flight that a replica is meant to have.
    up_s, down_s, zero_s: delays before a start, before a stop, and before the stop of the last replica.
    replica: score points a minute that a replica costs (DemandSettings).
    """

    name: str
    knob: str = ""
    demand: bool = False
    wake_up: bool = False
    least: int = 0
    target: float = 32.0
    up_s: float = 15.0
    down_s: float = 600.0
    zero_s: float = 300.0
    replica: float = 0.5

    def config(self, least: int, most: int) -> AutoscalingConfig:
        """Serve's settings for a size with so many replicas at least and at most."""
        return AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=self.target,
            upscale_delay_s=self.up_s,
            downscale_delay_s=self.down_s,
            downscale_to_zero_delay_s=self.zero_s,
        )


SERVE = "serve"
WARM = "serve, one kept warm"
WAKE = "wake-up requests"
DEMAND = "demand"
RULES = (
    Rule(SERVE),
    Rule(WARM, least=1),
    *(Rule(WAKE, f"zero {s:g} s", wake_up=True, zero_s=s) for s in (60.0, 300.0)),
    *(Rule(DEMAND, f"price {c:g}", demand=True, replica=c) for c in (0.2, 0.35, 0.5)),
    Rule(DEMAND, "price 0.5, zero 60 s", demand=True, zero_s=60.0),
)


class Controller:
    """Serve's control loop for one size: the mean of the requests in flight, the policy, its delays and its bounds.

    The functions are those of the installed Ray, in the order in which its controller calls them; the delays read the
    simulated time in place of the clock.

    Attributes:
        target: the number of replicas that is wanted.

    Args:
        name: of the size.
        config: Serve's settings.
        demand: whether the product's DemandPolicy decides in place of Serve's own policy.
    """

    def __init__(self, name: str, config: AutoscalingConfig, demand: bool = False):
        self.target = config.min_replicas
        self._id = DeploymentID(name, name)
        self._config = config
        self._demand = demand
        self._state: dict[str, object] = {}
        self._seen: deque[tuple[float, float]] = deque()
        self._reported = 0.0
        self._reported_s = -PUSH_S

    def look(self, in_flight: float, demand: float, ready: int, now_s: float) -> int:
        """The number of replicas that is wanted now.

        Args:
            in_flight: requests that were sent to the size and are not answered.
            demand: what the router answers DemandPolicy (Demand.wish).
            ready: replicas that run.
            now_s: ascending.
        """
        self._seen.append((now_s, in_flight))
        while self._seen[0][0] < now_s - self._config.look_back_period_s:
            self._seen.popleft()
        # without a replica a handle reports at once
        if not ready or now_s - self._reported_s >= PUSH_S:
            self._reported_s = now_s
            seen = [value for _, value in self._seen]
            self._reported = sum(seen) / len(seen)
        context = self._context(ready, now_s)
        wanted = self._wanted(context, demand, now_s)
        self.target = min(
            max(wanted, self._config.min_replicas), self._config.max_replicas
        )
        return self.target

    def _wanted(self, context: AutoscalingContext, demand: float, now_s: float) -> int:
        first = serve._get_cold_start_scale_up_replicas(context)
        if first is not None:
            return int(first)
        if self._demand:
            desired = DemandPolicy.wanted(context, demand)
        else:
            desired, _ = serve.replica_queue_length_autoscaling_policy(context)
        ready = context.current_num_replicas
        scaled = int(serve._apply_scaling_factors(desired, ready, self._config))
        if ready == 0 and scaled > 0:
            return scaled
        wanted, self._state = serve._apply_delay_logic(
            max(0, scaled), self.target, self._config, self._state, now_s
        )
        return int(wanted)

    def _context(self, ready: int, now_s: float) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=self._id,
            deployment_name=self._id.name,
            app_name=self._id.app_name,
            current_num_replicas=ready,
            target_num_replicas=self.target,
            running_replicas=[],
            total_num_requests=self._reported,
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )
