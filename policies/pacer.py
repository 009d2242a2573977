"""Keeps the mean cost per routed request of an open-ended stream under a ceiling, by a price on cost that adapts.

The account is what was spent beyond the ceiling so far, in requests' worth: D = Σ (cost / ceiling - 1). The price, in
score points for a ceiling's worth of cost, is

    START · exp(GAIN · off + I),   off = D + margin,   I = RESET · Σ off.

The first term is online dual ascent, as mirror descent with the entropy for its mirror map, where the account is the
dual iterate (Agrawal and Devanur, EC 2014; Balseiro, Lu and Mirrokni, Operations Research 2023): it is multiplicative,
so it finds a price of any magnitude, in any currency. As its step is constant, it settles where the account is off by
log(price / START) / GAIN; the integral term takes that to zero, so that the mean over the stream ends at the ceiling
and not near it. The account aims at a margin as wide as it scatters, so that the mean stays under the ceiling and not
around it. Where the ceiling does not bind, the account falls and the price with it, to zero.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import exp, inf, isfinite, log, sqrt

import numpy as np

from policies.base import State
from policies.types import FORCED, Decision, Outcome, Request

START = 0.1  # score points for a ceiling's worth of cost, before anything is known
GAIN = 0.1  # a request's worth of debt makes the price a tenth higher
RESET = 0.001  # critically damped where a tenth more price saves 4 % of a ceiling's worth
REACH = 30.0  # requests' worth; below it the price is zero, above it the price rises by the integral only
INTEGRAL_MOST = 9.0  # the price settles between START · exp(-9) and START · exp(9)
FORGIVEN = 1000.0  # requests' worth, owed or saved, beyond which the account does not remember
MARGIN = 2.0  # standard deviations of the account
STEADY = 200.0  # requests over which the scatter of costs is averaged
STAND_INS = ("model", "hedge")  # fallbacks of a second decision for the same request


class Pacer:
    """The account and the price of one stream. Told of decisions and outcomes, once each; forced ones don't count, and
    what stands in for another decision costs, but is no further request.

    Args:
        ceiling_usd: mean cost per routed request to stay under; infinite for none.

    Raises:
        ValueError: the ceiling is not above zero.
    """

    def __init__(self, ceiling_usd: float = inf):
        if not ceiling_usd > 0:
            raise ValueError(f"the ceiling on the mean cost is {ceiling_usd} USD; choose one above zero")
        self.ceiling_usd = ceiling_usd
        self.requests = self.spent_usd = 0.0
        self.account = self.integral = 0.0  # D, I
        self.scatter = 1.0  # mean square of cost / ceiling - 1

    @property
    def _off(self) -> float:
        # around its aim the account is an autoregression with steps of the costs' scatter and coefficient 1 - GAIN
        return self.account + MARGIN * sqrt(self.scatter / (2 * GAIN))

    @property
    def cost_weight(self) -> float:
        """To be added to the next objective's cost weight: score points for a US dollar."""
        off = self._off
        if off < -REACH or not isfinite(self.ceiling_usd):
            return 0.0
        return START * exp(GAIN * min(off, REACH) + self.integral) / self.ceiling_usd

    @property
    def mean_cost_usd(self) -> float:
        """Of the requests so far."""
        return self.spent_usd / max(1.0, self.requests)

    def decided(self, decision: Decision) -> None:
        """Charge what the decision expects its answer to cost."""
        if decision.fallback == FORCED:
            return
        cost_usd = decision.estimate().cost_usd
        if decision.fallback in STAND_INS:
            self._charge(cost_usd, cost_usd / self.ceiling_usd)
            return
        self.requests += 1
        self._charge(cost_usd, cost_usd / self.ceiling_usd - 1)
        beyond = min(cost_usd / self.ceiling_usd - 1, REACH)
        self.scatter += (beyond**2 - self.scatter) / min(self.requests + 10, STEADY)
        off = self._off
        if off > -REACH:  # or it would wind up while the ceiling does not bind
            integral = self.integral + RESET * min(off, REACH)
            self.integral = max(-INTEGRAL_MOST, min(INTEGRAL_MOST, integral))

    def finished(self, decision: Decision, outcome: Outcome) -> None:
        """Put what it did cost, known late, in the place of what was expected; if nobody knows, that stays."""
        asked = outcome.latency_s > outcome.waited_s  # and did not just leave the line
        unknown = outcome.status == "disconnected" and asked and not outcome.cost_usd
        if decision.fallback != FORCED and not unknown:
            difference = outcome.cost_usd - decision.estimate().cost_usd
            self._charge(difference, difference / self.ceiling_usd)

    def _charge(self, cost_usd: float, beyond: float) -> None:
        self.spent_usd += cost_usd
        if isfinite(self.ceiling_usd):
            self.account = max(-FORGIVEN, min(FORGIVEN, self.account + beyond))

    def summary(self) -> dict[str, float | None]:
        """What an operator wants to see; `account` is in requests' worth, above zero if owed."""
        return {
            "max_mean_cost_usd": self.ceiling_usd if isfinite(self.ceiling_usd) else None,
            "mean_cost_usd": self.mean_cost_usd,
            "account": self.account,
            "cost_weight": self.cost_weight,
        }

    def state(self) -> State:
        """All that it knows, as arrays of shape [1]."""
        kept = {"requests": self.requests, "spent_usd": self.spent_usd}
        if isfinite(self.ceiling_usd):
            kept |= {"account": self.account, "integral": self.integral, "scatter": self.scatter}
            kept["ceiling_usd"] = self.ceiling_usd
        return {name: np.array([value]) for name, value in kept.items()}

    def restore(self, state: State) -> None:
        """Take over what another pacer knew; under another ceiling, the same debt and price in US dollars.

        Raises:
            ValueError: a value is missing, has another shape, or is not finite.
        """
        given = {}
        paced = ("account", "integral", "scatter", "ceiling_usd") if "ceiling_usd" in state else ()
        for name in ("requests", "spent_usd", *paced):
            value = state.get(name)
            if value is None or value.shape != (1,) or not np.isfinite(value).all():
                raise ValueError(f"pacer state: '{name}' must be one finite number, got {value}")
            given[name] = float(value[0])
        self.requests, self.spent_usd = given["requests"], given["spent_usd"]
        if paced and isfinite(self.ceiling_usd):
            ratio = self.ceiling_usd / given["ceiling_usd"]
            self.account, self.scatter = given["account"] / ratio, given["scatter"]
            integral = given["integral"] + log(ratio)
            self.integral = max(-INTEGRAL_MOST, min(INTEGRAL_MOST, integral))


def paced(requests: Sequence[Request], cost_weight: float) -> list[Request]:
    """The requests with this much more cost weight, but for the forced ones."""
    if not cost_weight:
        return list(requests)
    return [
        r if r.forced else replace(r, objective=replace(r.objective, cost_weight=r.objective.cost_weight + cost_weight))
        for r in requests
    ]
