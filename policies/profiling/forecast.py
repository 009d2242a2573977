"""Forecasts of answers, learned from finished requests: their length, and which arms' answers will suffice.

Output tokens: ridge regression of log(1 + tokens), less that of the usual number for the kind of work, on the features,
over the answers of all arms. The length of an answer that a limit truncated is a lower bound; it is replaced by the
expected length given that bound (expectation maximisation for censored data: Aitkin, Technometrics 1981).
Sufficiency: for each arm the probability that its answer scores at least SUFFICIENT, by logistic regression with
weights that the arms share, calibrated by Platt scaling (calibration.py).

Probabilities are calibrated, and their reliability is measured, only on answers newer than those that they were
fitted on (progressive validation: Blum, Kalai and Langford, COLT 1999; Dawid's prequential principle, 1984). The
answers are divided into blocks by age, and each block is predicted from the blocks before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import erfc, exp, nan, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.base import State, prior_quality
from policies.coverage import FeedbackCoverage
from policies.events import Record
from policies.profiling.calibration import (
    BINS,
    Labelled,
    Reliability,
    fit_arms,
    fit_platt,
    logit,
    reliability,
    sigmoid,
)
from policies.profiling.features import OUTPUT_TOKENS, D
from policies.profiling.prior import prior_weights
from policies.types import Arm, TaskProfile, Vector

SUFFICIENT = 0.5  # mean score over the sources from which an answer is good enough
ENOUGH = 50  # smallest number of answers for a fit; below it the usual length and the prior quality are used
BLOCKS = 10
FORGETTING = 0.9995  # weight of the length of an answer, one answer later
LABEL_FORGETTING = 0.999  # weight of a label of sufficiency, one label later
# Prior precisions of the log-odds.
SHARED = 3.0  # of a weight that all arms share
OWN = 10.0  # of an arm's difference from it
INTERCEPT = 0.5  # of an arm's intercept
PLATT = 20.0  # of Platt's slope and intercept
PENALTY = 1.0  # of the ridge regression
ROUNDS = 10  # of replacing the lengths of truncated answers
# Figures of the reliability, and the weight of all answers that each part was fitted on.
FIGURES = (
    *("scored", "brier", "ece", "brier_by_arm", "scores_weight"),
    *("answered", "tokens_error", "tokens_error_by_kind", "answers_weight"),
)

# Errors of the reliability, by the figure that is their number of answers.
ERRORS = {
    "scored": ("brier", "ece", "brier_by_arm"),
    "answered": ("tokens_error", "tokens_error_by_kind"),
}


def usual_tokens(kind: str) -> float:
    """Output tokens of a typical answer to this kind of work."""
    return OUTPUT_TOKENS.get(kind, OUTPUT_TOKENS["other"])


@dataclass(frozen=True, eq=False)
class Lengths:
    """The lengths of N answers.

    x: [N, D] features. beyond: [N] log(1 + tokens) - log(1 + usual). cut: [N] whether a limit truncated the answer.
    weight: [N] number of events that each counts for.
    """

    x: Vector
    beyond: Vector
    cut: NDArray[np.bool_]
    weight: Vector


def _weights(counts: Vector, forgetting: float) -> Vector:
    """[N] weights of answers that are in the order of their decisions and count for so many answers each."""
    later = counts.sum() - np.cumsum(counts)
    return np.asarray(forgetting**later)


def length_data(records: Sequence[Record]) -> Lengths:
    """The lengths of the records' answers, in the order of the records."""
    rows = [
        (r.decision, r.outcome)
        for r in records
        if r.outcome and r.outcome.status == "ok"
    ]
    rows = [
        (d, o)
        for d, o in rows
        if o.output_tokens > 0 and d.profile.features.shape == (D,)
    ]
    usual = [usual_tokens(d.profile.kind) for d, _ in rows]
    return Lengths(
        np.array([d.profile.features for d, _ in rows]).reshape(-1, D),
        np.log1p([o.output_tokens for _, o in rows]) - np.log1p(usual),
        np.array([o.finish_reason == "length" for _, o in rows], dtype=bool),
        _weights(np.ones(len(rows)), FORGETTING),
    )


def sufficiency_data(records: Sequence[Record], arms: Sequence[Arm]) -> Labelled:
    """The records' labels of sufficiency, in the order of the records.

    An answer with a visible flaw did not suffice. Such answers are always seen, the others at the rate of the scores,
    so a flaw counts only for that rate (FeedbackCoverage).
    """
    index = {arm.name: k for k, arm in enumerate(arms)}
    coverage = FeedbackCoverage.of(records)
    rows = []
    for record in records:
        score = 0.0 if record.flaw else record.mean_score
        decision = record.decision
        if score is None or decision.arm not in index:
            continue
        if decision.profile.features.shape == (D,):
            counts = coverage.rate(record) if record.flaw else 1.0
            rows.append((decision, float(score >= SUFFICIENT), counts))
    share = np.array([counts for _, _, counts in rows])
    return Labelled(
        np.array([d.profile.features for d, _, _ in rows]).reshape(-1, D),
        np.array([index[d.arm] for d, _, _ in rows], dtype=np.int64),
        np.array([y for _, y, _ in rows]),
        share * _weights(share, LABEL_FORGETTING),
    )


def _hazard(z: Vector) -> Vector:
    """[N] φ(z) / (1 - Φ(z)): the mean of a standard normal variable given that it exceeds z."""
    scale = sqrt(pi / 2.0)
    return np.array([exp(-0.5 * v * v) / (scale * erfc(v / sqrt(2.0))) for v in z])


def fit_lengths(data: Lengths) -> tuple[Vector, float]:
    """Weights [D] of the logarithm of the tokens beyond the usual number, and its residual variance."""
    weight = data.weight / data.weight.max(initial=1e-12)
    weighted = data.x * weight[:, None]
    gram = data.x.T @ weighted + PENALTY * np.eye(data.x.shape[1])
    cut = data.cut
    y = data.beyond.copy()
    doubt = np.zeros(len(data.beyond))  # variance of the expected lengths in y
    for _ in range(ROUNDS if cut.any() else 1):
        w = np.linalg.solve(gram, weighted.T @ y)
        mean = data.x @ w
        variance = float((weight * ((y - mean) ** 2 + doubt)).sum() / weight.sum())
        deviation = sqrt(variance) + 1e-6
        z = np.clip((data.beyond[cut] - mean[cut]) / deviation, -6.0, 6.0)
        hazard = _hazard(z)
        y[cut] = np.maximum(mean[cut] + deviation * hazard, data.beyond[cut])
        doubt[cut] = variance * np.maximum(1 + z * hazard - hazard**2, 0.0)
    return w, variance


@dataclass(frozen=True, eq=False)
class Forecaster:
    """Predicts the length and the sufficiency of answers; it is immutable, so it can be replaced between two requests.

    arms: K arms. version: number of fits; version 0 uses only the usual lengths and the prior quality.
    lengths: [D] weights of log output tokens beyond the usual number. variance: [1] residual variance of it.
    shared: [D] weights of the log-odds that all arms share. weights: [K, D] weights of each arm.
    platt_shared: [2] slope and intercept for an arm without scores. platt: [K, 2] those of each arm.
    bins: [BINS, 3] as Reliability.table. figures: [9] as FIGURES.
    """

    arms: tuple[Arm, ...]
    version: int
    lengths: Vector
    variance: Vector
    shared: Vector
    weights: Vector
    platt_shared: Vector
    platt: Vector
    bins: Vector
    figures: Vector

    @classmethod
    def prior(cls, arms: Sequence[Arm]) -> "Forecaster":
        """The forecaster before any finished request."""
        k = len(arms)
        platt = np.array([1.0, 0.0])
        blank = (
            np.zeros(D),
            np.zeros(1),
            np.zeros(D),
            prior_weights(arms, logit),
            platt,
            np.tile(platt, (k, 1)),
        )
        return cls(tuple(arms), 0, *blank, np.zeros((BINS, 3)), np.zeros(len(FIGURES)))

    def refit(self, records: Sequence[Record]) -> "Forecaster":
        """The next version, fitted on finished requests for the same arms.

        A part stays as it is if the records hold too few answers for it: fewer than ENOUGH, or less than half of the
        weight that it was fitted on, for example when a new log starts with a version that was published elsewhere.
        The weight of that earlier fit decays with the number of such answers in the log.

        Args:
            records: of all decisions in the log, in any order; records without outcome, score or known arm are ignored.
        """
        ordered = sorted(records, key=lambda record: record.decision.sequence)
        found: dict[str, Any] = {}
        figures = dict(zip(FIGURES, self.figures.tolist(), strict=True))
        answers = length_data(ordered)
        scored = sufficiency_data(ordered, self.arms)
        half = FORGETTING ** len(answers.weight) / 2
        if answers.weight.sum() >= max(ENOUGH, figures["answers_weight"] * half):
            w, variance = fit_lengths(answers)
            found |= {"lengths": w, "variance": np.array([min(variance, 1.0)])}
            figures |= {"answers_weight": float(answers.weight.sum())} | _lengths_error(
                answers
            )
        half = LABEL_FORGETTING ** len(scored) / 2
        if scored.weight.sum() >= max(ENOUGH, figures["scores_weight"] * half):
            learned, measured = _sufficiency(scored, self.arms)
            found |= learned
            figures |= {"scores_weight": float(scored.weight.sum())} | measured
        if not found:
            return self
        both = np.array([figures[name] for name in FIGURES])
        return replace(self, **found, figures=both, version=self.version + 1)

    def predict(self, features: Vector, usual: Vector) -> tuple[Vector, Vector]:
        """Expected output tokens [B] and the probability [B, K] that each arm's answer suffices.

        Args:
            features: [B, D].
            usual: [B] tokens of a typical answer to this kind of work.
        """
        log_tokens = np.log1p(usual) + features @ self.lengths + self.variance / 2
        tokens = np.expm1(np.clip(log_tokens, 0.0, 12.0))
        z = features @ self.weights.T
        return tokens, sigmoid(z * self.platt[:, 0] + self.platt[:, 1])

    def complete(self, profiles: Sequence[TaskProfile]) -> list[TaskProfile]:
        """The profiles with the forecasts of their answers; the length is limited by the client's own limit."""
        if not profiles:
            return []
        usual = np.array([usual_tokens(profile.kind) for profile in profiles])
        tokens, probability = self.predict(
            np.stack([profile.features for profile in profiles]), usual
        )
        return [
            replace(
                profile,
                expected_output_tokens=max(
                    1.0, min(length, profile.max_output_tokens or length)
                ),
                sufficiency={
                    arm.name: round(p, 4)
                    for arm, p in zip(self.arms, row, strict=True)
                    if profile.task in arm.tasks
                },
                profiler_version=self.version,
            )
            for profile, length, row in zip(
                profiles, tokens.tolist(), probability.tolist(), strict=True
            )
        ]

    def for_arms(self, arms: Sequence[Arm]) -> "Forecaster":
        """The forecaster for other arms: known arms keep their weights, new arms start from the shared weights."""
        rows = {arm.name: k for k, arm in enumerate(self.arms)}
        fresh = self.shared + prior_weights(arms, logit)
        weights = [
            self.weights[rows[a.name]] if a.name in rows else fresh[k]
            for k, a in enumerate(arms)
        ]
        platt = [
            self.platt[rows[a.name]] if a.name in rows else self.platt_shared
            for a in arms
        ]
        return replace(
            self, arms=tuple(arms), weights=np.stack(weights), platt=np.stack(platt)
        )

    def reliability(self) -> dict[str, float | None]:
        """The reliability on answers newer than those of the fit, as plain data; see FIGURES.

        The errors of a part that is not fitted yet are None.
        """
        figures: dict[str, float | None] = {
            name: round(float(value), 4)
            for name, value in zip(FIGURES, self.figures, strict=True)
        }
        for count, errors in ERRORS.items():
            if not figures[count]:
                figures |= dict.fromkeys(errors, None)
        return {"version": self.version, **figures}

    def state(self) -> State:
        """Everything except the arms, as named arrays of finite numbers."""
        names = (
            "lengths",
            "variance",
            "shared",
            "weights",
            "platt_shared",
            "platt",
            "bins",
            "figures",
        )
        return {"version": np.array([float(self.version)])} | {
            name: getattr(self, name).copy() for name in names
        }

    @classmethod
    def restored(cls, state: Mapping[str, Vector], arms: Sequence[Arm]) -> "Forecaster":
        """The forecaster of a `state()`, for the same arms in the same order.

        Raises:
            ValueError: an array is missing, has another shape, or is not finite.
        """
        arrays: dict[str, Any] = {}
        for name, mine in cls.prior(arms).state().items():
            given = state.get(name)
            if given is None or given.shape != mine.shape:
                shape = None if given is None else given.shape
                raise ValueError(
                    f"profiler state: '{name}' must have shape {mine.shape}, got {shape}"
                )
            if not np.isfinite(given).all():
                raise ValueError(
                    f"profiler state: '{name}' holds numbers that are not finite"
                )
            arrays[name] = given.copy()
        arrays["version"] = int(arrays["version"][0])
        return replace(cls.prior(arms), **arrays)


def _fit_sufficiency(data: Labelled, arms: Sequence[Arm]) -> tuple[Vector, Vector]:
    shared = np.full(D, SHARED)
    own = np.full(D, OWN)
    own[0] = INTERCEPT
    newest = replace(data, weight=data.weight / data.weight.max(initial=1e-12))
    return fit_arms(newest, np.zeros(D), shared, prior_weights(arms, logit), own)


def _sufficiency(
    data: Labelled, arms: Sequence[Arm]
) -> tuple[dict[str, Vector], dict[str, float]]:
    """The parts of a Forecaster that predict sufficiency, and the figures of their reliability."""
    edges = np.linspace(0, len(data), BLOCKS + 1).astype(int)
    first = edges[1]
    prior = prior_quality(arms)
    predicted = np.zeros(len(data))
    probability = np.zeros(len(data))
    by_arm = np.zeros(len(data))
    platt = np.tile([1.0, 0.0], (len(arms), 1))
    for start, end in pairwise(edges[1:]):
        past = data[:start]
        block = data[start:end]
        _, weights = _fit_sufficiency(past, arms)
        if start > first:
            _, platt = fit_platt(
                data[first:start], predicted[first:start], len(arms), PLATT
            )
        predicted[start:end] = (block.x * weights[block.arm]).sum(axis=1)
        probability[start:end] = sigmoid(
            predicted[start:end] * platt[block.arm, 0] + platt[block.arm, 1]
        )
        share = (2 * prior + np.bincount(past.arm, past.weight * past.y, len(arms))) / (
            2 + np.bincount(past.arm, past.weight, len(arms))
        )
        by_arm[start:end] = share[block.arm]
    found: Reliability = reliability(probability[first:], data.y[first:])
    shared, weights = _fit_sufficiency(data, arms)
    platt_shared, platt = fit_platt(data[first:], predicted[first:], len(arms), PLATT)
    learned = {
        "shared": shared,
        "weights": weights,
        "platt_shared": platt_shared,
        "platt": platt,
        "bins": found.table,
    }
    figures = {"scored": float(found.count), "brier": found.brier, "ece": found.ece}
    return learned, figures | {
        "brier_by_arm": float(((by_arm - data.y)[first:] ** 2).mean())
    }


def _lengths_error(data: Lengths) -> dict[str, float]:
    """Root mean square error of log tokens, learned and usual, on newer answers that were not truncated."""
    edges = np.linspace(0, len(data.beyond), BLOCKS + 1).astype(int)
    error = np.full(len(data.beyond), nan)
    for start, end in pairwise(edges[1:]):
        past = Lengths(
            data.x[:start], data.beyond[:start], data.cut[:start], data.weight[:start]
        )
        error[start:end] = (
            data.beyond[start:end] - data.x[start:end] @ fit_lengths(past)[0]
        )
    whole = ~data.cut & (np.arange(len(error)) >= edges[1])
    if not whole.any():
        return {}
    learned, table = (
        float(np.sqrt((e[whole] ** 2).mean())) for e in (error, data.beyond)
    )
    return {
        "answered": float(whole.sum()),
        "tokens_error": learned,
        "tokens_error_by_kind": table,
    }
