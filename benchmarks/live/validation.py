"""The simulator's error on the running system: `python -m benchmarks.live.validation`.

One model is asked by name, with recorded arrivals and the demo's calculations, at several shares of its capacity. The
parameters of a simulated replica (benchmarks/cluster) are fitted to the runs at some of these loads, and then predict
the runs at the others. Each load is measured more than once with the same arrivals and questions, and the
difference between these runs is the spread. The table has TTFT and latency, predicted and measured, from the real time
of sending.

The file of --out is what `python -m benchmarks.cluster` prints with its results. The model must have one replica:
set its max_replicas to 1 before, or the autoscaler adds one under load.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cluster.workload import recorded_arrivals
from benchmarks.live.arrivals import TRACES, window
from benchmarks.live.cells import (
    STREAMS,
    Client,
    add_capacity_options,
    measure_capacity,
    open_plan,
)
from benchmarks.live.client import send_apart
from benchmarks.live.fit import fit
from benchmarks.live.plan import Seen
from benchmarks.live.prediction import predict
from benchmarks.live.system import System
from benchmarks.replay.run import configured
from benchmarks.validation import (
    DEFAULT_FILE,
    Asked,
    Bounds,
    Fitted,
    Measured,
    Row,
    Setting,
    Validation,
    read,
)
from deployments.demonstration.client import DEFAULT_URL
from deployments.demonstration.run import make_stream


def bounds_of(config: Path, model: str) -> Bounds:
    """What a configuration says of one model and of the queues in front of it.

    Raises:
        SystemExit: it does not have this model with its engine's bounds, or no gateway.
    """
    try:
        _, tuning = configured(config)
        applications = {
            one["name"]: one
            for one in yaml.safe_load(config.read_text())["applications"]
        }
        engine = applications[model]["args"]["engine_kwargs"]
        slots, length = int(engine["max_num_seqs"]), int(engine["max_model_len"])
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(
            f"{config} does not say max_num_seqs and max_model_len of '{model}' ({error}); name the configuration "
            "of the running system by --config"
        ) from None
    ingresses = max(
        int(deployment.get("num_replicas", 1))
        for application in applications.values()
        for deployment in application.get("deployments", ())
        if deployment["name"] == "Ingress"
    )
    admission = tuning.admission
    return Bounds(
        min(slots, ingresses * admission.max_running),
        slots * length,
        ingresses * admission.max_queued,
        admission.max_queue_wait_s,
    )


def asked(seen: Seen) -> Asked:
    """A request as it is stored; its times count from the real time of sending."""
    return Asked(
        seen.sent_s,
        seen.answered,
        seen.prompt_tokens,
        seen.output_tokens,
        max(0.0, seen.ttft_s - seen.lag_s),
        max(0.0, seen.served_s),
    )


def measure(
    arguments: argparse.Namespace, system: System, capacity: float, client: Client
) -> list[Measured]:
    """All runs: every load once, and then again.

    Raises:
        SystemExit: the gateway does not answer, or a recording is missing or too short.
    """
    replicas = system.running().replicas
    loads = sorted({*arguments.fit, *arguments.predict})
    todo = [
        (run, n, load) for run in range(arguments.runs) for n, load in enumerate(loads)
    ]
    runs = []
    with tqdm(todo, unit="run") as progress:
        for run, n, load in progress:
            progress.set_postfix_str(f"load {load:g}")
            seed = arguments.seed * STREAMS + n
            try:
                arrivals_s = window(
                    arguments.trace,
                    load * capacity,
                    arguments.seconds,
                    seed,
                    arguments.data,
                )
            except ValueError as error:
                raise SystemExit(f"{error}; change --seconds") from None
            tasks = make_stream(seed, len(arrivals_s))
            seen = client(open_plan(system.url, arguments.model, tasks, arrivals_s))
            runs.append(Measured(load, run, tuple(asked(one) for one in seen)))
            if system.running().replicas > replicas:
                progress.write(
                    f"a replica was added at load {load:g}, which the fit does not know",
                    file=sys.stderr,
                )
            system.settle(replicas)
    return runs


def validated(setting: Setting, runs: Sequence[Measured]) -> Validation:
    """The parameters that fit the runs at some loads best, and their errors at the others.

    Raises:
        SystemExit: no request of the fitted loads, or none of the others, was answered.
    """
    fitted_runs = [run for run in runs if run.load in setting.fitted_loads]
    others = [run for run in runs if run.load not in setting.fitted_loads]
    try:
        fitted = fit(fitted_runs, setting.bounds)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    rows = predict(fitted, others, setting.bounds)
    if not rows:
        raise SystemExit("no load of --predict had answers, so there is no error")
    return Validation(setting, fitted, tuple(rows), tuple(runs))


def table(rows: tuple[Row, ...]) -> str:
    """A row for each load and figure."""
    shown = [
        (
            f"{row.load:g}",
            row.figure,
            f"{row.predicted_s:.3f}",
            f"{row.measured_s:.3f}",
            f"{row.error:+.1%}",
            f"{row.spread:.1%}",
            "yes" if row.within else "no",
        )
        for row in rows
    ]
    headers = (
        "load",
        "figure",
        "predicted s",
        "measured s",
        "error",
        "spread",
        "within",
    )
    return str(tabulate(shown, headers, tablefmt="pipe", disable_numparse=True))


def in_words(fitted: Fitted) -> str:
    """The parameters with their units."""
    return (
        f"fitted: {fitted.prefill_tokens_s:.0f} prompt tokens a second, {1e3 * fitted.step_s:.2f} ms a step and "
        f"{1e3 * fitted.sequence_s:.3f} ms for each answer in it, {fitted.chunk:.0f} prompt tokens in a step, "
        f"{1e3 * fitted.overhead_s:.1f} ms beside the engine"
    )


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--data", help="folder of the recordings; default: ROUTER_DATA")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("serve_config.yaml"),
        help="configuration of the running system",
    )
    parser.add_argument("--model", default="large")
    parser.add_argument("--trace", default="azure_conv", choices=TRACES)
    parser.add_argument(
        "--fit",
        nargs="+",
        type=float,
        default=[0.2, 0.6, 1.0],
        help="loads that the parameters are fitted to, as shares of the capacity",
    )
    parser.add_argument(
        "--predict",
        nargs="+",
        type=float,
        default=[0.4, 0.8, 1.1],
        help="loads that are predicted",
    )
    parser.add_argument("--runs", type=int, default=2, help="of each load")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a run")
    add_capacity_options(parser)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--again",
        type=Path,
        help="fit the runs of this file anew, without a running system",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_FILE)
    arguments = parser.parse_args(given)
    if both := {*arguments.fit} & {*arguments.predict}:
        parser.error(f"load {min(both):g} is both fitted and predicted")
    return arguments


def main(given: list[str] | None = None, client: Client = send_apart) -> None:
    """Measure, fit, predict, print the errors, and save everything."""
    arguments = parse(given)
    if arguments.again:
        former = read(arguments.again)
        setting, runs = former.setting, list(former.runs)
    else:
        recorded_arrivals(arguments.trace, arguments.data)  # a missing one ends here
        bounds = bounds_of(arguments.config, arguments.model)
        system = System(arguments.url.rstrip("/"))
        replicas = system.running().replicas
        capacity = arguments.capacity or measure_capacity(
            client,
            system.url,
            arguments.model,
            arguments.clients,
            arguments.capacity_seconds,
            arguments.seed,
        )
        system.settle(replicas)
        setting = Setting(
            arguments.model,
            arguments.trace,
            time.strftime("%Y-%m-%d"),
            capacity,
            bounds,
            tuple(arguments.fit),
        )
        runs = measure(arguments, system, capacity, client)
    found = validated(setting, runs)
    found.save(arguments.out)
    print(f"{setting.capacity:.2f} answers a second; {in_words(found.fitted)}")
    print(f"\n{table(found.rows)}\n\n{found.sentence()}\n{arguments.out}")


if __name__ == "__main__":
    main()
