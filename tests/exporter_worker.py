"""The exporter in a process of its own, as the tracker is: `python -m tests.exporter_worker JOURNAL MLFLOW`.

Prints a line a turn: how long it took, the last row it carried, and what went wrong, if anything did.
"""

import asyncio
import os
import sys
import time
from typing import Any

from deployments.exporter import Exporter
from deployments.journal import Journal
from deployments.runs import Runs
from tests.fakes import Remote

os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "0", "3"


class Rows:
    """What the router does for the exporter."""

    def __init__(self, url: str):
        self.journal = Journal(url)

    async def rows(self, after: int, most: int) -> list[Any]:
        return await asyncio.to_thread(self.journal.rows, after, most)


async def main(journal: str, uri: str) -> None:
    """Until it is killed."""
    from mlflow import MlflowClient

    client, exporter = MlflowClient(uri), None
    while True:
        began, wrong = time.monotonic(), "-"
        try:
            if exporter is None:
                found = client.get_experiment_by_name("outage")
                experiment = found.experiment_id if found else client.create_experiment("outage")
                exporter = Exporter(Remote(Rows(journal)), Runs(client, experiment, "j", 1.0, {}), 1.0, 0.02)
            await exporter.turn(time.time())
        except Exception as error:
            wrong = type(error).__name__
        print(f"{time.monotonic() - began:.2f} {exporter.row if exporter else 0} {wrong}", flush=True)
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
