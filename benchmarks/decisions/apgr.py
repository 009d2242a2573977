"""APGR and CPT of two-model routing, as RouteLLM defines them (Ong et al., 2024, arXiv 2406.18665v4, section 3.2).

    PGR(c) = (r(router at a share c of strong calls) - r(weak)) / (r(strong) - r(weak)),   APGR = ∫ PGR(c) dc,

CPT(x) is the smallest c with PGR(c) = x. As in RouteLLM's own routellm/evals/evaluate.py, c takes the eleven values
0, 10, ..., 100 %, the integral is the trapezoid rule, and PGR is linear between two shares. A router that chooses at
random has APGR 0.5, CPT(50 %) 50 %, CPT(80 %) 80 %.

Here the router learns online. It plays up to 2,500 requests of the split `train` and sees only the score of the model
that it chose. Then its expected quality of the two models ranks the prompts of the split `dev`: at a cost weight λ the
strong model gets the prompts with q_strong - q_weak > λ (c_strong - c_weak), so a sweep of λ goes through all shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.decisions.bounds import order_of, ridge
from benchmarks.decisions.streams import load
from policies.base import Policy
from policies.evaluation.simulate import simulate
from policies.registry import make_policy
from policies.types import Objective, Request, TaskProfile, Vector

PAIRS = ("routellm_mmlu", "routellm_gsm8k", "mmlupro_llama31")
SHARES = np.linspace(0.0, 1.0, 11)
RESAMPLES = 200  # bootstrap samples of the held-out prompts
BATCH = 64
OURS = "ours"

ARENA = "65k arena battles"
GOLD = "the same + 1.5k MMLU answers"
JUDGE = "the same + 120k GPT-4 judgements"
# RouteLLM's tables 2 (MMLU) and 3 (GSM8K), arXiv v4, section 5.1.
# Columns: portfolio, learned from, router, CPT 50, CPT 80, APGR.
PUBLISHED = (
    ("routellm_mmlu", ARENA, "BERT", 0.4943, 0.7780, 0.502),
    ("routellm_mmlu", ARENA, "causal LLM (Llama 3 8B)", 0.4888, 0.7793, 0.499),
    ("routellm_mmlu", ARENA, "matrix factorization", 0.4500, 0.7686, 0.524),
    ("routellm_mmlu", ARENA, "similarity-weighted ranking", 0.5582, 0.8025, 0.473),
    ("routellm_mmlu", GOLD, "BERT", 0.4130, 0.7220, 0.572),
    ("routellm_mmlu", GOLD, "causal LLM (Llama 3 8B)", 0.3549, 0.7031, 0.600),
    ("routellm_mmlu", GOLD, "matrix factorization", 0.3546, 0.7140, 0.597),
    ("routellm_mmlu", GOLD, "similarity-weighted ranking", 0.3540, 0.7155, 0.603),
    ("routellm_gsm8k", ARENA, "BERT", 0.5878, 0.8384, 0.438),
    ("routellm_gsm8k", ARENA, "causal LLM (Llama 3 8B)", 0.5609, 0.8356, 0.461),
    ("routellm_gsm8k", ARENA, "matrix factorization", 0.5359, 0.8524, 0.4746),
    ("routellm_gsm8k", ARENA, "similarity-weighted ranking", 0.5443, 0.8211, 0.4753),
    ("routellm_gsm8k", JUDGE, "BERT", 0.4476, 0.7909, 0.531),
    ("routellm_gsm8k", JUDGE, "causal LLM (Llama 3 8B)", 0.3364, 0.6326, 0.622),
    ("routellm_gsm8k", JUDGE, "matrix factorization", 0.3882, 0.7262, 0.565),
    ("routellm_gsm8k", JUDGE, "similarity-weighted ranking", 0.4121, 0.7220, 0.568),
)
NOTE = f"""RouteLLM's rows: published figures (arXiv 2406.18665v4, tables 2 and 3), on all of the uncontaminated MMLU
and GSM8K questions, of which the prompts ranked here are a part. They are trained offline, on pairs of answers
compared. Arena: 65k human votes between 64 models, none of them on these questions; + MMLU answers: about 1,500
questions of MMLU's validation split, answered by both models; + judgements: about 120k pairs judged by GPT-4. Matrix
factorization and similarity-weighted ranking embed by OpenAI's text-embedding-3-small; BERT and Llama 3 8B are
fine-tuned in full. "ours" has seen the score of the model that it chose on each of the requests named, which are of
the same benchmark as those that it ranks; "strong calls then": how often that was the strong one, which depends on
the λ at which it learned. ± are 95 % intervals: over the shuffles of the requests learned from, and over {RESAMPLES}
resamples of the prompts ranked."""


def recovered(
    preference: Vector, weak: Vector, strong: Vector, weight: Vector | None = None
) -> Vector:
    """PGR [11] at SHARES of strong calls, if the strong model gets the prompts in the order of their preference.

    Args:
        preference: [M] preference for the strong model, largest first. Ties count as the mean over all orders.
        weak: [M] scores of the weak model.
        strong: [M] scores of the strong model.
        weight: [M] weight of each prompt; 1 by default.

    Raises:
        ValueError: the strong model is not better, so no gap exists.
    """
    times = np.ones(len(preference)) if weight is None else weight
    _, place = np.unique(-preference, return_inverse=True)
    called = np.bincount(place, weights=times)
    gained = np.bincount(place, weights=times * (strong - weak))
    if gained.sum() <= 0:
        raise ValueError(
            f"the strong model is not better than the weak one: by {gained.sum() / times.sum():.4f}"
        )
    share = np.concatenate(([0.0], np.cumsum(called) / called.sum()))
    return np.interp(
        SHARES, share, np.concatenate(([0.0], np.cumsum(gained) / gained.sum()))
    )


def apgr(curve: Vector) -> float:
    """Mean of PGR over the shares. `curve` comes from `recovered`."""
    return float(np.trapezoid(curve, SHARES))


def cpt(curve: Vector, target: float) -> float:
    """The smallest share of strong calls in [0, 1] that recovers `target` in (0, 1] of the gap."""
    i = int(np.argmax(curve >= target))
    below = curve[i - 1]
    above = curve[i]
    return float(
        SHARES[i - 1] + (SHARES[i] - SHARES[i - 1]) * (target - below) / (above - below)
    )


def expected_gain(
    policy: Policy, profiles: tuple[TaskProfile, ...], sequence: int
) -> Vector:
    """Expected score [M] of the policy's last arm minus that of its first arm, for each profile."""
    weak = policy.arms[0].name
    strong = policy.arms[-1].name
    rng = np.random.default_rng(0)
    gains = []
    for start in range(0, len(profiles), BATCH):
        requests = [
            Request(str(i), p, Objective())
            for i, p in enumerate(profiles[start : start + BATCH])
        ]
        decisions = policy.decide(requests, {}, rng, sequence)
        for decision in decisions:
            better = decision.estimate(strong).quality - decision.estimate(weak).quality
            gains.append(better)
    return np.array(gains)


@dataclass(frozen=True)
class Trial:
    """A policy that learns from one stream at one λ. `data` is the folder of the streams."""

    portfolio: str
    policy: str
    cost_weight: float
    shuffle: int
    requests: int
    data: str | None


def measure(trial: Trial) -> list[dict[str, Any]]:
    """Learn on `train` and rank `dev`.

    The rows are the policy, the ridge with both models' scores on the same requests, the ridge on all of `train`,
    chance and the oracle. `curve` is PGR at SHARES. `deviation` is the standard deviation of APGR over bootstrap
    samples of the ranked prompts.
    """
    known = load(trial.portfolio, ("train",), trial.data)
    held = load(trial.portfolio, ("dev",), trial.data)
    order = order_of(known, trial.shuffle, trial.requests)
    stream = known.stream(order)
    policy = make_policy(trial.policy, stream.arms_at(0))
    rng = np.random.default_rng(
        (trial.shuffle, PAIRS.index(trial.portfolio), round(100 * trial.cost_weight))
    )
    trace = simulate(policy, stream, Objective(cost_weight=trial.cost_weight), rng)
    weak = held.scores[:, 0]
    strong = held.scores[:, -1]

    def fitted(rows: Vector) -> Vector:
        predicted = held.features @ ridge(known.features[rows], known.scores[rows])
        return np.asarray(predicted[:, -1] - predicted[:, 0])

    n = len(order)
    everything = np.arange(len(known.profiles))
    routers: dict[str, tuple[Vector, str]] = {
        OURS: (expected_gain(policy, held.profiles, n), f"{n} requests, one score"),
        "offline ridge": (fitted(order), f"{n} requests, both scores"),
        "offline ridge, all": (
            fitted(everything),
            f"{len(everything)} requests, both scores",
        ),
        "random": (np.zeros(len(weak)), ""),
        "oracle": (strong - weak, ""),
    }
    again = np.random.default_rng(trial.shuffle).multinomial(
        len(weak), np.full(len(weak), 1 / len(weak)), RESAMPLES
    )
    rows = []
    for router, (preference, learned) in routers.items():
        curve = recovered(preference, weak, strong)
        resampled = [
            apgr(recovered(preference, weak, strong, times)) for times in again
        ]
        row = {
            "portfolio": trial.portfolio,
            "router": router,
            "learned from": learned,
            "λ": trial.cost_weight,
            "shuffle": trial.shuffle,
            "held out": len(weak),
            "strong calls then": float((trace.chosen == len(stream.arms) - 1).mean()),
            "CPT(50 %)": cpt(curve, 0.5),
            "CPT(80 %)": cpt(curve, 0.8),
            "APGR": apgr(curve),
            "deviation": float(np.std(resampled)),
            "curve": curve.tolist(),
        }
        rows.append(row)
    return rows


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each router: ours at each λ at which it learned, the references, and RouteLLM's published rows."""
    rows: list[dict[str, Any]] = []
    for portfolio, runs in frame.groupby("portfolio", sort=False):
        for name, trials_ in _routers(runs).items():
            rows.append(_summary(str(portfolio), name, trials_))
        rows += _published(str(portfolio))
    return pd.DataFrame(rows).fillna("")


def _routers(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each router; those of ours by λ. The other routers do not depend on λ."""
    groups = {}
    for weight in runs.λ.unique():
        mine = (runs.router == OURS) & (runs.λ == weight)
        groups[f"{OURS}, λ = {weight:g}"] = runs[mine]
    for router in runs.router.unique():
        if router != OURS:
            first = (runs.router == router) & (runs.λ == runs.λ.iloc[0])
            groups[router] = runs[first]
    return groups


def _summary(portfolio: str, name: str, runs: pd.DataFrame) -> dict[str, Any]:
    """Mean figures of one router, with 95 % intervals over the shuffles and over the ranked prompts."""
    row: dict[str, Any] = {
        "portfolio": portfolio,
        "router": name,
        "learned from": runs["learned from"].iloc[0],
        "strong calls then": "",
        "CPT(50 %)": f"{runs['CPT(50 %)'].mean():.1%}",
        "CPT(80 %)": f"{runs['CPT(80 %)'].mean():.1%}",
        "APGR": f"{runs.APGR.mean():.3f}",
        "± shuffles": "",
        "± prompts": f"{1.96 * runs.deviation.mean():.3f}",
    }
    if name.startswith(OURS):
        row["strong calls then"] = f"{runs['strong calls then'].mean():.0%}"
    if len(runs) > 1 and runs.APGR.std() > 0:
        row["± shuffles"] = f"{1.96 * runs.APGR.std() / np.sqrt(len(runs)):.3f}"
    return row


def _published(portfolio: str) -> list[dict[str, Any]]:
    """RouteLLM's rows for this portfolio."""
    rows = []
    for name, learned, router, half, most, area in PUBLISHED:
        if name == portfolio:
            row = {
                "portfolio": portfolio,
                "router": f"RouteLLM {router}",
                "learned from": learned,
                "CPT(50 %)": f"{half:.2%}",
                "CPT(80 %)": f"{most:.2%}",
                "APGR": f"{area:.3f}",
            }
            rows.append(row)
    return rows


def trials(
    portfolios: Sequence[str],
    policy: str,
    weights: Sequence[float],
    shuffles: int,
    requests: int,
    data: str | None,
) -> list[Trial]:
    """All trials of the portfolios that have two models."""
    return [
        Trial(portfolio, policy, cost_weight, shuffle, requests, data)
        for portfolio in portfolios
        if portfolio in PAIRS
        for cost_weight in weights
        for shuffle in range(shuffles)
    ]
