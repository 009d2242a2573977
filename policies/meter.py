"""Live measurements of one arm, from the outcomes and scores as they come in."""

from collections import deque

from policies.types import ModelState, Outcome

SMOOTHING = 0.1  # weight of the newest value in a moving average
WINDOW_S = 10.0  # over which tokens per second are counted


class Meter:
    """Moving averages of one arm. The clock is an argument."""

    def __init__(self) -> None:
        self._averages: dict[str, float] = {}
        self._tokens: deque[tuple[float, int]] = deque()
        self._in_window = 0  # their sum: every decision asks for it

    def _average(self, name: str, value: float) -> None:
        before = self._averages.get(name, value)
        self._averages[name] = before + SMOOTHING * (value - before)

    def observe(self, outcome: Outcome, time_s: float) -> None:
        """Take in one outcome that arrived at this time."""
        if outcome.status == "rejected":
            return
        self._average("error_rate", float(outcome.status == "error"))
        if outcome.status != "ok":
            return
        if outcome.ttft_s > 0:
            self._average("ttft_s", outcome.ttft_s)
            if outcome.output_tokens > 1:
                self._average("tpot_s", (outcome.latency_s - outcome.ttft_s) / (outcome.output_tokens - 1))
        self._tokens.append((time_s, outcome.output_tokens))
        self._in_window += outcome.output_tokens

    def score(self, score: float) -> None:
        """Take in the score of one answer."""
        self._average("accuracy", score)

    def state(self, time_s: float, in_flight: int, replicas: int, healthy: bool) -> ModelState:
        """The state of the arm at this time."""
        while self._tokens and self._tokens[0][0] < time_s - WINDOW_S:
            self._in_window -= self._tokens.popleft()[1]
        return ModelState(
            in_flight=in_flight,
            replicas=replicas,
            tokens_per_s=self._in_window / WINDOW_S,
            healthy=healthy,
            **self._averages,
        )
