"""The error of the simulated cluster on a running system: the record that benchmarks.live.validation writes."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

DEFAULT_FILE = Path("var/validation.json")
WITHIN = 0.15  # an error up to this, or up to the spread of the runs, is within the bar
UNKNOWN = (
    "Error of the simulator on a running system: not measured here; `python -m benchmarks.live.validation` "
    "measures it."
)


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """A request of a run.

    sent_s: when the client sent it. prompt, answer: tokens; 0 if it was refused.
    ttft_s, latency_s: seconds from there to the first and the last token.
    """

    sent_s: float
    answered: bool
    prompt: int
    answer: int
    ttft_s: float
    latency_s: float


class Measured(msgspec.Struct, frozen=True):
    """A run on the running system.

    load: share of the measured capacity. run: its number among those with the same arrivals and questions.
    """

    load: float
    run: int
    requests: tuple[Asked, ...]


class Bounds(msgspec.Struct, frozen=True):
    """What the configuration says of one model with one replica.

    max_running: requests in the engine. kv_tokens: that fit into its memory.
    max_queued, max_wait_s: of the queues of all ingresses together.
    """

    max_running: int
    kv_tokens: int
    max_queued: int
    max_wait_s: float


class Fitted(msgspec.Struct, frozen=True):
    """The parameters of a replica that were fitted, as in benchmarks/cluster/hardware.py.

    overhead_s: what network, gateway and client add to the time to every token.
    """

    prefill_tokens_s: float
    step_s: float
    sequence_s: float
    chunk: float
    overhead_s: float


class Row(msgspec.Struct, frozen=True):
    """A percentile at a load that was not fitted.

    figure: its name. predicted_s, measured_s: means over the runs.
    spread: of the measured runs, the largest less the least, as a share of their mean.
    """

    load: float
    figure: str
    predicted_s: float
    measured_s: float
    spread: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_s / self.measured_s - 1.0

    @property
    def within(self) -> bool:
        """Whether the error is small, or no larger than the difference between equal runs."""
        return abs(self.error) <= max(WITHIN, self.spread)


class Setting(msgspec.Struct, frozen=True):
    """What was measured.

    model, trace: what was asked, and whose arrivals. day: of the measurement.
    capacity: answers a second, of which a load is a share.
    fitted_loads: loads whose runs the parameters are fitted to.
    """

    model: str
    trace: str
    day: str
    capacity: float
    bounds: Bounds
    fitted_loads: tuple[float, ...]


class Validation(msgspec.Struct, frozen=True):
    """A comparison of the simulator with a running system.

    rows: at the loads that were not fitted.
    runs: all requests, so that the parameters can be fitted anew.
    """

    setting: Setting
    fitted: Fitted
    rows: tuple[Row, ...]
    runs: tuple[Measured, ...]

    def save(self, path: Path) -> None:
        """Write the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(self))

    def sentence(self) -> str:
        """The error in words."""
        within = sum(row.within for row in self.rows)
        about = self.setting
        return (
            f"Error of the simulator on a running system ({about.model}, {about.trace}, loads "
            f"{_numbers([row.load for row in self.rows])}, fitted at {_numbers(about.fitted_loads)}, {about.day}): "
            f"p50 at most {self._largest('p50'):.0%}, p95 at most {self._largest('p95'):.0%}; {within} of "
            f"{len(self.rows)} figures within {WITHIN:.0%} or the spread of equal runs, which is at most "
            f"{max(row.spread for row in self.rows):.0%}."
        )

    def _largest(self, percentile: str) -> float:
        return max(abs(row.error) for row in self.rows if percentile in row.figure)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def read(path: Path) -> Validation:
    """The validation of a file.

    Raises:
        SystemExit: there is no such file, or it is no validation.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Validation)
    except (OSError, msgspec.DecodeError) as error:
        raise SystemExit(
            f"no validation of the simulator in {path} ({error}); `python -m benchmarks.live.validation` writes one"
        ) from None


def sentence_of(path: Path | None) -> str:
    """The error of the simulator in words.

    Args:
        path: of the file; None reads DEFAULT_FILE, which may be missing.

    Raises:
        SystemExit: the file that was named is missing, or a file is no validation.
    """
    if path is None and not DEFAULT_FILE.is_file():
        return UNKNOWN
    return read(path or DEFAULT_FILE).sentence()
