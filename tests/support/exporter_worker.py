"""The exporter in a process of its own, like the tracker: `python -m tests.support.exporter_worker JOURNAL MLFLOW`.

For each run of the exporter it prints a line: the duration, the last exported row, and the error or "-".
"""

import asyncio
import os
import sys
import time
from typing import Any

from deployments.journal.journal import Journal
from deployments.tracking.exporter import Exporter
from deployments.tracking.mlflow_runs import MlflowRuns
from tests.support.fakes import Remote

os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "3"


class Rows:
    """The router's method that the exporter calls."""

    def __init__(self, url: str):
        self.journal = Journal(url)

    async def rows(self, after: int, most: int) -> list[Any]:
        return await asyncio.to_thread(self.journal.rows, after, most)


async def main(journal: str, uri: str) -> None:
    """Export until the process is killed."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    exporter = None
    while True:
        began = time.monotonic()
        wrong = "-"
        try:
            if exporter is None:
                found = client.get_experiment_by_name("outage")
                experiment = (
                    found.experiment_id if found else client.create_experiment("outage")
                )
                exporter = Exporter(
                    Remote(Rows(journal)),
                    MlflowRuns(client, experiment, "j", 1.0, {}),
                    1.0,
                    0.02,
                )
            await exporter.run_once(time.time())
        except Exception as error:
            wrong = type(error).__name__
        print(
            f"{time.monotonic() - began:.2f} {exporter.row if exporter else 0} {wrong}",
            flush=True,
        )
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
