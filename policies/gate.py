"""Who gets promoted, and who is rolled back: two tests that stand between a learning policy and the traffic.

Before: the challenger must beat the champion on the log of what was decided, by the lower confidence bound of the
difference (offpolicy.py). After: what it earns is watched by an e-process, which may be looked at after every request
(Ramdas, Grünwald, Vovk and Shafer, Statistical Science 2023): while the promoted policy is no worse, the probability
that it ever reaches 1/α is at most α.
"""

from dataclasses import asdict
from math import exp, isnan, log

import numpy as np

from policies.confidence import LAMBDAS, PSI
from policies.offpolicy import confidence_sequence, difference, estimate
from policies.overlap import Log, UnanswerableError, overlap
from policies.types import Vector

BLOCK = 50  # observations after which a new start is tried
STARTS = 64  # starts that are remembered
MEMORY = 0.98  # of the guess of the next reward: weight of the past, an observation later

Report = dict[str, object]


def may_promote(
    data: Log, champion: Vector, challenger: Vector, margin: float = 0.0, level: float = 0.95, repeated: bool = False
) -> Report:
    """Whether the challenger may take over, and why.

    Both are judged by DR with stabilised weights on the same log, so what they do alike cancels out. The lower end of
    a two-sided interval at 95 % lets an equal challenger through in 2.5 % of all looks.

    Args:
        data: what was decided, by whom does not matter, after both had learned what they know.
        champion: [N, K] probabilities with which it takes each arm.
        challenger: [N, K] likewise.
        margin: by how much the challenger must be better, in units of the reward.
        level: of the interval.
        repeated: ask the confidence sequence, which holds however often one looks at the growing log, until it passes.

    Returns:
        Plain data: `promote` (bool), `reason` (in words), `difference`, `champion`, `challenger` (estimates, with the
        overlap of each), `bound` (what the decision hangs on), `lower`, `upper`, `margin`, `level`, `decisions`,
        `feedback`. Without an answer the estimates are missing, and the reason says why.
    """
    report: Report = {
        "promote": False,
        "reason": "",
        "bound": "confidence sequence" if repeated else "interval",
        "margin": margin,
        "level": level,
        "decisions": len(data.chosen),
        "feedback": int((~np.isnan(data.rewards)).sum()),
    }
    try:
        gain = difference(data, champion, challenger, level=level)
    except UnanswerableError as error:
        return report | {"reason": f"refused: {error}"}
    lower, upper = gain.low, gain.high
    if repeated:
        sequence = confidence_sequence(data, challenger, champion, level)
        lower, upper = float(sequence[0][-1]), float(sequence[1][-1])
    for name, target in (("champion", champion), ("challenger", challenger)):
        report[name] = estimate(data, target, level=level).as_dict() | asdict(overlap(data, target))
    report |= {"difference": gain.as_dict(), "lower": lower, "upper": upper, "promote": bool(lower > margin)}
    found = f"the challenger's reward is {gain.value:+.4f} beside the champion's, between {lower:+.4f} and {upper:+.4f}"
    if report["promote"]:
        verdict = f"promoted: {found}, all above {margin:g}"
    elif np.abs(champion - challenger).max(initial=0.0) < 1e-6:
        verdict = "refused: champion and challenger decide alike"
    elif upper < margin:
        verdict = f"refused: {found}, all below {margin:g}"
    else:
        verdict = f"refused: {found}, which leaves open whether it is more than {margin:g}; more decisions would tell"
    return report | {"reason": verdict}


class Watch:
    """Watches a promoted policy, and says when to roll back.

    With a `reference` it tests that the rewards are not below that level, less the margin. Without one, the
    predecessor gets a small share of the traffic, and the test is that the promoted policy earns no less than it,
    less the margin: the mean of its rewards since the last pair is paired with the predecessor's next reward. That
    needs no propensity, follows what happens to both (harder requests, a slow day), and stays right where the two get
    feedback at different rates; the share should be drawn by chance.

    A policy may be good for long before it gets worse. So the e-process is a mixture over starts, one each BLOCK
    observations, of weight 1 / (j (j + 1)); those without hope are forgotten, which can only make it smaller.

    Args:
        reference: the level it must keep; None compares with the predecessor.
        margin: by how much it may be worse, in units of the reward.
        alpha: probability of a false alarm, ever.
        bounds: the lowest and the highest reward there can be.

    Raises:
        ValueError: alpha is not in (0, 1), or margin, bounds or reference make no sense.
    """

    def __init__(
        self,
        reference: float | None = None,
        margin: float = 0.0,
        alpha: float = 0.05,
        bounds: tuple[float, float] = (0.0, 1.0),
    ):
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is {alpha}; choose a probability between 0 and 1")
        if not bounds[0] < bounds[1] or margin < 0:
            raise ValueError(f"margin is {margin} and bounds are {bounds}; give margin >= 0, and bounds low then high")
        if reference is not None and not bounds[0] <= reference <= bounds[1]:
            raise ValueError(f"a reference of {reference:g} is out of the bounds {bounds}")
        self.reference, self.margin, self.alpha, self.bounds = reference, margin, alpha, bounds
        self.roll_back, self.observations, self.pairs = False, 0, 0
        self._sums = np.zeros((2, 2))  # rewards and their number since the last pair: promoted, predecessor
        self._means = np.zeros((2, 2))  # the same, since the promotion
        self._guess = 0.0  # of the next loss
        self._weights = np.zeros(0)  # [S] log of the starts' weights
        self._capital = np.zeros((0, len(LAMBDAS)))  # [S, 12] log of what each start made of each λ
        self._peak = 0.0

    def observe(self, reward: float, predecessor: bool = False) -> bool:
        """Take in one reward, in the order of the decisions; NaN says nothing.

        Args:
            reward: within the bounds.
            predecessor: who earned it: the predecessor, or the promoted policy.

        Returns:
            Whether to roll back; once so, it stays so.

        Raises:
            ValueError: the reward is out of the bounds.
        """
        if isnan(reward):
            return self.roll_back
        low, high = self.bounds
        if not low <= reward <= high:
            raise ValueError(f"a reward of {reward:g} is out of the bounds {self.bounds}")
        self.observations += 1
        self._means[int(predecessor)] += (reward, 1)
        span = high - low
        if self.reference is not None:
            if not predecessor:
                self._bet((self.reference - self.margin - reward) / span, (self.reference - self.margin - high) / span)
            return self.roll_back
        self._sums[int(predecessor)] += (reward, 1)
        if self._sums[:, 1].all():
            mine, other = self._sums[:, 0] / self._sums[:, 1]
            self._sums[:] = 0.0
            self._bet((other - mine - self.margin) / span, -1.0 - self.margin / span)
        return self.roll_back

    def _bet(self, loss: float, lowest: float) -> None:
        """Bet that losses, of a mean of at most 0 if nothing is wrong, are positive; see confidence.py with b below."""
        if self.pairs % BLOCK == 0:
            self._start(self.pairs // BLOCK + 1)
        self.pairs += 1
        b = max(-lowest, 1e-6)  # the highest mean without regression is 0
        guess = min(0.0, max(lowest, self._guess))
        self._capital += LAMBDAS * (loss / b) - PSI * ((loss - guess) / b) ** 2
        self._guess = MEMORY * self._guess + (1 - MEMORY) * loss
        self._peak = max(self._peak, float(self.log_evidence))
        self.roll_back = self.roll_back or self._peak >= log(1 / self.alpha)

    def _start(self, number: int) -> None:
        self._weights = np.append(self._weights, -log(number * (number + 1)))
        self._capital = np.vstack([self._capital, np.zeros(len(LAMBDAS))])
        if len(self._weights) > STARTS:  # the younger half has had no time to show
            hope = (self._weights + self._capital.max(axis=1))[: STARTS // 2]
            keep = np.delete(np.arange(len(self._weights)), np.argmin(hope))
            self._weights, self._capital = self._weights[keep], self._capital[keep]

    @property
    def log_evidence(self) -> float:
        """Log of the e-process: at log(1 / alpha) it is time to roll back."""
        x = self._weights[:, None] + self._capital
        started = -(-self.pairs // BLOCK)
        waiting = 1.0 / (started + 1)  # weight of the starts to come, whose capital is still 1
        top = float(x.max(initial=0.0))
        return top + log(waiting * exp(-top) + float(np.exp(x - top).sum()) / len(LAMBDAS))

    def report(self) -> Report:
        """Plain data: `roll_back`, `reason` in words, `e_value` (the largest so far), means and numbers of rewards."""
        (mine, n), (other, m) = self._means.tolist()
        level = (
            f"the reference of {self.reference:.4f}" if self.reference is not None else f"{m:.0f} of its predecessor"
        )
        e_value = exp(min(self._peak, 700.0))
        means = f"{n:.0f} rewards average {mine / n:.4f}" if n else "no rewards yet"
        if self.reference is None and m:
            level += f", which average {other / m:.4f}"
        verdict = "rolled back" if self.roll_back else "kept"
        return {
            "roll_back": self.roll_back,
            "reason": f"{verdict}: {means}, beside {level}; the evidence against it is {e_value:.3g} to 1, "
            f"{1 / self.alpha:g} to 1 rolls back",
            "e_value": e_value,
            "mean": mine / n if n else None,
            "rewards": int(n),
            "predecessor_mean": other / m if m else None,
            "predecessor_rewards": int(m),
        }

    def state(self) -> dict[str, object]:
        """All that was seen, as plain data, for `restore`."""
        return {
            "roll_back": self.roll_back,
            "observations": self.observations,
            "pairs": self.pairs,
            "guess": float(self._guess),
            "peak": self._peak,
            "sums": self._sums.tolist(),
            "means": self._means.tolist(),
            "weights": self._weights.tolist(),
            "capital": self._capital.tolist(),
        }

    def restore(self, state: dict[str, object]) -> None:
        """Go on where another watch with the same arguments stood.

        Raises:
            ValueError: something is missing.
        """
        try:
            self.roll_back, self.observations = bool(state["roll_back"]), int(str(state["observations"]))
            self.pairs, self._guess = int(str(state["pairs"])), float(str(state["guess"]))
            self._peak = float(str(state["peak"]))
            self._sums, self._means = np.array(state["sums"], float), np.array(state["means"], float)
            self._weights = np.array(state["weights"], float)
            self._capital = np.array(state["capital"], float).reshape(-1, len(LAMBDAS))
        except KeyError as error:
            raise ValueError(f"the state of a watch needs {error}") from None
