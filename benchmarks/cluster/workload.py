"""Requests with recorded arrivals, lengths, prompts and scores.

Arrivals and lengths come from one recording, prompts and scores from another. They are joined by the rank of the
prompt's length: the longest arrival gets the longest prompt. The arrivals keep their order, and their gaps are scaled
to the rate that is asked for.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.decisions.streams import Portfolio, data_folder
from policies.types import TaskProfile, Vector

TRACES = (
    "azure_conv",
    "azure_code",
    "mooncake_conversation",
    "mooncake_synthetic",
    "servegen_rates",
)
LONGEST = 32_000  # tokens of a prompt; longer ones are cut
RATIOS = (0.25, 4.0)  # bounds of an arm's answer length, as a share of the mean


@dataclass(frozen=True)
class Workload:
    """N requests on K models.

    rows: [N] the prompt of each in the portfolio.
    arrival_s: [N] ascending, from 0; one request a second in the mean.
    prompts: [N] tokens. answers: [N, K] tokens. scores: [N, K].
    profiles: what a router sees.
    blocks: N lists of ids of the prompt's blocks; empty without a recording of them.
    """

    rows: NDArray[np.int64]
    arrival_s: Vector
    prompts: Vector
    answers: Vector
    scores: Vector
    profiles: tuple[TaskProfile, ...]
    blocks: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.arrival_s)


def workload(
    trace: str,
    portfolio: Portfolio,
    rows: NDArray[np.int64],
    count: int,
    seed: int,
    data: str | None = None,
) -> Workload:
    """A part of a recording, beginning at a random place, with prompts of a portfolio.

    Args:
        trace: one of TRACES.
        portfolio: the prompts and their scores.
        rows: numbers of the prompts that may be used; they repeat if there are fewer than requests.
        count: number of requests.
        seed: of the place and of the choice of the prompts.
        data: folder of the recordings.

    Raises:
        SystemExit: the recording is missing.
    """
    rng = np.random.default_rng(seed)
    folder = data_folder(data) / "load"
    lengths = _read(folder, "azure_conv" if trace == "servegen_rates" else trace)
    count = min(count, len(lengths))
    start = int(rng.integers(len(lengths) - count + 1))
    part = lengths.iloc[start : start + count]
    if trace == "servegen_rates":
        arrival = _by_rates(_read(folder, trace), count, rng)
    else:
        arrival = part.arrival_s.to_numpy(float)
        arrival = np.sort(arrival - arrival[0])
    arrival = arrival * (count / max(float(arrival[-1]), 1e-9))
    shuffled = np.concatenate(
        [rng.permutation(rows) for _ in range(-(-count // len(rows)))]
    )[:count]
    prompts = np.minimum(part.prompt_tokens.to_numpy(float), LONGEST)
    own = np.array([portfolio.profiles[row].prompt_tokens for row in shuffled])
    chosen = np.empty(count, dtype=np.int64)
    chosen[np.argsort(prompts, kind="stable")] = shuffled[
        np.argsort(own, kind="stable")
    ]
    answers = np.maximum(1.0, part.output_tokens.to_numpy(float))[:, None] * _ratios(
        portfolio, chosen
    )
    profiles = tuple(
        replace(portfolio.profiles[row], prompt_tokens=int(tokens), max_output_tokens=0)
        for row, tokens in zip(chosen, prompts, strict=True)
    )
    blocks: tuple[tuple[int, ...], ...] = ((),) * count
    if "block_hashes" in part:
        blocks = tuple(tuple(int(b) for b in ids) for ids in part.block_hashes)
    return Workload(
        chosen,
        arrival,
        prompts,
        np.maximum(1.0, np.round(answers)),
        portfolio.scores[chosen],
        profiles,
        blocks,
    )


def recorded_arrivals(trace: str, data: str | None = None) -> Vector:
    """[N] seconds of the arrivals of a whole recording, ascending.

    Raises:
        SystemExit: the recording is missing.
    """
    recording = _read(data_folder(data) / "load", trace)
    return np.sort(recording.arrival_s.to_numpy(float))


def recorded_rate(trace: str, data: str | None = None) -> float:
    """Requests a second in a recording with arrivals, in the mean.

    Raises:
        SystemExit: the recording is missing.
    """
    arrival = recorded_arrivals(trace, data)
    return len(arrival) / float(arrival[-1] - arrival[0])


def _read(folder: Path, trace: str) -> pd.DataFrame:
    path = folder / f"{trace}.parquet"
    if not path.is_file():
        raise SystemExit(
            f"no recorded load at {path}; docs/benchmarks/cluster.md names its source"
        )
    return pd.read_parquet(path)


def _by_rates(rates: pd.DataFrame, count: int, rng: np.random.Generator) -> Vector:
    """Arrivals by the rates and variations of all sizes together: gamma gaps, window by window, a day in `count`."""
    by_window = rates.groupby("window_s")
    rate = by_window.requests_per_s.sum().to_numpy()
    weight = rates.requests_per_s * rates.interarrival_cv
    cv = weight.groupby(rates.window_s).sum().to_numpy() / np.maximum(rate, 1e-9)
    day = min(144, len(rate))
    first = int(rng.integers(len(rate) - day + 1))
    rate = rate[first : first + day]
    cv = np.clip(cv[first : first + day], 0.2, 5.0)
    counts = np.maximum(1, np.round(count * rate / rate.sum())).astype(int)
    arrivals: list[Vector] = []
    for n, (number, variation) in enumerate(zip(counts, cv, strict=True)):
        shape = 1.0 / variation**2
        gaps = rng.gamma(shape, 1.0, int(number) + 1)
        places = np.cumsum(gaps)[:-1] / gaps.sum()
        arrivals.append(n + places)
    found = np.sort(np.concatenate(arrivals))
    return np.asarray(
        np.interp(np.linspace(0, len(found) - 1, count), np.arange(len(found)), found)
    )


def _ratios(portfolio: Portfolio, rows: NDArray[np.int64]) -> Vector:
    """[N, K] length of each arm's answer as a share of the arms' mean; 1 where no lengths were recorded."""
    recorded = portfolio.output_tokens[rows]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = recorded / recorded.mean(axis=1, keepdims=True)
    return np.clip(np.nan_to_num(ratio, nan=1.0, posinf=1.0), *RATIOS)
