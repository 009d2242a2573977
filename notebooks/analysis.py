"""Computes the numbers behind the figures: each function takes a log and returns a table.

Where a table compares several sizes or policies, its intervals hold for all rows together (intervals.py).
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from notebooks.decision_log import DecisionLog
from notebooks.intervals import level_of, mean_interval, z_of
from policies.evaluation.kind_figures import SIZE, interval, regret
from policies.evaluation.offpolicy import confidence_sequence, estimate
from policies.evaluation.outcome_model import fit_predictions
from policies.evaluation.overlap import (
    MIN_FEEDBACK,
    LoggedDecisions,
    UnanswerableError,
    overlap,
)
from policies.evaluation.replay import (
    arms_of,
    evaluable,
    score,
    target_probabilities,
    to_log,
    utility,
)
from policies.events import Record
from policies.profiling.calibration import Reliability, reliability
from policies.profiling.features import names_of
from policies.registry import make_policy
from policies.rollout.first_day import RANDOMISED
from policies.rollout.observation import leaves_choice
from policies.worth import is_estimated

ESTIMATORS = ("ips", "snips", "dr")
DRIFT_LEAST = 50  # values of a window of twice as many decisions
CHOSEN = ", where chosen"  # end of the name of a row that has other requests than the other rows


def decisions(log: DecisionLog) -> pd.DataFrame:
    """One row for each routed decision: n, time_s, kind, arm, propensity, expected and observed quality, latency,
    utility and regret. Unknown values are NaN.
    """
    rows = []
    for n, record in enumerate(log.records):
        decision = record.decision
        outcome = record.outcome
        chosen = record.decision.estimate()
        estimated = is_estimated(chosen)
        ok = outcome is not None and outcome.status == "ok"
        rows.append(
            {
                "n": n,
                "time_s": decision.time_s,
                "kind": decision.profile.kind,
                "arm": decision.arm,
                "propensity": chosen.propensity,
                "expected": chosen.quality if estimated else np.nan,
                "score": score(record),
                "scored": bool(record.explicit_scores()),
                "sufficiency": decision.profile.sufficiency.get(decision.arm, np.nan),
                "fitted": decision.profile.profiler_version > 0,
                "latency_s": outcome.latency_s if ok and outcome else np.nan,
                "expected_latency_s": chosen.latency_s if estimated else np.nan,
                "cost_usd": outcome.cost_usd if outcome else np.nan,
                "utility": utility(record),
                "regret": regret(decision),
            }
        )
    return pd.DataFrame(rows)


def first_day(log: DecisionLog) -> pd.DataFrame:
    """What a policy would have done beside the team's rule, by kind and for all kinds; empty without a first day.

    Columns: the number of requests that left a choice, the share of them for which rule and policy choose the same
    arm, and the means of what the policy expected to change per request (its own estimates).
    """
    rows = []
    for record in log.records:
        decision = record.decision
        if decision.fallback not in RANDOMISED or not leaves_choice(decision):
            continue
        own = decision.tried_estimate(decision.shadow)
        other = decision.tried_estimate(decision.rule)
        rows.append(
            {
                "kind": decision.profile.kind,
                "agreement": float(decision.rule == decision.shadow),
                "expected_score": own.quality - other.quality,
                "expected_latency_s": own.latency_s - other.latency_s,
                "expected_cost_usd": own.cost_usd - other.cost_usd,
                "expected_utility": own.utility - other.utility,
            }
        )
    columns = ["requests", "agreement", "expected_score", "expected_latency_s"]
    columns += ["expected_cost_usd", "expected_utility"]
    if not rows:
        return pd.DataFrame(columns=columns)
    table = pd.DataFrame(rows)
    table = pd.concat([table, table.assign(kind="all")])
    grouped = table.groupby("kind", sort=False)
    return grouped.mean().assign(requests=grouped.size())[columns]


def measured_regret(log: DecisionLog) -> pd.DataFrame | None:
    """Cumulative utility that each strategy (column) lost against the best arm of each single task; None if unmeasured.

    No strategy could know the best arm of a task beforehand: it depends on what each model happens to answer.
    """
    if log.truth is None:
        return None
    table = log.truth.pivot(index="i", columns="strategy", values="utility")
    best = table[log.names].max(axis=1)
    return table.rsub(best, axis=0).cumsum()


def posterior(log: DecisionLog) -> pd.DataFrame:
    """Expected score and standard deviation of each arm on each kind of request, and mean of the observed scores."""
    policy = log.learned()
    frame = decisions(log)
    rows = []
    for kind, part in frame.groupby("kind"):
        features = np.array([log.records[n].decision.profile.features for n in part.n])
        mean, variance = policy.quality.predict(features)  # type: ignore[attr-defined]
        for k, arm in enumerate(log.names):
            seen = part[(part.arm == arm) & part.score.notna()].score
            row = {
                "kind": kind,
                "arm": arm,
                "requests": len(part),
                "mean": mean[:, k].mean(),
            }
            rows.append(
                row
                | {
                    "sd": np.sqrt(variance[:, k].mean()),
                    "seen": seen.mean(),
                    "answers": len(seen),
                }
            )
    return pd.DataFrame(rows)


def kinds(log: DecisionLog, size: int = SIZE) -> pd.DataFrame:
    """One row for each kind and arm with decisions: the figures of the latest decisions, as in the router's state.

    The intervals of the state hold for one cell. Those from together_low to together_high hold for all cells together.

    Args:
        log: the log.
        size: number of decisions in the window.
    """
    table = log.counted(size).figures.table()
    rows = [
        {"kind": kind, "arm": arm, **asdict(figures)}
        for arm in log.names
        for kind, figures in table.kinds.get(arm, {}).items()
    ]
    frame = pd.DataFrame(rows)
    figures = [name for name in frame.columns if name not in ("kind", "arm")]
    frame = frame.astype(dict.fromkeys(figures, float))
    z = z_of(int((frame.votes > 0).sum()))
    bounds = [
        interval(row.score, row.votes, z) if row.votes > 0 else (np.nan, np.nan)
        for row in frame.itertuples()
    ]
    return frame.assign(
        together_low=[low for low, _ in bounds],
        together_high=[high for _, high in bounds],
    )


def strategies(log: DecisionLog) -> pd.DataFrame:
    """Quality, cost, latency and utility of each strategy, with n and intervals that hold for all strategies together.

    Measured on the same tasks, if there are measurements. Otherwise there is `auto` alone; the other rows are the
    requests for which it chose an arm. They are not `comparable`: the router chose which requests they are.
    """
    if log.truth is not None:
        frame = log.truth.rename(columns={"right": "score"})
        parts = {
            name: frame[frame.strategy == name] for name in frame.strategy.unique()
        }
    else:
        frame = decisions(log)
        parts = {"auto": frame} | {
            f"{arm}{CHOSEN}": frame[frame.arm == arm] for arm in log.names
        }
    figures = {"quality": "score", "utility": "utility"}
    rows = []
    for name, part in parts.items():
        row: dict[str, Any] = {
            "strategy": name,
            "requests": len(part),
            "scored": int(part.score.notna().sum()),
            "comparable": log.truth is not None or name == "auto",
        }
        for figure, column in figures.items():
            mean, low, high = mean_interval(part[column], len(parts))
            row |= {figure: mean, f"{figure}_low": low, f"{figure}_high": high}
        row |= {"latency_s": part.latency_s.mean(), "cost_usd": part.cost_usd.mean()}
        rows.append(row)
    return pd.DataFrame(rows)


def targets(log: DecisionLog) -> dict[str, tuple[Any, int]]:
    """The policies to evaluate, each with the number of the first routed decision on which it is evaluated."""
    third = len(log.records) // 3
    half = len(log.records) // 2
    fixed = {
        arm: (make_policy("always", log.arms, {"arm": arm}), 0) for arm in log.names
    }
    static = {"static rules": (make_policy("static", log.arms), 0)}
    champion = {"champion: learned from a third": (log.learned(third), half)}
    return (
        fixed
        | static
        | champion
        | {"challenger: learned from half": (log.learned(half), half)}
    )


def by_chance(
    log: DecisionLog, records: list[Record], arms: tuple[str, ...]
) -> LoggedDecisions:
    """The log of a policy that decides at random on these tasks, made from the demo's measurements of every arm."""
    assert log.truth is not None
    rows = {record.decision.id: n for n, record in enumerate(log.records)}
    tasks = [rows[record.decision.id] for record in records]
    may = np.array([arm in log.names for arm in arms])
    utilities = (
        log.truth.pivot(index="i", columns="strategy", values="utility")
        .reindex(columns=list(arms))
        .to_numpy()
    )
    chosen = np.random.default_rng(0).choice(np.flatnonzero(may), len(records))
    rewards = np.clip(utilities[tasks, chosen], -1, 1)
    features = np.array([record.decision.profile.features for record in records])
    guesses = fit_predictions(features, chosen, rewards, len(arms))
    return LoggedDecisions(
        chosen,
        np.tile(may / may.sum(), (len(records), 1)),
        rewards,
        guesses,
        bounds=(-1.0, 1.0),
    )


def evaluations(log: DecisionLog, explored: bool = False) -> pd.DataFrame:
    """Off-policy evaluation of each target: IPS, SNIPS and DR with intervals, a confidence sequence, the overlap, and
    the measured value if there is one. If the log cannot answer, `refused` says why.

    The intervals of one estimator hold for all targets together.

    Args:
        log: the log; `explored` needs its measurements, too.
        explored: evaluate on the log of `by_chance` instead.
    """
    truth = (
        strategies(log).set_index("strategy").utility if log.truth is not None else {}
    )
    rows = []
    asked = targets(log)
    level = level_of(len(asked))
    for name, (policy, begin) in asked.items():
        records = evaluable(log.records[begin:])
        if len(records) < MIN_FEEDBACK:
            rows.append(_too_short(name, len(records), truth.get(name, np.nan)))
            continue
        arms = arms_of(records, policy)
        data = by_chance(log, records, arms) if explored else to_log(records, arms)
        wanted = target_probabilities(records, policy, arms)
        found = overlap(data, wanted)
        row: dict[str, Any] = {
            "target": name,
            "decisions": found.decisions,
            "ess": found.ess,
        }
        row |= {
            "unsupported": found.unsupported,
            "measured": truth.get(name, np.nan),
            "refused": "",
        }
        try:
            for estimator in ESTIMATORS:
                got = estimate(data, wanted, estimator, level=level)
                row |= {
                    estimator: got.value,
                    f"{estimator}_low": got.low,
                    f"{estimator}_high": got.high,
                }
            low, high = confidence_sequence(data, wanted, level=level)
            row |= {"sequence_low": low[-1], "sequence_high": high[-1]}
        except UnanswerableError as error:
            row["refused"] = str(error)
        rows.append(row)
    return pd.DataFrame(rows)


def _too_short(name: str, count: int, measured: float) -> dict[str, Any]:
    """The row of a target for which the log has too few decisions."""
    nothing = dict.fromkeys(
        [
            *(f"{e}{end}" for e in ESTIMATORS for end in ("", "_low", "_high")),
            "sequence_low",
            "sequence_high",
        ],
        np.nan,
    )
    return {
        "target": name,
        "decisions": count,
        "ess": 0.0,
        "unsupported": np.nan,
        "measured": measured,
        **nothing,
        "refused": f"{count} decisions left a choice and can be used; {MIN_FEEDBACK} needed",
    }


def calibrations(log: DecisionLog) -> dict[str, Reliability]:
    """Calibration of the predictions: the policy's expected score and the profiler's chance that an answer suffices.

    A prediction without any scored answer is left out.
    """
    frame = decisions(log).dropna(subset=["score"])
    expected = frame.dropna(subset=["expected"])
    fitted = frame[frame.fitted].dropna(subset=["sufficiency"])
    found = {}
    if len(expected):
        found["expected score (router)"] = reliability(
            expected.expected.clip(0, 1).to_numpy(), expected.score.to_numpy()
        )
    if len(fitted):
        found["chance to suffice (profiler)"] = reliability(
            fitted.sufficiency.to_numpy(), (fitted.score >= 0.5).to_numpy(float)
        )
    return found


def drift(log: DecisionLog, window: int = 2 * DRIFT_LEAST) -> pd.DataFrame:
    """Rolling means with standard errors of two residuals: score - expected, and ln latency - ln expected."""
    frame = decisions(log)
    residuals = {
        "score": frame.score - frame.expected,
        "latency": np.log(frame.latency_s.clip(1e-3))
        - np.log(frame.expected_latency_s.clip(1e-3)),
    }
    out = {"n": frame.n}
    for name, values in residuals.items():
        rolling = values.rolling(window, min_periods=DRIFT_LEAST)
        out |= {
            name: rolling.mean(),
            f"{name}_se": rolling.std() / np.sqrt(rolling.count()),
        }
    return pd.DataFrame(out)


def feature_drift(log: DecisionLog) -> pd.Series:
    """Shift of each feature by its name: mean of the last third - mean of the first, in standard errors of this
    difference. Empty if a third has fewer than ten decisions.
    """
    features = np.array([record.decision.profile.features for record in log.records])
    names = names_of(features.shape[1])
    third = len(features) // 3
    if third < 10:
        return pd.Series(dtype=float)
    first = features[:third]
    last = features[-third:]
    error = np.sqrt(first.var(axis=0) / third + last.var(axis=0) / third)
    shift = np.divide(
        last.mean(axis=0) - first.mean(axis=0),
        error,
        out=np.zeros(features.shape[1]),
        where=error > 0,
    )
    return pd.Series(shift, index=list(names))
