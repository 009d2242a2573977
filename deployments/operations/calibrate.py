"""Calibrates a running system: `router calibrate PROMPTS.jsonl`.

Every size answers the prompts while it is idle. The answers are graded by the references in the file, by a judge where
there is no reference, or by your own program. So the router knows what each size is good at before it has any feedback.
The same command goes on where an earlier one has stopped; answers that exist are not asked again.
"""

import json
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tqdm import tqdm

from deployments.calibration.prompts import PromptLine, read_prompts, sample
from deployments.errors import NoAnswerError
from deployments.tracking.calibration_report import draw, tables
from policies.evaluation.size_comparison import SizeReport

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


@dataclass(frozen=True)
class Options:
    """What to calibrate, and how.

    prompts: file of the prompts.
    sample: number of prompts to ask.
    models: sizes; None for all that chat.
    grader: the user's program; "" for none.
    max_calls: largest number of calls, with those of the judge. max_usd: largest cost of the answers.
    concurrency: calls at once, of each size.
    fresh: ask again what was answered before.
    out: folder of the picture.
    mlflow_wait: seconds to wait until the tracker has logged the report.
    """

    prompts: Path
    sample: int = 200
    models: list[str] | None = None
    grader: str = ""
    max_calls: int | None = None
    max_usd: float | None = None
    concurrency: int = 2
    fresh: bool = False
    out: Path = Path("var")
    mlflow_wait: float = MLFLOW_WAIT_S


class Command:
    """One run of the command.

    Args:
        client: of the gateway.
        given: what to calibrate.
        say: prints a line.
    """

    def __init__(
        self,
        client: httpx.Client,
        given: Options,
        say: Callable[[str], object] = print,
    ):
        self._client = client
        self._given = given
        self._say = say
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
            self._say(
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
        self._say(
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
        self._say(
            f"{status['state']}{reason}; {status['calls']} calls, "
            f"{status['spent_usd']:.4g} USD\n"
        )
        if found["report"] is None:
            self._say("there is no answer, and so no report")
            return None
        report = msgspec.convert(found["report"], SizeReport)
        self._say(tables(report))
        picture = self._given.out / f"calibration-{status['run_id']}.png"
        draw(report, picture)
        self._say(f"\npicture: {picture}")
        deadline = time.monotonic() + self._given.mlflow_wait
        while not status["mlflow_run"] and time.monotonic() < deadline:
            time.sleep(POLL_S)
            status = self._ask("GET", PATH, params={"report": False})
        self._say(
            f"in MLflow: run {status['mlflow_run']}"
            if status["mlflow_run"]
            else "not in MLflow yet; the tracker logs it there, if the gateway has an mlflow_uri"
        )
        return report

    def _ask(self, method: str, path: str, **options: Any) -> Json:
        """A reply of the gateway. Once it has answered, errors that pass are waited for, for GONE_S seconds."""
        deadline = time.monotonic() + GONE_S
        while True:
            failure: type[SystemExit] = NoAnswerError
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
                refusal = content.get("error") or {}
                message = str(refusal.get("message") or f"HTTP {answer.status_code}")
                if answer.status_code == 413:
                    message += "; choose a smaller --sample"
                if answer.status_code < 500:
                    failure = SystemExit
                if answer.status_code not in (429, 503):
                    raise failure(message)
            if not self._reached or time.monotonic() > deadline:
                raise failure(message)
            time.sleep(POLL_S)
