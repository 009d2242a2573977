"""Requests that make a healthy engine fail: their client gets an error, and other clients are not affected."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError
from vllm.exceptions import GenerationError
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.dispatch.arm_check import VALID_S, ArmCheck
from deployments.dispatch.circuit_breaker import Breaker
from deployments.gateway.answer_checks import AnswerChecker
from deployments.models.report import ModelReport, failure
from deployments.models.server import WARM_UP, ModelServer
from deployments.settings import BreakerSettings
from tests.deployments.dispatch.test_admission import Clock
from tests.deployments.models.test_server import SAID, event, server
from tests.support.fakes import FakeModel
from tests.support.gateway import Gateway, eventually

DONE = "data: [DONE]\n\n"
FAILED = event(RuntimeError("in /usr/lib/grammar.cc"))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CONSTRAINED: dict[str, dict[str, Any]] = {
    "a schema that refers to itself": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"$ref": "#"}},
        }
    },
    "a text that no token spells": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"const": "\u202e"}},
        }
    },
    "a tool that must be called": {"tools": [TOOL], "tool_choice": "required"},
    "a named tool": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
    "a strict tool": {
        "tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]
    },  # type: ignore[dict-item]
}


def living(*items: Any, errored: bool = False) -> ModelServer:
    """A server whose engine is alive, or dead if `errored`."""
    made = server(*items)
    made.engine = SimpleNamespace(_engine_client=SimpleNamespace(errored=errored))
    return made


def fails_at(model: FakeModel, made: ModelServer, wrong: str) -> None:
    """Let the model answer as `made` if the body contains `wrong`, and otherwise as a healthy one."""

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        if wrong not in json.dumps(body):
            async for item in model._say_name(task, body):
                yield item
        elif body.get("stream"):
            async for item in made.generate(task, body):
                yield item
        else:
            yield await made.complete(task, body)

    model.script = script


def fail_everywhere(gateway: Gateway, wrong: str, stream: bool, *items: Any) -> None:
    """Let the engines of all chat models fail if the body contains `wrong`, as vLLM does, or with these items."""
    failure = items or ((FAILED, DONE) if stream else (_error_item(),))
    for name in ("small", "large"):
        fails_at(gateway.models[name], living(*failure), wrong)


def calls(gateway: Gateway) -> int:
    return sum(len(model.calls) for model in gateway.models.values())


def all_admit(gateway: Gateway) -> bool:
    return all(
        breaker.admits for breaker in gateway.ingress.dispatcher.breakers.values()
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", CONSTRAINED.values(), ids=CONSTRAINED)
def test_schema_that_makes_the_engine_fail_is_a_client_error(
    gateway: Gateway, body: dict[str, Any], stream: bool
) -> None:
    """A 400 names the parameter. One model is asked, and no circuit breaker opens."""
    wrong = path = "tools"
    if "response_format" in body:
        wrong, path = "response_format", "response_format.json_schema.schema"
    fail_everywhere(gateway, wrong, stream)
    for asked in range(1, 9):
        answer = gateway.chat(**body, stream=stream)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (
            error["param"] == path
            and error["type"] == "invalid_request_error"
            and "/usr" not in error["message"]
        )
        assert calls(gateway) == asked
    assert all_admit(gateway)
    assert gateway.chat().status_code == 200


def _error_item() -> Any:
    from ray.serve.llm.openai_api_models import ErrorResponse
    from vllm.entrypoints.serve.exception_handling.error_response import (
        create_error_response,
    )

    return ErrorResponse(
        **create_error_response(RuntimeError("in /usr/lib/grammar.cc")).model_dump()
    )


def test_stream_that_a_schema_breaks_off_ends_with_a_client_error(
    gateway: Gateway,
) -> None:
    """It breaks off after the first words, with vLLM's error or without a reason."""
    for items in ((SAID, FAILED, DONE), (SAID, DONE)):
        fail_everywhere(gateway, "json_schema", True, *items)
        answer = gateway.chat(**CONSTRAINED["a text that no token spells"], stream=True)
        last = json.loads(answer.text.strip().split("data: ")[-1])
        assert last["error"]["type"] == "invalid_request_error"
    assert all_admit(gateway)


async def test_errors_raised_by_vllm_become_reports() -> None:
    """VLLM raises GenerationError for a request without stream. Other exceptions are not caught."""
    body = {**WARM_UP["chat"], **CONSTRAINED["a schema that refers to itself"]}
    for constrained, status in ((body, 400), (WARM_UP["chat"], 500)):
        _, report = await living(GenerationError("no")).complete("chat", constrained)
        assert report.error.status == status
    with pytest.raises(ZeroDivisionError):
        await living(ZeroDivisionError()).complete("chat", body)


async def test_dead_engine_is_a_server_error() -> None:
    """Even if the request has a schema."""
    body = {**WARM_UP["chat"], **CONSTRAINED["a schema that refers to itself"]}
    for errored, status in ((False, 400), (True, 500)):
        _, report = await living(_error_item(), errored=errored).complete("chat", body)
        assert report.error.status == status
    _, report = await living(_error_item()).complete("chat", WARM_UP["chat"])
    assert report.error.status == 500


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hedge_after_fraction", [None, 0.05])
def test_schema_that_hangs_an_engine_is_not_sent_to_a_second_one(
    gateway: Gateway, stream: bool, hedge_after_fraction: float | None
) -> None:
    """It times out, without failover or hedging. A request without a schema is failed over."""
    gateway.tune(
        first_byte_timeout_s=0.3,
        answer_timeout_s=0.3,
        hedge_after_fraction=hedge_after_fraction,
    )

    async def hangs(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        await asyncio.sleep(3_600)
        yield b"", None

    async def taken() -> None:
        for name in ("small", "large"):
            model = gateway.models[name]
            model.script = hangs
            model.replica = asyncio.get_running_loop().create_future()
            model.replica.set_result(None)

    assert gateway.client.portal is not None
    gateway.client.portal.call(taken)
    wish = {"max_latency_s": 30.0}
    answer = gateway.chat(
        **CONSTRAINED["a schema that refers to itself"], stream=stream, router=wish
    )
    assert answer.status_code == 503 and "schema" in answer.json()["error"]["message"]
    assert calls(gateway) == 1
    assert gateway.chat(stream=stream, router=wish).status_code == 503
    assert calls(gateway) == 3


def test_schema_that_no_replica_accepted_is_failed_over(gateway: Gateway) -> None:
    """An arm whose call failed on the way has not seen the schema."""

    async def refuses(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        raise ConnectionError
        yield b"", None

    gateway.models["small"].script = refuses
    wish = {"cost_weight": 1e6}
    answer = gateway.chat(**CONSTRAINED["a schema that refers to itself"], router=wish)
    assert answer.status_code == 200 and answer.headers["x-router-fallback"] == "model"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wrong", ["logprobs", "logit_bias", "echo-me", "seed"])
def test_failing_requests_of_one_client_open_no_breaker(
    gateway: Gateway, wrong: str, stream: bool
) -> None:
    """The arms answer their check, so the requests caused the failures."""
    fail_everywhere(gateway, wrong, stream)
    hostile: dict[str, Any] = {
        "logprobs": {"logprobs": True},
        "logit_bias": {"logit_bias": {"1": 5}},
        "echo-me": {"messages": [{"role": "user", "content": "echo-me"}]},
        "seed": {"seed": 1},
    }[wrong]
    gateway.tune(breaker={"failure_threshold": 3, "cooldown_s": 60})
    for _ in range(12):
        assert gateway.chat(**hostile, stream=stream).status_code == 503
        assert gateway.chat().status_code == 200
    assert all_admit(gateway)


def test_a_failing_probe_does_not_keep_a_healthy_arm_out(gateway: Gateway) -> None:
    """The breaker is half-open, the arm is healthy again, and the probe is a request that makes any engine fail."""
    gateway.tune(breaker={"failure_threshold": 1, "cooldown_s": 0.05})
    small = gateway.models["small"]
    breaker = gateway.ingress.dispatcher.breakers["small"]
    dead = living(event(EngineDeadError()), DONE, errored=True)
    fails_at(small, dead, "")
    assert gateway.chat(model="small", stream=True).status_code == 503
    eventually(lambda: not breaker.admits)
    eventually(lambda: breaker.admits)
    fails_at(small, living(_error_item()), "logprobs")
    assert gateway.chat(model="small", logprobs=True).status_code == 503
    eventually(lambda: breaker.admits and breaker.retry_after_s == 0)
    assert gateway.chat(model="small").status_code == 200


def test_breaker_stays_closed_until_the_check_fails() -> None:
    """One check runs at a time."""
    started: list[bool] = []
    breaker = Breaker(Clock(), check=lambda: started.append(True))
    breaker.settings = BreakerSettings(failure_threshold=3, cooldown_s=5)
    for _ in range(9):
        breaker.end("error", breaker.begin())
    assert started == [True] and breaker.admits
    breaker.on_check(True)
    assert breaker.admits
    for _ in range(3):
        breaker.end("error", breaker.begin())
    assert len(started) == 2
    breaker.on_check(False)
    assert not breaker.admits


def test_slow_check_does_not_open_the_breaker_after_a_success() -> None:
    """A success that comes during the check ends the suspicion."""
    breaker = Breaker(Clock(), check=lambda: None)
    for _ in range(3):
        breaker.end("error", breaker.begin())
    breaker.end("ok", breaker.begin())
    breaker.on_check(False)
    assert breaker.admits


@pytest.mark.parametrize(
    ("failing", "healthy"),
    [("", True), ("error", False), ("hang", False), ("busy", True)],
)
async def test_arm_check_tells_a_healthy_arm_from_a_broken_one(
    failing: str, healthy: bool
) -> None:
    """An answer is healthy, and so is a busy arm. An error or a timeout is not."""

    async def answer() -> tuple[bytes, ModelReport]:
        if failing == "hang":
            await asyncio.sleep(3_600)
        if failing == "busy":
            raise BackPressureError(1, 1)
        if failing == "error":
            return b"", failure("broken", 500)
        return b"", ModelReport(finish_reason="length")

    async def run() -> list[bool]:
        found: list[bool] = []
        asked: list[Any] = []
        clock = Clock()

        async def method() -> Any:
            return SimpleNamespace(
                remote=lambda task, body: asked.append(body) or answer()
            )

        check = ArmCheck("chat", method, found.append, clock, deadline_s=0.2)
        check.start()
        while not found:
            await asyncio.sleep(0.01)
        check.start()
        # a successful check is used again for VALID_S
        assert len(found) == (2 if healthy else 1)
        clock.now += VALID_S
        while len(found) < 2:
            await asyncio.sleep(0.01)
        assert len(asked) == (1 if healthy else 2)
        return found

    assert (await run()) == [healthy, healthy]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 5_000 + "]" * 5_000, '{"a":' * 50_000, '["\\"[",' * 300],
)
def test_answer_that_is_nested_too_deeply_to_check_is_no_failure(
    gateway: Gateway, text: str
) -> None:
    """The client gets it unchanged, and it does not count as a failure of the arm."""
    body = {"response_format": {"type": "json_object"}}
    checker = AnswerChecker("chat", body)
    checker.feed(json.dumps({"choices": [{"message": {"content": text}}]}).encode())
    assert checker.defect("stop") == ""

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        said = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        yield said, ModelReport(7, 2, "stop")

    for name in ("small", "large"):
        gateway.models[name].script = script
    for _ in range(4):
        assert gateway.chat(**body).json()["choices"][0]["message"]["content"] == text
    assert all_admit(gateway)


def test_valid_json_of_any_depth_has_no_defect() -> None:
    """Below and above the depth that the parser reads."""
    for depth in range(195, 210):
        checker = AnswerChecker("chat", {"response_format": {"type": "json_object"}})
        text = "[" * depth + "]" * depth
        answer = {"choices": [{"message": {"content": text}}]}
        checker.feed(json.dumps(answer).encode())
        assert checker.defect("stop") == ""
