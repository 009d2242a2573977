"""What routing costs: our gateway beside Ray's own ingress, LiteLLM and the floor, in one run (`make bench-speed`).

All answer from engines that only wait (benchmarks/echo.py), so what differs is the way there. Every phase is played to
one system after the other, in another order each time, and again; ratios are taken within a round, and their medians
reported. "Added" latency is beyond what the engine waits. Needs no running server: starts and ends one of its own.
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
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from tqdm import tqdm

from benchmarks import speedpictures
from benchmarks.echo import TPOT_S, TTFT_S
from benchmarks.load import Plan
from benchmarks.serving import ROOT, Systems
from benchmarks.speedpictures import ORDER

CLIENTS = 32
STREAM_TOKENS, STREAM_RATE = 8, 50.0
OURS, BESIDE = "routed", "explicit"


def phases(rates: list[float], seconds: float) -> dict[str, dict[str, Any]]:
    """Plans by name, without whom they are for."""
    found: dict[str, dict[str, Any]] = {"saturation": {"clients": CLIENTS, "seconds": seconds}}
    for rate in rates:
        found[f"{rate:g}/s"] = {"rate": rate, "seconds": max(seconds, 60 / rate)}
    found["stream"] = {"rate": STREAM_RATE, "seconds": max(seconds, 6.0), "tokens": STREAM_TOKENS, "stream": True}
    return found


def play(systems: Systems, target: str, phase: str, plan: dict[str, Any], seed: int) -> dict[str, Any]:
    """One phase on one system: its report, reduced to numbers, and what it consumed."""
    url, models = systems.targets[target]
    full = Plan(url=url, models=models, seed=seed, **plan)
    before, busy, began = systems.cpu(), _busy_s(), time.monotonic()
    written = systems.state / "report.json"
    command = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(full)), str(written)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    elapsed, after = time.monotonic() - began, systems.cpu()
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
        "fallbacks": sum(report["fallbacks"].values()) - report["fallbacks"].get("none", 0),
        "per_s": answers / report["elapsed_s"],
        "lag_p99_ms": _percentile(report["lag_s"], 99),
        "chunks": report["chunks"],
        "others_cores": max(0.0, _busy_s() - busy - sum(used.values())) / elapsed,
        "cpu_ms": {name: 1000 * s / max(1, answers) for name, s in used.items() if s > 0},
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
    """Seconds of CPU that the whole machine has worked."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice + times.irq + times.softirq)


def ratios(rows: pd.DataFrame) -> dict[str, float]:
    """What must hold, as medians over the rounds of what was measured side by side."""

    def wide(phase: str, column: str) -> pd.DataFrame:
        return rows[rows.phase == phase].pivot(index="round", columns="target", values=column)

    found: dict[str, float] = {}
    throughput = wide("saturation", "per_s")
    for other in throughput.columns.drop(OURS):
        found[f"throughput, {OURS} / {other}"] = float((throughput[OURS] / throughput[other]).median())
    for phase in [p for p in rows.phase.unique() if p.endswith("/s")]:
        for p in (50, 95, 99):
            at = wide(phase, f"p{p}_ms")
            found[f"added p{p} of routing at {phase}, ms"] = float((at[OURS] - at[BESIDE]).median())
    for column in ("ttft_p50_ms", "per_token_ms", "cpu_total_ms"):
        at = wide("stream", column)
        for other in at.columns.drop([OURS, "floor"], errors="ignore"):
            found[f"stream {column}, {OURS} / {other}"] = float((at[OURS] / at[other]).median())
    return found


def tables(rows: pd.DataFrame) -> str:
    """For the reader, one row a system, medians over the rounds."""
    parts = []
    for phase in rows.phase.unique():
        there = rows[rows.phase == phase]
        columns = ["per_s", "p50_ms", "p95_ms", "p99_ms", "cpu_total_ms", "failed", "fallbacks", "others_cores"]
        if phase == "stream":
            columns[1:4] = ["ttft_p50_ms", "per_token_ms", "p50_ms", "p99_ms"]
        table = there.groupby("target")[columns].median().sort_index(key=lambda names: names.map(ORDER.index))
        parts.append(f"{phase}\n\n{table.to_markdown(floatfmt='.2f')}")
    return "\n\n".join(parts)


def cpu_table(rows: pd.DataFrame, phase: str) -> pd.DataFrame:
    """CPU in ms a request, by process (rows) and system (columns); only what takes 0.02 ms somewhere."""
    there = rows[rows.phase == phase]
    table = pd.DataFrame(
        {t: pd.DataFrame(list(group.cpu_ms)).fillna(0.0).median() for t, group in there.groupby("target")}
    )
    table = table.fillna(0.0)
    return table[table.max(axis=1) >= 0.02].sort_values(OURS if OURS in table else table.columns[0], ascending=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each phase; longer where its rate is low")
    parser.add_argument("--rates", type=float, nargs="*", default=[10.0, 50.0, 100.0])
    parser.add_argument("--no-litellm", action="store_true")
    parser.add_argument("--only", nargs="*", help="these systems")
    parser.add_argument("--ingresses", type=int, default=1, help="replicas of our gateway's; the others have one")
    parser.add_argument("--state", type=Path, default=ROOT / "var/speed")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--picture", type=Path, default=ROOT / "var/speed.png")
    options = parser.parse_args()
    plans, done = phases(options.rates, options.seconds), []
    with Systems(options.state, not options.no_litellm, options.ingresses) as systems:
        targets = [t for t in systems.targets if not options.only or t in options.only]
        warm = tqdm(targets, desc="warming up")
        for target in warm:
            play(systems, target, "warm", {"clients": 8, "seconds": 2.0}, 0)
        steps = [(r, phase, t) for r in range(options.rounds) for phase in plans for t in _order(targets, r, phase)]
        for number, phase, target in (progress := tqdm(steps)):
            progress.set_description(f"round {number + 1}, {phase}, {target}")
            done.append(play(systems, target, phase, plans[phase], number))
        memory = systems.memory()
    rows = pd.DataFrame(done)
    held = ratios(rows) if {OURS, BESIDE} <= set(targets) else {}
    print("\n" + tables(rows))
    print("\nCPU, ms a request, at saturation\n\n" + cpu_table(rows, "saturation").to_markdown(floatfmt=".3f"))
    print("\n" + pd.Series(held, name="median").to_markdown(floatfmt=".3f"))
    print("\n" + pd.Series(memory, name="MiB").sort_values(ascending=False).to_markdown(floatfmt=".0f"))
    if options.json:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}
        result = {"machine": machine, "rows": done, "ratios": held, "memory_mib": memory}
        options.json.write_text(json.dumps(result, indent=1))
    speedpictures.draw(rows, options.picture)
    print(f"picture: {options.picture}")


def _order(targets: list[str], number: int, phase: str) -> list[str]:
    return random.Random(f"{number} {phase}").sample(targets, len(targets))


if __name__ == "__main__":
    main()
