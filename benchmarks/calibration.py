"""Do the profiler's forecasts hold, on recorded public streams: `python -m benchmarks.calibration`.

The router's policy plays each stream and sees the score of the arm it chose; after every 500 requests the profiler is
fitted on what came of them, and then foretells the next 500. Prints for each portfolio the Brier score and expected
calibration error of the probability that an answer suffices, on the chosen arms' answers and on all arms', and the
error of the expected output tokens; saves a reliability diagram.
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

from benchmarks.portfolios import PORTFOLIOS, Portfolio, load
from benchmarks.quality import order_of
from policies.calibration import reliability
from policies.evaluate import play
from policies.forecast import SUFFICIENT, Forecaster, usual_tokens
from policies.ledger import Record
from policies.registry import make_policy
from policies.types import Arm, Decision, Objective, Outcome, Vector

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVERY = 500
FEW = 10  # answers in a bin, below which its share is chance and is not drawn
KEPT = 10_000  # records, as many as the router's ledger keeps


@dataclass(frozen=True, eq=False)
class Foretold:
    """What was said of the requests after the first EVERY, before they were answered.

    probability, raw, by_arm: [M, K] that an answer suffices: calibrated, before Platt scaling, and each arm's share
    so far. sufficed: [M, K]. chosen: [M]. expected, usual: [M] tokens, learned and by kind. tokens: [M] of the answer.
    last: the forecaster's own figures after the last fit. fit_s: seconds of the longest fit.
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


def foretell(portfolio: Portfolio, order: Vector, policy: str, cost_weight: float, seed: int) -> Foretold:
    """Play the stream, and have each block of it foretold by what came before."""
    stream = portfolio.stream(order)
    rng = np.random.default_rng(seed)
    chosen = play(make_policy(policy, stream.arms_at(0)), stream, Objective(cost_weight=cost_weight), rng).chosen
    arms = tuple(Arm(name) for name in stream.arms)
    records = list(_records(portfolio, order, chosen))
    profiles = [record.decision.profile for record in records]
    features = np.stack([profile.features for profile in profiles])
    usual = np.array([profile.output_tokens for profile in profiles])
    sufficed = (stream.scores >= SUFFICIENT).astype(float)
    columns: list[list[Vector]] = [[], [], [], []]
    forecaster, longest = Forecaster.prior(arms), 0.0
    for start in range(EVERY, len(order), EVERY):
        began = time.perf_counter()
        forecaster = forecaster.refit(records[max(0, start - KEPT) : start])
        longest = max(longest, time.perf_counter() - began)
        block = slice(start, start + EVERY)
        expected, probability = forecaster.predict(features[block], usual[block])
        plain = replace(forecaster, platt=np.tile([1.0, 0.0], (len(arms), 1)))
        hits = np.bincount(chosen[:start], sufficed[np.arange(start), chosen[:start]], len(arms))
        share = (1 + hits) / (2 + np.bincount(chosen[:start], minlength=len(arms)))
        parts = (probability, plain.predict(features[block], usual[block])[1], np.tile(share, (len(probability), 1)))
        for column, part in zip(columns, (*parts, expected), strict=True):
            column.append(part)
    tokens = portfolio.output_tokens[order, chosen]
    probability, raw, by_arm, expected = (np.concatenate(column) for column in columns)
    rest = (sufficed[EVERY:], chosen[EVERY:], expected, usual[EVERY:], tokens[EVERY:])
    return Foretold(probability, raw, by_arm, *rest, forecaster.reliability(), longest)


def _records(portfolio: Portfolio, order: Vector, chosen: Vector) -> Iterator[Record]:
    """The stream as the router's ledger would hold it, without the benchmark's limit of one token."""
    for n, (row, k) in enumerate(zip(order, chosen, strict=True)):
        profile = portfolio.profiles[row]
        profile = replace(profile, max_output_tokens=0, output_tokens=usual_tokens(profile.kind))
        decision = Decision(str(n), portfolio.arms[k], n, "recorded", profile, Objective())
        tokens = portfolio.output_tokens[row, k]
        outcome = Outcome(str(n), "ok", output_tokens=int(tokens) if np.isfinite(tokens) else 0)
        yield Record(decision, outcome, {"recorded": float(portfolio.scores[row, k])})


def figures(found: Foretold) -> dict[str, float]:
    """One row of the table."""
    rows = np.arange(len(found.chosen))
    at = (rows, found.chosen)
    mine, raw = (reliability(p[at], found.sufficed[at]) for p in (found.probability, found.raw))
    share = reliability(found.by_arm[at], found.sufficed[at])
    everywhere = reliability(found.probability.ravel(), found.sufficed.ravel())
    plain = reliability(found.by_arm.ravel(), found.sufficed.ravel())
    row = {"n": float(len(rows)), "Brier": mine.brier, "Brier by arm": share.brier, "ECE": mine.ece}
    row |= {"ECE before Platt": raw.ece, "ECE it reports": found.last["ece"]}
    row |= {"Brier, all arms": everywhere.brier, "Brier by arm, all arms": plain.brier, "ECE, all arms": everywhere.ece}
    known = found.tokens > 0
    if known.any():
        said = (found.expected, found.usual)
        row["log tokens RMSE"], row["of the table"] = (
            float(np.sqrt(np.mean((np.log1p(s[known]) - np.log1p(found.tokens[known])) ** 2))) for s in said
        )
        row["mean tokens"], row["mean expected"] = (
            float(found.tokens[known].mean()),
            float(found.expected[known].mean()),
        )
    return row | {"longest fit, s": found.fit_s}


def picture(found: dict[str, list[Foretold]], folder: Path) -> Path:
    """Reliability diagrams: share that sufficed against the probability said; the area of a dot is its answers."""
    columns = min(4, len(found))
    shape = {"layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(-(-len(found) // columns), columns, figsize=(3.6 * columns, 7.2), **shape)
    for axis, (name, runs) in zip(axes.flat, found.items(), strict=False):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for label, everywhere, colour in (("all arms", True, "tab:orange"), ("chosen arm", False, "tab:blue")):
            pairs = [
                (f.probability, f.sufficed)
                if everywhere
                else tuple(part[np.arange(len(f.chosen)), f.chosen] for part in (f.probability, f.sufficed))
                for f in runs
            ]
            said, seen = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
            held = reliability(said, seen)
            bins = held.table[held.table[:, 2] >= FEW]
            area = 400 * bins[:, 2] / bins[:, 2].sum()
            axis.scatter(bins[:, 0], bins[:, 1], area, alpha=0.75, color=colour, label=f"{label}, ECE {held.ece:.3f}")
            axis.plot(bins[:, 0], bins[:, 1], linewidth=0.8, color=colour)
        axis.set(title=name, xlabel="probability said", ylabel="share that sufficed", xlim=(0, 1), ylim=(0, 1))
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
    """Play everything and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the recorded streams; default: ROUTER_DATA")
    parser.add_argument("--portfolio", nargs="+", default=list(PORTFOLIOS), choices=PORTFOLIOS)
    parser.add_argument("--shuffles", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--split", nargs="+", default=["train", "dev"], choices=("train", "dev"))
    parser.add_argument("--policy", default="thompson", help="who chooses the arms that are learned from")
    parser.add_argument("--cost-weight", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("var"), help="folder of the picture")
    arguments = parser.parse_args()
    found: dict[str, list[Foretold]] = {name: [] for name in arguments.portfolio}
    for name in tqdm(arguments.portfolio, unit="portfolio"):
        portfolio = load(name, tuple(arguments.split), arguments.data)
        for shuffle in range(arguments.shuffles):
            order = order_of(portfolio, shuffle, arguments.requests)
            found[name].append(foretell(portfolio, order, arguments.policy, arguments.cost_weight, shuffle))
    rows = [
        {"portfolio": name, **pd.DataFrame([figures(f) for f in runs]).mean().to_dict()} for name, runs in found.items()
    ]
    print(pd.DataFrame(rows).round(4).to_markdown(index=False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"picture: {picture(found, arguments.out)}")


if __name__ == "__main__":
    main()
