"""Cost of routing: our gateway beside Ray's own ingress, LiteLLM and a minimal HTTP server (`make bench-speed`).

All systems use engines that only sleep (benchmarks/serving/echo_engine.py), so they differ only in the path to the
engine. In each round every phase is played on one system after the other, in random order. Ratios are computed within
a round, and their medians are reported. "Added" latency is the latency beyond the engine's sleep.

The benchmark starts and stops a system of its own.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from tqdm import tqdm

from benchmarks.serving import plots
from benchmarks.serving.echo_engine import TPOT_S, TTFT_S
from benchmarks.serving.load_generator import LoadPlan
from benchmarks.serving.plots import ORDER
from benchmarks.serving.systems import ROOT, Systems

CLIENTS = 32
STREAM_TOKENS = 8
STREAM_RATE = 50.0
OURS = "routed"
UNROUTED = "explicit"  # our gateway, asked for a model by name


def phases(rates: list[float], seconds: float) -> dict[str, dict[str, Any]]:
    """Load plans by name, without URL, models and seed."""
    found: dict[str, dict[str, Any]] = {
        "saturation": {"clients": CLIENTS, "seconds": seconds}
    }
    for rate in rates:
        found[f"{rate:g}/s"] = {"rate": rate, "seconds": max(seconds, 60 / rate)}
    found["stream"] = {
        "rate": STREAM_RATE,
        "seconds": max(seconds, 6.0),
        "tokens": STREAM_TOKENS,
        "stream": True,
    }
    return found


def play(
    systems: Systems, target: str, phase: str, plan: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Play one phase on one system; returns the figures of its report and its CPU time."""
    url, models = systems.targets[target]
    full = LoadPlan(url=url, models=models, seed=seed, **plan)
    before = systems.cpu()
    busy = _busy_s()
    began = time.monotonic()
    written = systems.state / "report.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving.load_generator",
        json.dumps(asdict(full)),
        str(written),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    elapsed = time.monotonic() - began
    after = systems.cpu()
    report = json.loads(written.read_text())
    used: Counter[str] = Counter()
    for process, seconds in after.items():
        used[process.partition(" ")[2]] += seconds - before.get(process, 0.0)
    answers = len(report["latency_s"])
    waited = 0.0 if target == "floor" else TTFT_S + (full.tokens - 1) * TPOT_S
    row: dict[str, Any] = {
        "target": target,
        "phase": phase,
        "round": seed,
        "answers": answers,
        "failed": sum(report["status"].values()) - report["status"].get("200", 0),
        "fallbacks": sum(report["fallbacks"].values())
        - report["fallbacks"].get("none", 0),
        "per_s": answers / report["elapsed_s"],
        "lag_p99_ms": _percentile(report["lag_s"], 99),
        "chunks": report["chunks"],
        "others_cores": max(0.0, _busy_s() - busy - sum(used.values())) / elapsed,
        "cpu_ms": {
            name: 1000 * seconds / max(1, answers)
            for name, seconds in used.items()
            if seconds > 0
        },
        "models": report["models"],
    }
    row["cpu_total_ms"] = sum(row["cpu_ms"].values())
    for p in (50, 95, 99):
        row[f"p{p}_ms"] = _percentile(report["latency_s"], p) - 1000 * waited
    if full.stream:
        row["ttft_p50_ms"] = _percentile(report["ttft_s"], 50)
        row["per_token_ms"] = _percentile(report["per_token_s"], 50)
    return row


def _percentile(seconds: list[float], p: float) -> float:
    return 1000 * float(np.percentile(seconds, p)) if seconds else float("nan")


def _busy_s() -> float:
    """CPU seconds of the whole machine since its start."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice + times.irq + times.softirq)


def ratios(rows: pd.DataFrame) -> dict[str, float]:
    """Medians over the rounds of the ratios and differences between systems."""

    def wide(phase: str, column: str) -> pd.DataFrame:
        return rows[rows.phase == phase].pivot(
            index="round", columns="target", values=column
        )

    found: dict[str, float] = {}
    throughput = wide("saturation", "per_s")
    for other in throughput.columns.drop(OURS):
        found[f"throughput, {OURS} / {other}"] = float(
            (throughput[OURS] / throughput[other]).median()
        )
    for phase in [p for p in rows.phase.unique() if p.endswith("/s")]:
        for p in (50, 95, 99):
            at = wide(phase, f"p{p}_ms")
            found[f"added p{p} of routing at {phase}, ms"] = float(
                (at[OURS] - at[UNROUTED]).median()
            )
    for column in ("ttft_p50_ms", "per_token_ms", "cpu_total_ms"):
        at = wide("stream", column)
        for other in at.columns.drop([OURS, "floor"], errors="ignore"):
            found[f"stream {column}, {OURS} / {other}"] = float(
                (at[OURS] / at[other]).median()
            )
    return found


def tables(rows: pd.DataFrame) -> str:
    """A Markdown table for each phase with a row for each system: medians over the rounds."""
    parts = []
    for phase in rows.phase.unique():
        played = rows[rows.phase == phase]
        columns = [
            "per_s",
            "p50_ms",
            "p95_ms",
            "p99_ms",
            "cpu_total_ms",
            "failed",
            "fallbacks",
            "others_cores",
        ]
        if phase == "stream":
            columns[1:4] = ["ttft_p50_ms", "per_token_ms", "p50_ms", "p99_ms"]
        table = (
            played.groupby("target")[columns]
            .median()
            .sort_index(key=lambda names: names.map(ORDER.index))
        )
        parts.append(f"{phase}\n\n{table.to_markdown(floatfmt='.2f')}")
    return "\n\n".join(parts)


def cpu_table(rows: pd.DataFrame, phase: str) -> pd.DataFrame:
    """CPU ms a request by process (rows) and system (columns), without processes below 0.02 ms everywhere."""
    played = rows[rows.phase == phase]
    medians = {}
    for target, group in played.groupby("target"):
        medians[target] = pd.DataFrame(list(group.cpu_ms)).fillna(0.0).median()
    table = pd.DataFrame(medians).fillna(0.0)
    first = OURS if OURS in table else table.columns[0]
    large = table[table.max(axis=1) >= 0.02]
    return large.sort_values(first, ascending=False)


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="of each phase; a phase with a low rate takes longer",
    )
    parser.add_argument("--rates", type=float, nargs="*", default=[10.0, 50.0, 100.0])
    parser.add_argument("--no-litellm", action="store_true")
    parser.add_argument("--only", nargs="*", help="measure only these systems")
    parser.add_argument(
        "--ingresses",
        type=int,
        default=1,
        help="replicas of our gateway's ingress; other systems have one",
    )
    parser.add_argument("--state", type=Path, default=ROOT / "var/speed")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, default=ROOT / "var/speed.png")
    return parser.parse_args()


def measure(
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Play all phases on all systems; returns a row for each, and the memory by process."""
    plans = phases(options.rates, options.seconds)
    rows = []
    with Systems(options.state, not options.no_litellm, options.ingresses) as systems:
        targets = [t for t in systems.targets if not options.only or t in options.only]
        for target in tqdm(targets, desc="warming up"):
            play(systems, target, "warm", {"clients": 8, "seconds": 2.0}, 0)
        steps = []
        for number, phase in product(range(options.rounds), plans):
            for target in _order(targets, number, phase):
                steps.append((number, phase, target))
        for number, phase, target in (progress := tqdm(steps)):
            progress.set_description(f"round {number + 1}, {phase}, {target}")
            rows.append(play(systems, target, phase, plans[phase], number))
        return rows, systems.memory()


def main() -> None:
    """Measure all systems, print the tables and save the picture."""
    options = parse_arguments()
    done, memory = measure(options)
    rows = pd.DataFrame(done)
    found = ratios(rows) if {OURS, UNROUTED} <= set(rows.target) else {}
    processors = cpu_table(rows, "saturation").to_markdown(floatfmt=".3f")
    by_size = pd.Series(memory, name="MiB").sort_values(ascending=False)
    print(f"\n{tables(rows)}")
    print(f"\nCPU, ms a request, at saturation\n\n{processors}")
    print(f"\n{pd.Series(found, name='median').to_markdown(floatfmt='.3f')}")
    print(f"\n{by_size.to_markdown(floatfmt='.0f')}")
    if options.json:
        machine = {
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "date": time.strftime("%Y-%m-%d"),
        }
        result = {
            "machine": machine,
            "rows": done,
            "ratios": found,
            "memory_mib": memory,
        }
        options.json.write_text(json.dumps(result, indent=1))
    plots.draw_gateways(rows, options.picture)
    print(f"picture: {options.picture}")


def _order(targets: list[str], number: int, phase: str) -> list[str]:
    """The systems in the random order of this round and phase."""
    return random.Random(f"{number} {phase}").sample(targets, len(targets))


if __name__ == "__main__":
    main()
