"""Regression watch: a sequential test of whether a promoted policy is worse than its predecessor.

The test is an e-process, which may be looked at after every request (Ramdas, Grünwald, Vovk and Shafer, Statistical
Science 2023): while the promoted policy is no worse, the probability that it ever reaches 1/α is at most α.
"""

from math import exp, isnan, log

import numpy as np

from policies.evaluation.confidence import LAMBDAS, PSI
from policies.rollout.promotion_gate import Report

BLOCK = 50  # observations between two starts
MAX_STARTS = 64  # starts that are kept
LOSS_DECAY = (
    0.98  # weight of the past, one observation later, in the guess of the next loss
)


class RegressionTest:
    """Tests the rewards of a promoted policy one by one, and says when to roll it back.

    With a `reference`, the hypothesis is that the mean reward is not below that level less the margin. Without one,
    the predecessor gets a small share of the traffic, and the hypothesis is that the promoted policy earns at least
    the predecessor's reward less the margin. Each reward of the predecessor is paired with the mean of the promoted
    policy's rewards since the last pair. This needs no propensities. It follows changes that affect both, such as
    harder requests or a slow day, and remains valid if the two get feedback at different rates. The share should be
    drawn at random.

    A policy may be good for a long time before it gets worse. So the e-process is a mixture over starts, one every
    BLOCK observations, the j-th with the weight 1 / (j (j + 1)). The least promising starts are dropped, which can
    only make the e-process smaller.

    Args:
        reference: the level to keep; None compares with the predecessor.
        margin: by how much the policy may be worse, in units of the reward.
        alpha: probability that a false alarm ever occurs.
        bounds: the lowest and the highest possible reward.

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
            raise ValueError(
                f"margin is {margin} and bounds are {bounds}; give margin >= 0, and bounds low then high"
            )
        if reference is not None and not bounds[0] <= reference <= bounds[1]:
            raise ValueError(
                f"a reference of {reference:g} is out of the bounds {bounds}"
            )
        self.reference = reference
        self.margin = margin
        self.alpha = alpha
        self.bounds = bounds
        self.roll_back = False
        self.observations = 0
        self.pairs = 0
        # Rewards and their number since the last pair: of the promoted policy, of the predecessor.
        self._sums = np.zeros((2, 2))
        self._means = np.zeros((2, 2))  # the same since the promotion
        self._guess = 0.0  # of the next loss
        self._weights = np.zeros(0)  # [S] log of the starts' weights
        # [S, 12] log of each start's capital with each λ
        self._capital = np.zeros((0, len(LAMBDAS)))
        self._peak = 0.0

    def observe(self, reward: float, predecessor: bool = False) -> bool:
        """Record one reward, in the order of the decisions; NaN is ignored.

        Args:
            reward: within the bounds.
            predecessor: whether the predecessor earned it, and not the promoted policy.

        Returns:
            Whether to roll back; True stays True.

        Raises:
            ValueError: the reward is out of the bounds.
        """
        if isnan(reward):
            return self.roll_back
        low, high = self.bounds
        if not low <= reward <= high:
            raise ValueError(
                f"a reward of {reward:g} is out of the bounds {self.bounds}"
            )
        self.observations += 1
        self._means[int(predecessor)] += (reward, 1)
        span = high - low
        if self.reference is not None:
            if not predecessor:
                self._update_evidence(
                    (self.reference - self.margin - reward) / span,
                    (self.reference - self.margin - high) / span,
                )
            return self.roll_back
        self._sums[int(predecessor)] += (reward, 1)
        if self._sums[:, 1].all():
            mine, other = self._sums[:, 0] / self._sums[:, 1]
            self._sums[:] = 0.0
            self._update_evidence(
                (other - mine - self.margin) / span, -1.0 - self.margin / span
            )
        return self.roll_back

    def _update_evidence(self, loss: float, lowest: float) -> None:
        """Update the e-process with a loss, whose mean is at most 0 without a regression; b as in confidence.py."""
        if self.pairs % BLOCK == 0:
            self._start(self.pairs // BLOCK + 1)
        self.pairs += 1
        b = max(-lowest, 1e-6)  # the highest mean without regression is 0
        guess = min(0.0, max(lowest, self._guess))
        self._capital += LAMBDAS * (loss / b) - PSI * ((loss - guess) / b) ** 2
        self._guess = LOSS_DECAY * self._guess + (1 - LOSS_DECAY) * loss
        self._peak = max(self._peak, float(self.log_evidence))
        self.roll_back = self.roll_back or self._peak >= log(1 / self.alpha)

    def _start(self, number: int) -> None:
        self._weights = np.append(self._weights, -log(number * (number + 1)))
        self._capital = np.vstack([self._capital, np.zeros(len(LAMBDAS))])
        if len(self._weights) > MAX_STARTS:
            # The younger half is kept, because it has few observations yet.
            hope = (self._weights + self._capital.max(axis=1))[: MAX_STARTS // 2]
            keep = np.delete(np.arange(len(self._weights)), np.argmin(hope))
            self._weights = self._weights[keep]
            self._capital = self._capital[keep]

    @property
    def log_evidence(self) -> float:
        """Log of the e-process: at log(1 / alpha) it is time to roll back."""
        x = self._weights[:, None] + self._capital
        started = -(-self.pairs // BLOCK)
        waiting = 1.0 / (started + 1)  # weight of the future starts, whose capital is 1
        top = float(x.max(initial=0.0))
        return top + log(
            waiting * exp(-top) + float(np.exp(x - top).sum()) / len(LAMBDAS)
        )

    def report(self) -> Report:
        """Plain data: `roll_back`, `reason` in words, `e_value` (the largest so far), means and numbers of rewards."""
        (mine, n), (other, m) = self._means.tolist()
        level = (
            f"the reference of {self.reference:.4f}"
            if self.reference is not None
            else f"{m:.0f} of its predecessor"
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
        """The state of the test as plain data, for `restore`."""
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
        """Continue from the state of another test with the same arguments.

        Raises:
            ValueError: a value is missing.
        """
        try:
            self.roll_back = bool(state["roll_back"])
            self.observations = int(str(state["observations"]))
            self.pairs = int(str(state["pairs"]))
            self._guess = float(str(state["guess"]))
            self._peak = float(str(state["peak"]))
            self._sums = np.array(state["sums"], float)
            self._means = np.array(state["means"], float)
            self._weights = np.array(state["weights"], float)
            self._capital = np.array(state["capital"], float).reshape(-1, len(LAMBDAS))
        except KeyError as error:
            raise ValueError(f"the state of a watch needs {error}") from None
