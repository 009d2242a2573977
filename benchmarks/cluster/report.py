"""The figures of a run, and their tables."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from tabulate import tabulate

from benchmarks.cluster.peers import TPOT_S, TTFT_S
from benchmarks.cluster.simulation import Run
from policies.types import Objective


@dataclass(frozen=True)
class Figures:
    """The figures of one router in one run.

    quality: mean score, 0 for a refused request. p50_s, p95_s, ttft_p95_s: of the answered ones.
    within: share of all requests with a first token within TTFT_S and a pace within TPOT_S.
    refused: share. utility: mean, see Run.utility. regret: the utility that hindsight has more.
    gpu_hours, busy_gpu_hours: see Run. decision_ms: mean.
    shares: of the sizes among all requests.
    """

    portfolio: str
    trace: str
    event: str
    load: float
    seed: int
    router: str
    quality: float
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
    utility = float(run.utility(objective).mean())
    answered = run.latency_s[~np.isnan(run.latency_s)]
    first = run.ttft_s[~np.isnan(run.ttft_s)]
    within = (run.ttft_s <= TTFT_S) & (run.tpot_s <= TPOT_S)
    return Figures(
        *where,
        quality=float(run.score.mean()),
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
