"""Calibration of the profiler's forecasts on recorded public streams: `python -m benchmarks.statistics.calibration`.

The router's policy plays each stream and sees the score of the arm that it chose. After every 500 requests the
profiler is fitted on their results and then forecasts the next 500.

For each portfolio the command prints the Brier score and the expected calibration error of the probability that an
answer suffices, on the answers of the chosen arms and on those of all arms, and the error of the expected output
tokens. It saves a reliability diagram.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.decisions.bounds import order_of
from benchmarks.decisions.streams import PORTFOLIOS, Portfolio, load
from policies.evaluation.simulate import simulate
from policies.events import Decision, Outcome, Record
from policies.profiling.calibration import reliability
from policies.profiling.forecast import SUFFICIENT, Forecaster, usual_tokens
from policies.registry import make_policy
from policies.types import Arm, Objective, Vector

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLOCK = 500  # requests between two fits of the profiler
MIN_IN_BIN = 10  # bins with fewer answers are not drawn: their share is mostly chance
MAX_RECORDS = 10_000  # the router keeps as many decision records


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Forecasts for the M requests after the first BLOCK, made before their answers, and the answers.

    probability: [M, K] calibrated probability that an answer suffices.
    raw: [M, K] the same before Platt scaling.
    by_arm: [M, K] share of each arm's earlier answers that sufficed.
    sufficed: [M, K] 1 if the answer sufficed.
    chosen: [M] index of the chosen arm.
    expected: [M] output tokens, forecast by the learned model.
    usual: [M] output tokens, from the table by kind of prompt.
    tokens: [M] output tokens of the answer.
    last: the forecaster's own figures after the last fit.
    fit_s: seconds of the longest fit.
    """

    probability: Vector
    raw: Vector
    by_arm: Vector
    sufficed: Vector
    chosen: Vector
    expected: Vector
    usual: Vector
    tokens: Vector
    last: dict[str, Any]
    fit_s: float


def forecast_blocks(
    portfolio: Portfolio, order: Vector, policy: str, cost_weight: float, seed: int
) -> Forecasts:
    """Play the stream and forecast each block from the requests before it."""
    stream = portfolio.stream(order)
    rng = np.random.default_rng(seed)
    chosen = simulate(
        make_policy(policy, stream.arms_at(0)),
        stream,
        Objective(cost_weight=cost_weight),
        rng,
    ).chosen
    arms = tuple(Arm(name) for name in stream.arms)
    records = list(_records(portfolio, order, chosen))
    profiles = [record.decision.profile for record in records]
    features = np.stack([profile.features for profile in profiles])
    usual = np.array([profile.output_tokens for profile in profiles])
    sufficed = (stream.scores >= SUFFICIENT).astype(float)
    columns: list[list[Vector]] = [[], [], [], []]
    forecaster = Forecaster.prior(arms)
    longest = 0.0
    for start in range(BLOCK, len(order), BLOCK):
        began = time.perf_counter()
        forecaster = forecaster.refit(records[max(0, start - MAX_RECORDS) : start])
        longest = max(longest, time.perf_counter() - began)
        block = slice(start, start + BLOCK)
        expected, probability = forecaster.predict(features[block], usual[block])
        plain = replace(forecaster, platt=np.tile([1.0, 0.0], (len(arms), 1)))
        hits = np.bincount(
            chosen[:start], sufficed[np.arange(start), chosen[:start]], len(arms)
        )
        share = (1 + hits) / (2 + np.bincount(chosen[:start], minlength=len(arms)))
        parts = (
            probability,
            plain.predict(features[block], usual[block])[1],
            np.tile(share, (len(probability), 1)),
        )
        for column, part in zip(columns, (*parts, expected), strict=True):
            column.append(part)
    tokens = portfolio.output_tokens[order, chosen]
    probability, raw, by_arm, expected = (np.concatenate(column) for column in columns)
    return Forecasts(
        probability=probability,
        raw=raw,
        by_arm=by_arm,
        sufficed=sufficed[BLOCK:],
        chosen=chosen[BLOCK:],
        expected=expected,
        usual=usual[BLOCK:],
        tokens=tokens[BLOCK:],
        last=forecaster.reliability(),
        fit_s=longest,
    )


def _records(portfolio: Portfolio, order: Vector, chosen: Vector) -> Iterator[Record]:
    """The decision records of the stream, without the benchmark's limit of one output token."""
    for n, (row, k) in enumerate(zip(order, chosen, strict=True)):
        profile = portfolio.profiles[row]
        profile = replace(
            profile, max_output_tokens=0, output_tokens=usual_tokens(profile.kind)
        )
        decision = Decision(
            str(n), portfolio.arms[k], n, "recorded", profile, Objective()
        )
        tokens = portfolio.output_tokens[row, k]
        outcome = Outcome(
            str(n), "ok", output_tokens=int(tokens) if np.isfinite(tokens) else 0
        )
        yield Record(decision, outcome, {"recorded": float(portfolio.scores[row, k])})


def figures(found: Forecasts) -> dict[str, float]:
    """A row of the table."""
    rows = np.arange(len(found.chosen))
    at = (rows, found.chosen)
    mine = reliability(found.probability[at], found.sufficed[at])
    raw = reliability(found.raw[at], found.sufficed[at])
    share = reliability(found.by_arm[at], found.sufficed[at])
    everywhere = reliability(found.probability.ravel(), found.sufficed.ravel())
    plain = reliability(found.by_arm.ravel(), found.sufficed.ravel())
    row = {
        "n": float(len(rows)),
        "Brier": mine.brier,
        "Brier by arm": share.brier,
        "ECE": mine.ece,
        "ECE before Platt": raw.ece,
        "ECE it reports": found.last["ece"],
        "Brier, all arms": everywhere.brier,
        "Brier by arm, all arms": plain.brier,
        "ECE, all arms": everywhere.ece,
    }
    known = found.tokens > 0
    if known.any():
        tokens = found.tokens[known]
        row["log tokens RMSE"] = log_error(found.expected[known], tokens)
        row["of the table"] = log_error(found.usual[known], tokens)
        row["mean tokens"] = float(found.tokens[known].mean())
        row["mean expected"] = float(found.expected[known].mean())
    return row | {"longest fit, s": found.fit_s}


def log_error(predicted: Vector, actual: Vector) -> float:
    """Root mean square error of log(1 + tokens)."""
    errors = np.log1p(predicted) - np.log1p(actual)
    return float(np.sqrt(np.mean(errors**2)))


def picture(found: dict[str, list[Forecasts]], folder: Path) -> Path:
    """Draw reliability diagrams: the share that sufficed against the probability.

    The area of a dot is proportional to the number of answers in its bin.
    """
    columns = min(4, len(found))
    shape = {"layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(
        -(-len(found) // columns), columns, figsize=(3.6 * columns, 7.2), **shape
    )
    for axis, (name, runs) in zip(axes.flat, found.items(), strict=False):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for label, everywhere, colour in (
            ("all arms", True, "tab:orange"),
            ("chosen arm", False, "tab:blue"),
        ):
            predicted = []
            sufficed = []
            for run in runs:
                rows = np.arange(len(run.chosen))
                at = ... if everywhere else (rows, run.chosen)
                predicted.append(run.probability[at].ravel())
                sufficed.append(run.sufficed[at].ravel())
            held = reliability(np.concatenate(predicted), np.concatenate(sufficed))
            bins = held.table[held.table[:, 2] >= MIN_IN_BIN]
            area = 400 * bins[:, 2] / bins[:, 2].sum()
            axis.scatter(
                bins[:, 0],
                bins[:, 1],
                area,
                alpha=0.75,
                color=colour,
                label=f"{label}, ECE {held.ece:.3f}",
            )
            axis.plot(bins[:, 0], bins[:, 1], linewidth=0.8, color=colour)
        axis.set(
            title=name,
            xlabel="forecast probability",
            ylabel="share that sufficed",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        legend = axis.legend(fontsize=8, loc="upper left")
        for handle in legend.legend_handles:
            handle.set_sizes([30])
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    path = folder / "reliability.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main() -> None:
    """Play all portfolios, print the table and save the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="folder of the recorded streams; default: ROUTER_DATA"
    )
    parser.add_argument(
        "--portfolio", nargs="+", default=list(PORTFOLIOS), choices=PORTFOLIOS
    )
    parser.add_argument("--shuffles", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument(
        "--split", nargs="+", default=["train", "dev"], choices=("train", "dev")
    )
    parser.add_argument(
        "--policy",
        default="thompson",
        help="the policy that chooses the arms",
    )
    parser.add_argument("--cost-weight", type=float, default=0.1)
    parser.add_argument(
        "--out", type=Path, default=Path("var"), help="folder of the picture"
    )
    arguments = parser.parse_args()
    found: dict[str, list[Forecasts]] = {name: [] for name in arguments.portfolio}
    for name in tqdm(arguments.portfolio, unit="portfolio"):
        portfolio = load(name, tuple(arguments.split), arguments.data)
        for shuffle in range(arguments.shuffles):
            order = order_of(portfolio, shuffle, arguments.requests)
            found[name].append(
                forecast_blocks(
                    portfolio, order, arguments.policy, arguments.cost_weight, shuffle
                )
            )
    rows = [
        {"portfolio": name, **pd.DataFrame([figures(f) for f in runs]).mean().to_dict()}
        for name, runs in found.items()
    ]
    print(pd.DataFrame(rows).round(4).to_markdown(index=False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"picture: {picture(found, arguments.out)}")


if __name__ == "__main__":
    main()
