"""The commands that measure: calibrate and demo against a gateway, and report in a checkout."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from httpx import HTTPError

from deployments import paths
from deployments.commands import experiments
from deployments.commands import gateway as gateway_command
from deployments.demonstration import client
from deployments.operations import calibrate
from tests.support.commands import invoke
from tests.support.gateway import ROOT, Gateway

PROMPT = {"prompt": "What is 1 plus 10?", "reference": "large"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "POLL_S", 0.05)


@pytest.fixture
def line(tmp_path: Path) -> str:
    """A command line with a file of two prompts."""
    path = tmp_path / "prompts.jsonl"
    prompts = [{**PROMPT, "prompt": f"What is {i} plus 10?"} for i in range(2)]
    path.write_text("\n".join(map(json.dumps, prompts)))
    return f"calibrate {path} --out {tmp_path}/out --mlflow-wait 0"


def test_a_calibration_prints_its_report(gateway: Gateway, line: str) -> None:
    """With --json standard output has the report only, and the progress is on standard error."""
    result = invoke(gateway.client, f"{line} --models small")
    assert result.exit_code == 0 and "finished; 2 calls" in result.stdout
    assert gateway.models["large"].calls == []
    result = invoke(gateway.client, f"{line} --json")
    report = json.loads(result.stdout)["report"]
    assert report["best"]["all"] == "large" and "finished" in result.stderr


def test_a_refused_calibration(gateway: Gateway, line: str, tmp_path: Path) -> None:
    """An unknown size, a wrong line, a missing file: exit code 1, and the reason."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{}")
    for given, words in (
        (f"{line} --models minilm", "choose from: small, large"),
        (f"calibrate {wrong}", "line 1: give either"),
        (f"calibrate {tmp_path}/missing.jsonl", "missing.jsonl"),
    ):
        result = invoke(gateway.client, given)
        assert result.exit_code == 1 and words in result.stderr, given


def test_a_calibration_without_a_gateway(line: str) -> None:
    """Exit code 3, at once."""
    result = invoke(None, f"{line} --url http://127.0.0.1:9")
    assert result.exit_code == 3 and "is it running" in result.stderr


def test_outside_of_a_checkout_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed package has no notebooks/."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    result = invoke(None, "report")
    assert result.exit_code == 1 and "needs a checkout" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_in_a_checkout_the_report_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the options that the command does not know; its exit code is that of the command."""
    started = []

    class Done:
        returncode = 5

    def run(command: list[str], **options: Any) -> Done:
        started.append((command[1:], options))
        return Done()

    monkeypatch.setattr(experiments.subprocess, "run", run)
    monkeypatch.delenv("JOURNAL", raising=False)
    line = "report --journal sqlite:///x --out y.html"
    assert invoke(None, line).exit_code == 5
    ((command, options),) = started
    assert command == ["-m", "notebooks.report", "--out", "y.html"]
    assert options["cwd"] == ROOT and options["env"]["JOURNAL"] == "sqlite:///x"


def test_the_demo_needs_mlflow_before_it_asks_anything(gateway: Gateway) -> None:
    """Otherwise its results could not be logged after ten minutes of requests."""
    answer = gateway.client.get("/v1/router/state")
    with mock.patch.object(client.httpx, "get", side_effect=[answer, HTTPError("no")]):
        result = invoke(None, "demo --mlflow http://127.0.0.1:9")
    assert result.exit_code == 1 and "--mlflow ''" in result.stderr
    assert all(not model.calls for model in gateway.models.values())


def test_the_demo_prints_its_figures_for_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With --json standard output has the figures of each strategy only; what the demo says is on standard error."""
    figures = {"auto": {"utility_last_third": 0.8}}

    def demonstrate(_: object, say: Any) -> dict[str, dict[str, float]]:
        say("a table")
        return figures

    monkeypatch.setattr("deployments.demonstration.run.demonstrate", demonstrate)
    assert invoke(None, "demo").stdout == "a table\n"
    result = invoke(None, "demo --json")
    assert json.loads(result.stdout) == {"strategies": figures}
    assert result.stderr == "a table\n"


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(401, 1, "ROUTER_API_KEY"), (403, 1, "operate"), (404, 3, "gateway's URL")],
)
def test_the_demo_says_why_a_gateway_refuses_it(
    status: int, code: int, words: str
) -> None:
    """A missing key, a key without the scope, another server; the key of the environment is sent."""
    refused = httpx.Response(status)
    with (
        mock.patch.dict(os.environ, {gateway_command.KEY: "rk-1-2"}),
        mock.patch.object(client.httpx, "get", return_value=refused) as get,
    ):
        result = invoke(None, "demo")
    assert result.exit_code == code and words in result.stderr
    assert get.call_args.kwargs["headers"] == {"authorization": "Bearer rk-1-2"}
