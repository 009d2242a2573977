"""Calibrates a running system: `python -m deployments.cli calibrate PROMPTS.jsonl`.

Every size answers the prompts while it is idle. The answers are graded by the references in the file, by a judge where
there is no reference, or by your own program. So the router knows what each size is good at before it has any feedback.
The same command goes on where an earlier one has stopped; answers that exist are not asked again.

PROMPTS.jsonl has one JSON object a line:

    {"prompt": "What is 2 plus 2?", "reference": "4", "grade": "number", "max_tokens": 50}
    {"messages": [{"role": "user", "content": "…"}]}

`grade` is exact (the default), regex, number or json. With --grader your program reads one line of JSON from stdin,
{"prompt": …, "reference": …, "answer": …}, and prints a score from 0 to 1. It runs here, never in the gateway.

The command uses the gateway's HTTP API. If it asks for keys, ROUTER_API_KEY needs the scope `operate`.
"""

import argparse
import json
import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tqdm import tqdm

from deployments.calibration.prompts import PromptLine, read_prompts, sample
from deployments.tracking.calibration_report import draw, tables
from policies.evaluation.size_comparison import SizeReport

URL = "http://127.0.0.1:8000"
PATH = "/v1/router/calibrations"
POLL_S = 1.0
GRADER_TIMEOUT_S = 60.0
MLFLOW_WAIT_S = 20.0  # for the tracker to log the report
GONE_S = 60.0  # without an answer of the gateway, after which the command gives up
Json = dict[str, Any]


def grade_by_program(program: str, answer: Json) -> float:
    """The score that the user's program gives for an answer.

    Raises:
        SystemExit: the program failed, or printed no score.
    """
    line = json.dumps({key: answer[key] for key in ("prompt", "reference", "answer")})
    try:
        done = subprocess.run(
            shlex.split(program),
            input=line + "\n",
            capture_output=True,
            text=True,
            timeout=GRADER_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"the grader '{program}' did not run: {error}") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise SystemExit(
            f"the grader '{program}' ended with {done.returncode}: {' '.join(last)}"
        )
    try:
        score = float(done.stdout.strip())
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise SystemExit(
            f"the grader '{program}' printed {done.stdout.strip()[:100]!r}; "
            "it must print one number from 0 to 1"
        )
    return score


class Command:
    """One run of the command.

    Args:
        client: of the gateway.
        given: the command line.
    """

    def __init__(self, client: httpx.Client, given: argparse.Namespace):
        self._client = client
        self._given = given
        self._scores: dict[str, float] = {}  # by decision id, given so far
        self._reached = False  # whether the gateway has answered once

    def run(self) -> SizeReport | None:
        """Calibrate, and print the report; None if there is no answer.

        Raises:
            SystemExit: the file is wrong, or the gateway refused something.
        """
        given = self._given
        try:
            prompts = sample(read_prompts(given.prompts), given.sample)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        status = self._start(prompts)
        try:
            status = self._watch(status, prompts)
        except KeyboardInterrupt:
            print(
                "\nthe calibration goes on without this command; to end it: "
                f"curl -X DELETE {self._client.base_url}{PATH}"
            )
            return None
        return self._show(status)

    def _start(self, prompts: list[PromptLine], fresh: bool | None = None) -> Json:
        given = self._given
        body = {
            "prompts": [
                prompt.model_dump(mode="json", exclude_none=True) for prompt in prompts
            ],
            "models": given.models,
            "by_program": bool(given.grader),
            "max_calls": given.max_calls,
            "max_usd": given.max_usd,
            "concurrency": given.concurrency,
            "fresh": given.fresh if fresh is None else fresh,
        }
        status = self._ask("POST", PATH, json=body)
        print(
            f"calibration {status['run_id']}: {len(prompts)} prompts, "
            f"{', '.join(status['models'])}; {status['reused']} answers exist already"
        )
        return status

    def _watch(self, status: Json, prompts: list[PromptLine]) -> Json:
        """Show the progress until the calibration is over; returns its last status."""
        total = sum(model["prompts"] for model in status["models"].values())
        with tqdm(total=total, unit="answer", disable=None) as bar:
            while True:
                models: dict[str, Json] = status["models"]
                bar.n = sum(model["answered"] for model in models.values())
                busy = [name for name, model in models.items() if model["waiting"]]
                bar.set_postfix_str(
                    f"waiting until idle: {', '.join(busy)}" if busy else ""
                )
                bar.refresh()
                if status["state"] == "interrupted":
                    status = self._start(prompts, fresh=False)
                elif status["state"] != "running":
                    return status
                if self._given.grader:
                    self._grade()
                time.sleep(POLL_S)
                status = self._ask("GET", PATH, params={"report": False})

    def _grade(self) -> None:
        """Grade the answers that wait for the user's program."""
        for answer in self._ask("GET", f"{PATH}/answers")["answers"]:
            decision_id = answer["decision_id"]
            if decision_id not in self._scores:
                self._scores[decision_id] = grade_by_program(self._given.grader, answer)
            scores = [{"decision_id": decision_id, "score": self._scores[decision_id]}]
            self._ask("POST", f"{PATH}/scores", json={"scores": scores})

    def _show(self, status: Json) -> SizeReport | None:
        """Print the report, save the picture, and name the MLflow run."""
        found = self._ask("GET", PATH)
        reason = f": {status['reason']}" if status["reason"] else ""
        print(
            f"{status['state']}{reason}; {status['calls']} calls, "
            f"{status['spent_usd']:.4g} USD\n"
        )
        if found["report"] is None:
            print("there is no answer, and so no report")
            return None
        report = msgspec.convert(found["report"], SizeReport)
        print(tables(report))
        picture = self._given.out / f"calibration-{status['run_id']}.png"
        draw(report, picture)
        print(f"\npicture: {picture}")
        deadline = time.monotonic() + self._given.mlflow_wait
        while not status["mlflow_run"] and time.monotonic() < deadline:
            time.sleep(POLL_S)
            status = self._ask("GET", PATH, params={"report": False})
        print(
            f"in MLflow: run {status['mlflow_run']}"
            if status["mlflow_run"]
            else "not in MLflow yet; the tracker logs it there, if the gateway has an mlflow_uri"
        )
        return report

    def _ask(self, method: str, path: str, **options: Any) -> Json:
        """A reply of the gateway. Once it has answered, errors that pass are waited for, for GONE_S seconds."""
        deadline = time.monotonic() + GONE_S
        while True:
            try:
                answer = self._client.request(method, path, **options)
                content: Json = answer.json()
            except (httpx.HTTPError, ValueError) as error:
                message = (
                    f"no answer from {self._client.base_url} ({type(error).__name__}); "
                    "is it running?"
                )
            else:
                if answer.is_success:
                    self._reached = True
                    return content
                message = str(content["error"]["message"])
                if answer.status_code == 413:
                    message += "; choose a smaller --sample"
                if answer.status_code not in (429, 503):
                    raise SystemExit(message)
            if not self._reached or time.monotonic() > deadline:
                raise SystemExit(message)
            time.sleep(POLL_S)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--sample", type=int, default=200, help="prompts to ask")
    parser.add_argument("--models", nargs="+", help="sizes; by default all that chat")
    parser.add_argument("--grader", default="", help='your program: "python grade.py"')
    parser.add_argument("--max-calls", type=int, help="those of the judge included")
    parser.add_argument(
        "--max-usd", type=float, help="of the answers, by the sizes' prices"
    )
    parser.add_argument(
        "--concurrency", type=int, default=2, help="calls at once, of each size"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="ask again what was answered before"
    )
    parser.add_argument("--out", type=Path, default=Path("var"))
    parser.add_argument("--mlflow-wait", type=float, default=MLFLOW_WAIT_S)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    given = parse(arguments or [])
    key = os.environ.get("ROUTER_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=given.url, headers=headers, timeout=310) as client:
        Command(client, given).run()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
