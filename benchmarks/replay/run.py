"""Replays the policy of serve_config.yaml on recorded answers: `python -m benchmarks.replay.run`.

All answers of `auto` are scored, as in the demo. The policy, the features and the objective are those of the
configuration.
"""

import argparse
from pathlib import Path

import pandas as pd
import yaml
from tqdm import tqdm

from benchmarks.replay.figures import report
from benchmarks.replay.player import Delays, Player
from benchmarks.replay.record import DEFAULT_FILE
from benchmarks.replay.recording import Recording
from deployments.demonstration.run import stream_for
from deployments.settings import GatewaySettings, Tuning


def configured(path: Path) -> tuple[GatewaySettings, Tuning]:
    """The settings of the gateway and of its ingress in a serve_config.yaml.

    Raises:
        ValueError: the file has no gateway.
    """
    for application in yaml.safe_load(path.read_text())["applications"]:
        if not str(application["import_path"]).endswith(":gateway"):
            continue
        for deployment in application.get("deployments", ()):
            if deployment["name"] == "Ingress":
                tuning = Tuning.model_validate(deployment.get("user_config", {}))
                return GatewaySettings.model_validate(application["args"]), tuning
    raise ValueError(f"{path} has no gateway with an Ingress")


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recording", type=Path, default=DEFAULT_FILE)
    parser.add_argument("--config", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="default: all of the recording"
    )
    parser.add_argument("--requests", type=int, default=750, help="questions of a seed")
    parser.add_argument(
        "--refresh-s",
        type=float,
        default=Delays().refresh_s,
        help="pause between two snapshots of the ingress; 0: each decision uses all events",
    )
    parser.add_argument(
        "--latency-scale",
        type=float,
        default=1.0,
        help="factor on all recorded latencies, for a recording that was made on a busy machine",
    )
    parser.add_argument("--out", type=Path, help="also save all rows as parquet")
    return parser.parse_args()


def main() -> None:
    """Replay every seed and print the figures."""
    arguments = parse_arguments()
    try:
        recording = Recording(arguments.recording)
        models = [
            arm.name
            for arm in configured(arguments.config)[0].arms()
            if arm.name in recording.models()
        ]
        seeds = arguments.seeds or recording.seeds()
        streams = {
            seed: recording.stream(
                seed, stream_for(models, seed, arguments.requests), models
            )
            for seed in seeds
        }
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if not streams:
        raise SystemExit(
            f"{arguments.recording} has no answers; `python -m benchmarks.replay.record` records them"
        )
    player = Player(
        *configured(arguments.config), Delays(refresh_s=arguments.refresh_s)
    )
    streams = {
        seed: stream.scaled(arguments.latency_scale) for seed, stream in streams.items()
    }
    played = [
        player.play(stream, seed) for seed, stream in tqdm(streams.items(), unit="seed")
    ]
    frame = pd.concat(played, ignore_index=True)
    if arguments.out is not None:
        frame.to_parquet(arguments.out)
    print(report(frame, models))


if __name__ == "__main__":
    main()
