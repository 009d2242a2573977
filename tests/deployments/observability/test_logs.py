"""Tests of the log lines: JSON with the request id and without text of prompts or answers."""

import json
import logging
from collections.abc import AsyncIterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ray._common.formatters import JSONFormatter
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.context import _RequestContext, _serve_request_context
from ray.serve.schema import LoggingConfig

from deployments.models.report import ModelReport
from deployments.observability import logs
from policies.events import Decision, Outcome
from policies.types import Objective, TaskProfile
from tests.support.fakes import failing
from tests.support.gateway import Gateway, eventually

ROOT = Path(__file__).resolve().parents[3]
SECRET = "canary-4711"
ASK = {"messages": [{"role": "user", "content": f"What is {SECRET} plus 5?"}]}


def lines(text: str) -> list[dict[str, Any]]:
    """Parse all lines as JSON."""
    return [json.loads(line) for line in text.splitlines() if line]


def ask(gateway: Gateway, request_id: str, **body: Any) -> Any:
    return gateway.client.post(
        "/v1/chat/completions",
        json={"model": "auto", **ASK, **body},
        headers={"x-request-id": request_id},
    )


def answered(text: str) -> list[dict[str, Any]]:
    return [line for line in lines(text) if line["message"] == "answered"]


@pytest.mark.parametrize("stream", [False, True])
def test_each_answer_is_one_line_with_its_request_and_decision(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    """The two ids join the logs of the load balancer and of Serve with the journal."""
    logs.configure("ingress")
    answers = {name: ask(gateway, name, stream=stream) for name in ("req-1", "req-2")}
    eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    found = answered(capsys.readouterr().err)
    assert [line["request_id"] for line in found] == ["req-1", "req-2"]
    for line in found:
        headers = answers[line["request_id"]].headers
        assert (
            line["decision_id"] == headers["x-router-decision-id"]
            and line["arm"] == headers["x-router-model"]
        )
        assert (
            line["status"] == "ok"
            and line["output_tokens"] == 2
            and line["latency_ms"] > 0
        )
        assert line["component"] == "ingress" and line["levelname"] == "INFO"


def test_failures_carry_the_request_id_and_no_text(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    """No prompt, no answer and no exception that quotes them is logged; type and place of the error are."""
    logs.configure("ingress")

    async def says(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        yield SECRET.encode(), ModelReport(1, 1)

    for model in gateway.models.values():
        model.script = says
    ask(gateway, "req-ok")
    for after in (0, 2):
        for model in gateway.models.values():
            model.script = failing(ValueError(f"cannot parse {SECRET}"), after)
        ask(gateway, f"req-{after}", stream=True)
    gateway.profiler.broken = True
    ask(gateway, "req-3")
    eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    text = capsys.readouterr().err
    assert SECRET not in text
    found = lines(text)
    assert {line["request_id"] for line in found if "request_id" in line} == {
        "req-ok",
        "req-0",
        "req-2",
        "req-3",
    }
    broken = [line for line in found if "broke off" in line["message"]]
    assert [line["request_id"] for line in broken] == ["req-2"]
    assert "ValueError" in broken[0]["message"]
    failed = [
        line
        for line in found
        if "before its first byte" in line["message"] and line["request_id"] == "req-0"
    ]
    assert len(failed) == 2 and all("ValueError" in line["message"] for line in failed)
    assert {line["status"] for line in found if line["message"] == "answered"} == {
        "ok",
        "error",
    }


def test_a_replica_logs_to_the_file_of_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica has Serve's formatter and a buffer in front of the file."""
    file = logging.FileHandler(tmp_path / "replica.log")
    file.setFormatter(JSONFormatter())
    buffer = MemoryHandler(1, logging.ERROR, file)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [buffer])
    logs.configure("ingress")
    token = logs.REQUEST_ID.set("req-9")
    try:
        logging.getLogger("deployments.gateway.ingress").warning("something happened")
        try:
            raise ValueError(SECRET)
        except ValueError:
            logging.getLogger("deployments.gateway.ingress").exception("it broke")
    finally:
        logs.REQUEST_ID.reset(token)
    buffer.close()
    text = (tmp_path / "replica.log").read_text()
    first, second = lines(text)
    assert first["message"] == "something happened" and first["request_id"] == "req-9"
    assert (
        first["levelname"] == "WARNING"
        and second["exc_text"].endswith("ValueError")
        and SECRET not in text
    )


def test_lines_are_flushed_before_the_buffer_of_serve_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In throughput mode the buffer holds a thousand lines, which a killed replica would lose."""
    file = logging.FileHandler(tmp_path / "replica.log")
    file.setFormatter(JSONFormatter())
    monkeypatch.setattr(
        logging.getLogger("ray.serve"),
        "handlers",
        [MemoryHandler(1_000, logging.ERROR, file)],
    )
    monkeypatch.setattr(logs, "FLUSH_EVERY_S", 0.01)
    logs.configure("ingress")
    logging.getLogger("deployments.gateway.ingress").warning("something happened")
    eventually(lambda: "something happened" in (tmp_path / "replica.log").read_text())


def test_serve_does_not_put_another_requests_id_on_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of many answers are written together, in the context of the first request."""
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [])
    as_serve = LoggingConfig(encoding="JSON", logs_dir=str(tmp_path))
    configure_component_logger(
        component_name="gateway_Ingress",
        component_id="x",
        logging_config=as_serve,
        max_bytes=10**6,
        backup_count=1,
    )
    logs.configure("ingress")
    profile = TaskProfile(np.zeros(2), "chat", "other", 1)
    decision = Decision("dec-1", "small", 0, "thompson-v0", profile, Objective())
    first = _serve_request_context.set(_RequestContext(request_id="req-1"))
    try:
        logs.finished(decision, Outcome("dec-1", "ok"), "req-7")
    finally:
        _serve_request_context.reset(first)
    logging.getLogger("ray.serve").handlers[0].close()
    (line,) = answered(next(tmp_path.iterdir()).read_text())
    assert line["request_id"] == "req-7" and line["decision_id"] == "dec-1"


@pytest.mark.parametrize("name", ["serve_config.yaml", "serve_config.gpu.yaml"])
def test_the_logs_of_serve_are_json_too(name: str) -> None:
    """Serve logs the same request id, and no access log, which says less than the router's line."""
    wanted = {"encoding": "JSON", "enable_access_log": False}
    assert yaml.safe_load((ROOT / name).read_text())["logging_config"] == wanted
