"""The numbers behind the figures: each function takes a log and gives a table."""

from typing import Any

import numpy as np
import pandas as pd

from notebooks.log import DecisionLog
from policies.calibration import Reliability, reliability
from policies.ledger import Record
from policies.offpolicy import confidence_sequence, estimate, fit_predictions
from policies.overlap import Log, UnanswerableError, overlap
from policies.registry import make_policy
from policies.replay import arms_of, score, target_probabilities, to_log, usable, utility
from policies.types import Vector
from policies.window import regret

LEVEL = 0.95


def decisions(log: DecisionLog) -> pd.DataFrame:
    """A row a routed decision: n, time_s, kind, arm, propensity, expected and seen quality, latency, utility, regret;
    NaN where nothing is known.
    """
    rows = []
    for n, record in enumerate(log.records):
        decision, outcome, chosen = record.decision, record.outcome, record.decision.estimate()
        ok = outcome is not None and outcome.status == "ok"
        rows.append(
            {
                "n": n,
                "time_s": decision.time_s,
                "kind": decision.profile.kind,
                "arm": decision.arm,
                "propensity": chosen.propensity,
                "expected": chosen.quality,
                "score": score(record),
                "scored": bool(record.said()),
                "sufficiency": decision.profile.sufficiency.get(decision.arm, np.nan),
                "fitted": decision.profile.profiler_version > 0,
                "latency_s": outcome.latency_s if ok and outcome else np.nan,
                "expected_latency_s": chosen.latency_s,
                "cost_usd": outcome.cost_usd if outcome else np.nan,
                "utility": utility(record),
                "regret": regret(decision),
            }
        )
    return pd.DataFrame(rows)


def measured_regret(log: DecisionLog) -> pd.DataFrame | None:
    """Cumulative utility lost by each strategy against the best arm of each single task; columns are strategies.

    No strategy could know the best arm of a task beforehand: it depends on what each model happens to answer.
    """
    if log.truth is None:
        return None
    table = log.truth.pivot(index="i", columns="strategy", values="utility")
    best = table[log.names].max(axis=1)
    return table.rsub(best, axis=0).cumsum()


def posterior(log: DecisionLog) -> pd.DataFrame:
    """Expected score of each arm on the mean request of each kind, with its standard deviation, and what was seen."""
    policy, frame = log.learned(), decisions(log)
    rows = []
    for kind, part in frame.groupby("kind"):
        features = np.array([log.records[n].decision.profile.features for n in part.n])
        mean, variance = policy.quality.predict(features)  # type: ignore[attr-defined]
        for k, arm in enumerate(log.names):
            seen = part[(part.arm == arm) & part.score.notna()].score
            row = {"kind": kind, "arm": arm, "requests": len(part), "mean": mean[:, k].mean()}
            rows.append(row | {"sd": np.sqrt(variance[:, k].mean()), "seen": seen.mean(), "answers": len(seen)})
    return pd.DataFrame(rows)


def strategies(log: DecisionLog) -> pd.DataFrame:
    """Quality, cost and latency of each strategy: measured on the same tasks, or else of the log's own choices."""
    if log.truth is not None:
        grouped = log.truth.groupby("strategy", sort=False)
        means = grouped[["right", "latency_s", "cost_usd", "utility"]].mean()
        return means.rename(columns={"right": "quality"}).reset_index()
    frame = decisions(log)
    parts = {"auto": frame} | {f"{arm}, where chosen": frame[frame.arm == arm] for arm in log.names}
    figures = {"quality": "score", "latency_s": "latency_s", "cost_usd": "cost_usd", "utility": "utility"}
    return pd.DataFrame(
        [{"strategy": name, **{to: part[of].mean() for to, of in figures.items()}} for name, part in parts.items()]
    )


def targets(log: DecisionLog) -> dict[str, tuple[Any, int]]:
    """The policies to be judged, each with the number of the routed decision from which on it is judged."""
    third, half = len(log.records) // 3, len(log.records) // 2
    fixed = {arm: (make_policy("always", log.arms, {"arm": arm}), 0) for arm in log.names}
    static = {"static rules": (make_policy("static", log.arms), 0)}
    champion = {"champion: learned from a third": (log.learned(third), half)}
    return fixed | static | champion | {"challenger: learned from half": (log.learned(half), half)}


def by_chance(log: DecisionLog, records: list[Record], arms: tuple[str, ...]) -> Log:
    """The log that there would be if chance had decided these tasks: the demo measured every arm on each of them."""
    assert log.truth is not None
    rows = {record.decision.id: n for n, record in enumerate(log.records)}
    tasks = [rows[record.decision.id] for record in records]
    may = np.array([arm in log.names for arm in arms])
    utilities = log.truth.pivot(index="i", columns="strategy", values="utility").reindex(columns=list(arms)).to_numpy()
    chosen = np.random.default_rng(0).choice(np.flatnonzero(may), len(records))
    rewards = np.clip(utilities[tasks, chosen], -1, 1)
    features = np.array([record.decision.profile.features for record in records])
    guesses = fit_predictions(features, chosen, rewards, len(arms))
    return Log(chosen, np.tile(may / may.sum(), (len(records), 1)), rewards, guesses, bounds=(-1.0, 1.0))


def evaluations(log: DecisionLog, explored: bool = False) -> pd.DataFrame:
    """Off-policy evaluation of each target: IPS, SNIPS and DR with intervals, a confidence sequence, the overlap, and
    the measured value where there is one. Without an answer, `refused` says why.

    Args:
        log: with the decisions; where `explored`, with what was measured, too.
        explored: from the log of `by_chance` instead.
    """
    truth = strategies(log).set_index("strategy").utility if log.truth is not None else {}
    rows = []
    for name, (policy, begin) in targets(log).items():
        records = usable(log.records[begin:])
        arms = arms_of(records, policy)
        data = by_chance(log, records, arms) if explored else to_log(records, arms)
        wanted = target_probabilities(records, policy, arms)
        found = overlap(data, wanted)
        row: dict[str, Any] = {"target": name, "decisions": found.decisions, "ess": found.ess}
        row |= {"unsupported": found.unsupported, "measured": truth.get(name, np.nan), "refused": ""}
        try:
            for estimator in ("ips", "snips", "dr"):
                got = estimate(data, wanted, estimator, level=LEVEL)
                row |= {estimator: got.value, f"{estimator}_low": got.low, f"{estimator}_high": got.high}
            low, high = confidence_sequence(data, wanted, level=LEVEL)
            row |= {"sequence_low": low[-1], "sequence_high": high[-1]}
        except UnanswerableError as error:
            row["refused"] = str(error)
        rows.append(row)
    return pd.DataFrame(rows)


def calibrations(log: DecisionLog) -> dict[str, Reliability]:
    """How well what was said before each answer held: the policy's expected score, the profiler's sufficiency."""
    frame = decisions(log).dropna(subset=["score"])
    fitted = frame[frame.fitted]
    return {
        "expected score (router)": reliability(frame.expected.clip(0, 1).to_numpy(), frame.score.to_numpy()),
        "chance to suffice (profiler)": reliability(
            fitted.sufficiency.to_numpy(), (fitted.score >= 0.5).to_numpy(float)
        ),
    }


def drift(log: DecisionLog, window: int = 100) -> pd.DataFrame:
    """Rolling means, each with its standard error: score less expected, and ln latency less ln expected."""
    frame = decisions(log)
    residuals = {
        "score": frame.score - frame.expected,
        "latency": np.log(frame.latency_s.clip(1e-3)) - np.log(frame.expected_latency_s.clip(1e-3)),
    }
    out = {"n": frame.n}
    for name, values in residuals.items():
        rolling = values.rolling(window, min_periods=window // 2)
        out |= {name: rolling.mean(), f"{name}_se": rolling.std() / np.sqrt(rolling.count())}
    return pd.DataFrame(out)


def feature_drift(log: DecisionLog) -> Vector:
    """Of each feature: the mean of the last third less that of the first, in standard errors of this difference."""
    features = np.array([record.decision.profile.features for record in log.records])
    third = len(features) // 3
    first, last = features[:third], features[-third:]
    error = np.sqrt(first.var(axis=0) / third + last.var(axis=0) / third)
    return np.divide(last.mean(axis=0) - first.mean(axis=0), error, out=np.zeros(features.shape[1]), where=error > 0)
