"""Budget pacing: keeps the mean cost per routed request under a ceiling, by an adaptive price on cost.

The account is the sum spent beyond the ceiling so far, in units of one ceiling: D = Σ (cost / ceiling - 1). The price,
in score points for one ceiling of cost, is

    START · exp(GAIN · error + I),   error = D + margin,   I = RESET · Σ error at the decision.

The first term is online dual ascent, as mirror descent with the entropy as mirror map; the account is the dual iterate
(Agrawal and Devanur, EC 2014; Balseiro, Lu and Mirrokni, Operations Research 2023). It is multiplicative, so it finds
a price of any magnitude, in any currency. Its step is constant, so alone it would settle where the error is
log(price / START) / GAIN. The integral term removes that error: the mean over the stream ends at the ceiling and not
near it. The account aims at a margin as wide as its own deviation, so the mean stays under the ceiling and not around
it. Where the ceiling does not bind, the account falls, and the price falls to zero.

A decision charges its expected cost at once, and its outcome replaces that by the actual cost. An integral over an
error that is known hundreds of requests late would swing. So each decision records the price under which it was made,
from which the error at that time follows, and the integral adds up those errors: it needs no outcome.

The chosen arm is the one that seems worth its cost, so its answers cost more, or less, than expected on the mean. The
ratio Σ actual / Σ expected of the latest answers, BIAS, corrects the expected costs whose outcome is not known yet:

    error = D + (BIAS - 1) · Σ expected costs without an outcome / ceiling + margin.
"""

from math import exp, inf, isfinite, log, sqrt
from typing import NamedTuple

import numpy as np

from policies.base import State
from policies.events import CALIBRATION, FORCED, PAIR, Decision, Outcome

START = 0.1  # score points for one ceiling of cost, before any request
GAIN = 0.1  # one ceiling of debt raises the price by a tenth
RESET = 0.001  # critically damped where a tenth more price saves 4 % of a ceiling
# In ceilings. Below -SATURATION the price is zero; above it only the integral raises the price.
SATURATION = 30.0
INTEGRAL_MOST = 9.0  # the price settles between START · exp(-9) and START · exp(9)
MAX_DEBT = 1000.0  # ceilings, owed or saved, at which the account is clipped
MARGIN = 2.0  # standard deviations of the account
MAX_UNDELIVERED = 20_000  # decisions of an ingress that the router does not have yet
STEPS = 20  # in which the decisions of other ingresses are charged, where this one has made fewer
STEADY = 200.0  # requests over which the scatter of costs is averaged
BIAS_OVER = (
    2_000.0  # answers over which the ratio of actual to expected costs is averaged
)
BIAS_PRIOR = 100.0  # ceilings of cost for which the ratio 1 counts
LEAST_BIAS, MOST_BIAS = 0.25, 4.0
OUTCOME_LOST = (
    5_000.0  # decisions after which an outcome that has not come is unlikely to come
)
# Values of Decision.fallback for a second decision about the same request.
SECOND_DECISIONS = ("model", "hedge", PAIR)
SINCE_BIAS = (
    "pending",
    "paid",
    "expected",
)  # parts of a state that earlier releases lack
NOT_CHARGED = (FORCED, CALIBRATION)  # values of Decision.fallback


class Spending(NamedTuple):
    """Requests that were decided, and the sum of their expected costs."""

    requests: float = 0.0
    cost_usd: float = 0.0

    def __add__(self, other: object) -> "Spending":
        if not isinstance(other, Spending):
            return NotImplemented
        return Spending(self.requests + other.requests, self.cost_usd + other.cost_usd)


NOTHING = Spending()


class BudgetPacer:
    """The account and the price of one stream of requests.

    `decided` and `finished` take each decision and each outcome once. Forced decisions and calibrations do not count. A
    second attempt, and a second answer in the background, add their cost, but do not count as another request.

    Args:
        ceiling_usd: upper limit of the mean cost per routed request; infinite for none.

    Raises:
        ValueError: the ceiling is not above zero.
    """

    def __init__(self, ceiling_usd: float = inf):
        if not ceiling_usd > 0:
            raise ValueError(
                f"the ceiling on the mean cost is {ceiling_usd} USD; choose one above zero"
            )
        self.ceiling_usd = ceiling_usd
        self.requests = self.spent_usd = 0.0
        self.account = self.integral = 0.0  # D, I
        self.scatter = 1.0  # mean square of cost / ceiling - 1
        self.pending = (
            0.0  # ceilings that answers without an outcome are expected to cost
        )
        self.paid = self.expected = (
            0.0  # ceilings that the latest answers cost, and were expected to cost
        )

    @property
    def bias(self) -> float:
        """Actual over expected cost of the latest answers."""
        ratio = (self.paid + BIAS_PRIOR) / (self.expected + BIAS_PRIOR)
        return max(LEAST_BIAS, min(MOST_BIAS, ratio))

    @property
    def _error(self) -> float:
        # Around its aim the account is an autoregression with coefficient 1 - GAIN, whose steps scatter as the costs.
        margin = MARGIN * sqrt(self.scatter / (2 * GAIN))
        return self.account + (self.bias - 1.0) * self.pending + margin

    @property
    def cost_weight(self) -> float:
        """The price to add to the next objective's cost weight, in score points for a US dollar."""
        error = self._error
        if error < -SATURATION or not isfinite(self.ceiling_usd):
            return 0.0
        return (
            START
            * exp(GAIN * min(error, SATURATION) + self.integral)
            / self.ceiling_usd
        )

    @property
    def mean_cost_usd(self) -> float:
        """Mean cost of the requests so far."""
        return self.spent_usd / max(1.0, self.requests)

    def decided(self, decision: Decision) -> None:
        """Charge the expected cost of the decision's answer."""
        if decision.fallback in NOT_CHARGED:
            return
        cost_usd = decision.estimate().cost_usd
        if decision.fallback in SECOND_DECISIONS:
            self._expect(cost_usd)
            self._charge(cost_usd, cost_usd / self.ceiling_usd)
            return
        self.charge(Spending(1.0, cost_usd), decision.paced_weight)
        beyond = min(cost_usd / self.ceiling_usd - 1, SATURATION)
        self.scatter += (beyond**2 - self.scatter) / min(self.requests + 10, STEADY)

    def charge(self, spending: Spending, cost_weight: float = -1.0) -> None:
        """Charge the expected cost of some requests, or of a fraction of one.

        Args:
            spending: the requests and their cost.
            cost_weight: the price under which they were decided; -1 for the present one.
        """
        if isfinite(self.ceiling_usd):
            weight = self.cost_weight if cost_weight < 0 else cost_weight
            # Without this condition the integral would wind up while the ceiling does not bind.
            if weight > 0:
                beyond = log(weight * self.ceiling_usd / START) - self.integral
                most = GAIN * SATURATION
                step = RESET / GAIN * spending.requests * min(beyond, most)
                self.integral = max(
                    -INTEGRAL_MOST, min(INTEGRAL_MOST, self.integral + step)
                )
        self.requests += spending.requests
        self.pending *= max(0.0, 1.0 - spending.requests / OUTCOME_LOST)
        cost_usd = spending.cost_usd
        self._expect(cost_usd)
        self._charge(cost_usd, cost_usd / self.ceiling_usd - spending.requests)

    def finished(self, decision: Decision, outcome: Outcome) -> None:
        """Replace the expected cost by the actual cost; an unknown actual cost leaves the expected one."""
        if decision.fallback in NOT_CHARGED:
            return
        expected_usd = decision.estimate().cost_usd
        self._expect(-expected_usd)
        # A client that left the queue caused no cost: then the whole latency is waiting time.
        asked = outcome.latency_s > outcome.waited_s
        unknown = outcome.status == "disconnected" and asked and not outcome.cost_usd
        if unknown:
            return
        difference = outcome.cost_usd - expected_usd
        self._charge(difference, difference / self.ceiling_usd)
        kept = 1.0 - 1.0 / BIAS_OVER
        self.paid = kept * self.paid + outcome.cost_usd / self.ceiling_usd
        self.expected = kept * self.expected + expected_usd / self.ceiling_usd

    def _expect(self, cost_usd: float) -> None:
        """Add to the expected cost of the answers without an outcome."""
        self.pending = max(0.0, self.pending + cost_usd / self.ceiling_usd)

    def _charge(self, cost_usd: float, beyond: float) -> None:
        self.spent_usd += cost_usd
        if isfinite(self.ceiling_usd):
            self.account = max(-MAX_DEBT, min(MAX_DEBT, self.account + beyond))

    def summary(self) -> dict[str, float | None]:
        """Figures for the operator; `account` is in ceilings, positive if the budget is overdrawn."""
        return {
            "max_mean_cost_usd": self.ceiling_usd
            if isfinite(self.ceiling_usd)
            else None,
            "mean_cost_usd": self.mean_cost_usd,
            "account": self.account,
            "cost_weight": self.cost_weight,
        }

    def state(self) -> State:
        """The pacer's state, as arrays of shape [1]."""
        kept = {"requests": self.requests, "spent_usd": self.spent_usd}
        if isfinite(self.ceiling_usd):
            kept |= {
                "account": self.account,
                "integral": self.integral,
                "scatter": self.scatter,
                "pending": self.pending,
                "paid": self.paid,
                "expected": self.expected,
            }
            kept["ceiling_usd"] = self.ceiling_usd
        return {name: np.array([value]) for name, value in kept.items()}

    def restore(self, state: State) -> None:
        """Continue from another pacer's state; under another ceiling, debt and price in US dollars stay the same.

        Raises:
            ValueError: a value is missing, has another shape, or is not finite.
        """
        given = dict.fromkeys(SINCE_BIAS, 0.0)
        paced = (
            ("account", "integral", "scatter", "ceiling_usd")
            if "ceiling_usd" in state
            else ()
        )
        recent = [name for name in SINCE_BIAS if name in state]
        for name in ("requests", "spent_usd", *paced, *recent):
            value = state.get(name)
            if value is None or value.shape != (1,) or not np.isfinite(value).all():
                raise ValueError(
                    f"pacer state: '{name}' must be one finite number, got {value}"
                )
            given[name] = float(value[0])
        self.requests = given["requests"]
        self.spent_usd = given["spent_usd"]
        if paced and isfinite(self.ceiling_usd):
            before = BudgetPacer(given["ceiling_usd"])
            ratio = self.ceiling_usd / before.ceiling_usd
            for pacer, scale in ((before, 1.0), (self, ratio)):
                pacer.account = given["account"] / scale
                pacer.pending = given["pending"] / scale
                pacer.paid = given["paid"] / scale
                pacer.expected = given["expected"] / scale
                pacer.scatter = given["scatter"]
            integral = given["integral"] + log(ratio)
            if ratio != 1.0 and before._error >= -SATURATION:
                difference = min(before._error, SATURATION) - min(
                    self._error, SATURATION
                )
                integral += GAIN * difference
            self.integral = max(-INTEGRAL_MOST, min(INTEGRAL_MOST, integral))


class IngressPacer:
    """An ingress's copy of the router's pacer.

    The router learns of a decision that an ingress made together with its outcome, some seconds later. A loop with such
    a delay swings. So the ingress charges its own decisions to its copy at once, and again to each newer copy until the
    router has them. With each call for a newer copy it says what the router lacks, and it gets what the router lacks of
    the others. Since then the others are taken to have spent as much as this ingress.
    """

    def __init__(self, ceiling_usd: float = inf):
        self._pacer = BudgetPacer(ceiling_usd)
        self._undelivered: dict[str, Decision] = {}
        self._others = 0.0  # number of the other ingresses that decide

    @property
    def cost_weight(self) -> float:
        """See BudgetPacer."""
        return self._pacer.cost_weight

    @property
    def undelivered(self) -> Spending:
        """The decisions that the router does not have yet."""
        total = NOTHING
        for decision in self._undelivered.values():
            total += _spending(decision)
        return total

    def decided(self, decision: Decision) -> None:
        """Charge a decision that this ingress has made."""
        self._charge(decision, _times(_spending(decision), self._others))
        self._undelivered[decision.id] = decision
        if len(self._undelivered) > MAX_UNDELIVERED:
            self._undelivered.pop(next(iter(self._undelivered)))

    def delivered(self, decision: Decision) -> None:
        """Note that the router has a decision."""
        self._undelivered.pop(decision.id, None)

    def restore(
        self, state: State, ingresses: int = 1, others: Spending = NOTHING
    ) -> None:
        """Continue from the router's pacer.

        Args:
            state: of the router's pacer.
            ingresses: number of ingresses that decide, this one included.
            others: what the router lacks of the other ingresses.

        Raises:
            ValueError: see BudgetPacer.restore.
        """
        self._pacer.restore(state)
        self._others = max(0.0, ingresses - 1.0)
        own = list(self._undelivered.values())
        # In many steps, as they were decided, because the price depends on the account at each of them.
        steps = max(len(own), min(STEPS, int(others.requests)), 1)
        part = _times(others, 1 / steps)
        for decision in own:
            self._charge(decision, part)
        for _ in range(steps - len(own)):
            self._pacer.charge(part)

    def _charge(self, decision: Decision, others: Spending) -> None:
        self._pacer.decided(decision)
        self._pacer.charge(others)


def _spending(decision: Decision) -> Spending:
    """What a decision charges."""
    if decision.fallback in NOT_CHARGED:
        return NOTHING
    second = decision.fallback in SECOND_DECISIONS
    return Spending(0.0 if second else 1.0, decision.estimate().cost_usd)


def _times(spending: Spending, factor: float) -> Spending:
    return Spending(spending.requests * factor, spending.cost_usd * factor)
