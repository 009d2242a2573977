"""The product's policy with a price on scarce sizes, as an experiment in the simulator.

The price is added to the expected wait as `price / latency_weight` seconds, so that the utility falls by exactly the
price. No request of the simulator has a limit on its latency, which this would affect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from policies.events import Decision
from policies.scarcity import ScarcityPrices
from policies.thompson import kernels
from policies.thompson.policy import Thompson, ThompsonSettings
from policies.types import Arm, ModelState, Request


class ScarcePolicy(Thompson):
    """Thompson sampling on the utility less the price of the size's scarcity.

    Args:
        targets: [K] requests in flight per replica that each size is meant to have.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        targets: Sequence[float],
        settings: ThompsonSettings | None = None,
    ):
        super().__init__(arms, settings)
        self.scarcity = ScarcityPrices(targets)

    def decide(
        self,
        requests: Sequence[Request],
        states: Mapping[str, ModelState],
        rng: np.random.Generator,
        sequence: int,
    ) -> list[Decision]:
        """See base.Policy; one request at a time."""
        (request,) = requests
        live = [states[arm.name] for arm in self.arms]
        self.scarcity.observe(live)
        asked = self.latency.asked(requests, [request.objective])
        features = request.profile.features[None]
        total = float(sum(state.in_flight for state in live))
        idle = [replace(state, wait_s=0.0) for state in live]
        expected = self.latency.expect(asked, features, idle, total)
        charges = self.scarcity.charges(expected[0, kernels.LATENCY])
        waits = charges / request.objective.latency_weight
        priced = {
            arm.name: replace(state, wait_s=state.wait_s + float(wait))
            for arm, state, wait in zip(self.arms, live, waits, strict=True)
        }
        return super().decide(requests, priced, rng, sequence)

    def rearmed(self, arms: Sequence[Arm]) -> "ScarcePolicy":
        """The policy at other prices, with all that it has learned."""
        after = ScarcePolicy(arms, (), self.settings)
        after.restore(self.state())
        after.scarcity = self.scarcity
        return after
