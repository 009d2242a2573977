"""Records the answers of every size to the demo's questions: `python -m benchmarks.replay.record`.

The sizes of a running gateway are asked by name. An interrupted recording goes on where it stopped.
"""

import argparse
import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import httpx
from tqdm import tqdm

from assets.tasks import Task
from benchmarks.replay.recording import Recording, recorded
from deployments.demonstration.client import DEFAULT_URL, ask, chat_models
from deployments.demonstration.run import stream_for

DEFAULT_FILE = Path("var/recordings/demo.jsonl")


async def record(
    client: httpx.AsyncClient,
    recording: Recording,
    streams: dict[int, Sequence[Task]],
    models: Sequence[str],
    concurrency: int,
    quiet: bool = False,
) -> int:
    """Ask each model each question that has no recorded answer, and return the number of new answers.

    Args:
        client: of the gateway.
        recording: gets each answer as soon as it is complete.
        streams: questions by seed.
        models: names of the models.
        concurrency: number of requests in flight at all models together.
        quiet: hides the progress bar.

    Raises:
        RuntimeError: the gateway answered with an error, or another model answered.
    """
    waiting = deque(
        (seed, number, model)
        for seed, tasks in streams.items()
        for number in range(len(tasks))
        for model in models
        if (seed, number, model) not in recording.answers
    )
    todo = len(waiting)
    with tqdm(total=todo, desc="recorded", disable=quiet, unit="answer") as bar:

        async def work() -> None:
            while waiting:
                seed, number, model = waiting.popleft()
                answer = await ask(client, model, streams[seed][number])
                if answer.model != model:
                    raise RuntimeError(
                        f"'{answer.model}' answered a question for '{model}'"
                    )
                recording.append([recorded(seed, number, answer)])
                bar.update()

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(concurrency, todo)):
                workers.create_task(work())
    return todo


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(11, 21)))
    parser.add_argument("--requests", type=int, default=750, help="questions of a seed")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=4,
        help="requests in flight; more make the answers slower",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_FILE)
    return parser.parse_args()


def main() -> None:
    """Record what is missing."""
    arguments = parse_arguments()
    models = chat_models(arguments.url)
    recording = Recording(arguments.out)
    streams = {
        seed: stream_for(models, seed, arguments.requests) for seed in arguments.seeds
    }

    async def run() -> int:
        limits = httpx.Limits(max_connections=2 * arguments.concurrency)
        async with httpx.AsyncClient(
            base_url=arguments.url, timeout=120, limits=limits
        ) as client:
            return await record(
                client, recording, streams, models, arguments.concurrency
            )

    try:
        added = asyncio.run(run())
    except* (httpx.HTTPError, RuntimeError) as group:
        raise SystemExit(
            f"stopped after {len(recording.answers)} answers ({group.exceptions[0]}); the same command goes on "
            "from here"
        ) from None
    print(
        f"{added} new answers of {', '.join(models)}; {len(recording.answers)} in {arguments.out}"
    )


if __name__ == "__main__":
    main()
