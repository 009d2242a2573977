"""The figures of a run, and their tables."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from tabulate import tabulate

from benchmarks.cluster.peers import ONLINE, PRESETS, TPOT_S, TTFT_S, preset_name
from benchmarks.cluster.simulation import Run
from policies.types import Objective

WINDOW = 50  # requests
LEAST_WINDOWS = 4  # without so many nothing is said of a recovery
EQUAL_P95 = 1.05  # a p95 up to so many times as long counts as equal
EQUAL_QUALITY = 0.005  # a quality lower by at most this counts as equal
BACK = 0.02  # utility; a loss larger by at most this counts as equal


@dataclass(frozen=True)
class Figures:
    """The figures of one router in one run.

    quality: mean score, 0 for a refused request. mean_s, p50_s, p95_s, ttft_p95_s: of the answered ones.
    within: share of all requests with a first token within TTFT_S and a pace within TPOT_S.
    refused: share. utility: mean, see Run.utility. regret: the utility that hindsight has more.
    gpu_hours, busy_gpu_hours: see Run. decision_ms: mean.
    shares: of the sizes among all requests.
    utilities: mean of each window of WINDOW requests. dearest_scores: number of scores that the dearest size has got up
        to the end of each window.
    """

    portfolio: str
    trace: str
    event: str
    load: float
    seed: int
    router: str
    quality: float
    mean_s: float
    p50_s: float
    p95_s: float
    ttft_p95_s: float
    within: float
    refused: float
    utility: float
    regret: float
    gpu_hours: float
    busy_gpu_hours: float
    decision_ms: float
    starts: int
    retries: int
    shares: tuple[float, ...]
    utilisation: tuple[float, ...]
    utilities: tuple[float, ...]
    dearest_scores: tuple[int, ...]


def figures(
    run: Run,
    objective: Objective,
    best: float,
    where: tuple[str, str, str, float, int, str],
    sizes: int,
) -> Figures:
    """The figures of a run.

    Args:
        run: of the router.
        objective: of its requests.
        best: mean utility of hindsight on the same requests.
        where: portfolio, trace, event, load, seed, router.
        sizes: number of sizes.
    """
    utilities = run.utility(objective)
    utility = float(utilities.mean())
    ends = range(WINDOW, len(utilities) + 1, WINDOW)
    given = np.cumsum(run.scored & (run.chosen == sizes - 1))
    answered = run.latency_s[~np.isnan(run.latency_s)]
    first = run.ttft_s[~np.isnan(run.ttft_s)]
    within = (run.ttft_s <= TTFT_S) & (run.tpot_s <= TPOT_S)
    return Figures(
        *where,
        quality=float(run.score.mean()),
        mean_s=float(answered.mean()) if len(answered) else float("nan"),
        p50_s=_percentile(answered, 50),
        p95_s=_percentile(answered, 95),
        ttft_p95_s=_percentile(first, 95),
        within=float(within.mean()),
        refused=float((run.chosen < 0).mean()),
        utility=utility,
        regret=best - utility,
        gpu_hours=float(run.gpu_hours.sum()),
        busy_gpu_hours=run.busy_gpu_hours,
        decision_ms=1e3 * float(run.decision_s.mean()),
        starts=run.starts,
        retries=run.retries,
        shares=tuple(float((run.chosen == k).mean()) for k in range(sizes)),
        utilisation=tuple(float(share) for share in run.utilisation),
        utilities=tuple(float(utilities[end - WINDOW : end].mean()) for end in ends),
        dearest_scores=tuple(int(given[end - 1]) for end in ends),
    )


def _percentile(values: np.ndarray, share: float) -> float:
    return float(np.percentile(values, share)) if len(values) else float("nan")


def table(rows: Sequence[Figures]) -> str:
    """A row for each router, the means over the seeds; the intervals are 95 % over the seeds."""
    by_router: dict[str, list[Figures]] = defaultdict(list)
    for row in rows:
        by_router[row.router].append(row)
    shown = []
    for router, own in by_router.items():
        mean = means(own)
        spread = np.std([row.utility for row in own], ddof=1) if len(own) > 1 else 0.0
        half = 1.96 * float(spread) / np.sqrt(len(own))
        shown.append(
            (
                router,
                f"{mean['quality']:.3f}",
                f"{mean['p50_s']:.1f}",
                f"{mean['p95_s']:.1f}",
                f"{mean['ttft_p95_s']:.2f}",
                f"{mean['within']:.0%}",
                f"{mean['refused']:.1%}",
                f"{mean['utility']:.4f} ± {half:.4f}",
                f"{mean['regret']:.4f}",
                f"{mean['busy_gpu_hours']:.2f}",
                f"{mean['gpu_hours']:.2f}",
                f"{mean['decision_ms']:.2f}",
                " ".join(
                    f"{share:.2f}" for share in np.mean([r.shares for r in own], 0)
                ),
            )
        )
    headers = (
        "router",
        "quality",
        "p50 s",
        "p95 s",
        "TTFT p95 s",
        "SLO",
        "refused",
        "utility",
        "regret",
        "busy GPU-h",
        "GPU-h",
        "decision ms",
        "shares",
    )
    return str(tabulate(shown, headers, tablefmt="pipe", disable_numparse=True))


def comparison(rows: Sequence[Figures], router: str) -> str:
    """A router beside RouteBalance and beside the online learners: a row for each load, means over the seeds.

    At equal p95: its quality less that of the best preset of RouteBalance whose p95 is at most EQUAL_P95 times as long,
    or of the preset with the shortest p95 if none is so fast. At equal quality: the mean latency of the fastest preset
    whose quality is at most EQUAL_QUALITY lower, over its own; a dash if none is so good. Beside the learners: its
    utility less that of the best one.
    """
    shown = []
    for load in sorted({row.load for row in rows}):
        found = {
            name: means(
                [row for row in rows if row.load == load and row.router == name]
            )
            for name in dict.fromkeys(row.router for row in rows if row.load == load)
        }
        own = found.get(router)
        presets = [found[n] for n in map(preset_name, PRESETS) if n in found]
        learners = {name: found[name] for name in ONLINE if name in found}
        if own is None or not presets:
            continue
        quick = [p for p in presets if p["p95_s"] <= EQUAL_P95 * own["p95_s"]]
        beside = quick or [min(presets, key=lambda p: p["p95_s"])]
        good = [p for p in presets if p["quality"] >= own["quality"] - EQUAL_QUALITY]
        faster = min((p["mean_s"] for p in good), default=None)
        best = max(learners, key=lambda name: learners[name]["utility"], default="")
        shown.append(
            (
                f"{load:g}",
                f"{own['quality'] - max(p['quality'] for p in beside):+.3f}",
                f"{faster / own['mean_s']:.1f}" if faster is not None else "–",
                f"{own['utility'] - max(p['utility'] for p in presets):+.3f}",
                f"{own['utility'] - learners[best]['utility']:+.3f} ({best})"
                if best
                else "–",
            )
        )
    headers = (
        f"{router}, load",
        "quality at RouteBalance's p95",
        "RouteBalance's mean latency at equal quality, times",
        "utility − RouteBalance's",
        "utility − best online learner's",
    )
    return str(tabulate(shown, headers, tablefmt="pipe", disable_numparse=True))


def recovery(rows: Sequence[Figures], undisturbed: Sequence[Figures]) -> str:
    """How soon each router is back after an event: a row for each router and load, means over the seeds.

    Lost is the utility of the same requests without the event, less that with it. A router is back once what it loses
    in two windows, the first of which begins at the event or later, is at most BACK above what it loses in the last
    quarter of all requests. That loss is lasting: the capacity, the quality or the price is gone.

    Args:
        rows: with the event, half of the way.
        undisturbed: of the same routers, loads and seeds without it.
    """
    shown = []
    for load in sorted({row.load for row in rows}):
        for name in dict.fromkeys(row.router for row in rows):
            own = [r for r in rows if r.router == name and r.load == load]
            usual = [r for r in undisturbed if r.router == name and r.load == load]
            lost = _course(usual) - _course(own)
            if len(lost) < LEAST_WINDOWS:
                continue
            noon = len(lost) // 2
            for_good = float(lost[-(len(lost) // 4) :].mean())
            pairs = 0.5 * (lost[noon:-1] + lost[noon + 1 :])
            back = np.flatnonzero(pairs <= for_good + BACK)
            first = int(back[0]) if len(back) else len(pairs) - 1
            scores = np.mean([row.dearest_scores for row in own], axis=0)
            shown.append(
                (
                    name,
                    f"{load:g}",
                    f"{float(lost[noon:].mean()):.3f}",
                    f"{float(pairs[0]):.3f}",
                    f"{for_good:.3f}",
                    f"{(first + 2) * WINDOW}",
                    f"{scores[noon + first + 1] - scores[noon - 1]:.0f}",
                )
            )
    headers = (
        "router",
        "load",
        "lost after the event",
        f"in the first {2 * WINDOW}",
        "in the last quarter",
        "back after requests",
        "scores of the dearest size in them",
    )
    return str(tabulate(shown, headers, tablefmt="pipe", disable_numparse=True))


def _course(rows: Sequence[Figures]) -> np.ndarray:
    """[W] the utility of each window, mean over the rows."""
    return np.asarray(np.mean([row.utilities for row in rows], axis=0))


def means(rows: Sequence[Figures]) -> dict[str, float]:
    """The mean of each figure over the rows."""
    found = {}
    for one in fields(Figures):
        values = [getattr(row, one.name) for row in rows]
        if isinstance(values[0], float):
            found[one.name] = float(np.mean(values))
    return found


def plain(rows: Sequence[Figures]) -> list[dict[str, object]]:
    """The figures as plain data, for JSON."""
    return [asdict(row) for row in rows]
