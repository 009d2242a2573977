"""Tests of what a client sees if a part behind the gateway is slow, broken or gone."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deployments.gateway import streaming
from tests.support import clock
from tests.support.fakes import failing
from tests.support.gateway import Gateway, eventually
from tests.support.hostile_input import ASK


@pytest.mark.parametrize("trouble", ["broken", "slow"])
def test_the_last_snapshot_decides_if_the_router_is_unavailable(
    gateway: Gateway, trouble: str
) -> None:
    """The request succeeds, its header names the fallback, and the router gets the decision once it is back."""
    if trouble == "broken":
        gateway.router.broken = True
    else:
        gateway.router.delay_s = 5.0
        gateway.tune(decide_timeout_s=0.05)
    answer = gateway.chat()
    assert answer.status_code == 200 and answer.headers["x-router-fallback"] == "router"
    gateway.router.broken = False
    gateway.router.delay_s = 0.0
    where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    eventually(
        lambda: (
            (answer := gateway.client.get(where)).status_code == 200
            and answer.json()["outcome"]
        )
    )
    found = gateway.client.get(where)
    assert (
        found.json()["fallback"] == "router"
        and found.json()["outcome"]["status"] == "ok"
    )


@pytest.mark.parametrize("part", ["router", "profiler"])
def test_a_slow_part_delays_an_answer_only_until_its_deadline(
    tmp_path: Path, part: str
) -> None:
    """At the deadline the gateway answers without the slow part and names it as the fallback."""
    gateway = Gateway(tmp_path)

    async def run() -> tuple[Any, float]:
        async with gateway.at_once() as client:
            gateway.tune(
                local_profile_max_chars=0, profile_timeout_s=0.25, decide_timeout_s=0.25
            )
            getattr(gateway, part).delay_s = 5.0
            began = asyncio.get_running_loop().time()
            answer = await client.post("/v1/chat/completions", json=ASK)
            return answer, asyncio.get_running_loop().time() - began

    answer, took_s = clock.run(run())
    assert answer.status_code == 200 and answer.headers["x-router-fallback"] == part
    assert took_s == pytest.approx(0.25)


def test_a_broken_profiler_leaves_a_profile_of_the_text_alone(gateway: Gateway) -> None:
    """Without the profiler a prompt is profiled without its embedding, and the header names the fallback."""
    gateway.profiler.broken = True
    gateway.tune(local_profile_max_chars=0)
    answer = gateway.chat()
    assert (
        answer.status_code == 200 and answer.headers["x-router-fallback"] == "profiler"
    )
    found = gateway.client.get(
        f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    ).json()
    assert (
        found["fallback"] == "profiler"
        and "read without its embedding" in found["summary"]
    )


def test_a_second_attempt_has_the_same_objective(tmp_path: Path) -> None:
    """Urgency and the price of the ceiling count once in a second attempt, and its record has the prompt."""
    gateway = Gateway(tmp_path, max_mean_cost_usd=1.0, store_text=True)
    with gateway.client:
        for arm in ("small", "large"):
            gateway.models[arm].script = failing(RuntimeError())
        gateway.router.thing._projections.pacer.integral = (
            gateway.ingress.router_client._pacer._pacer.integral
        ) = 9.0
        gateway.tune(snapshot_max_age_s=1e6)
        assert (
            gateway.chat(
                messages=[{"role": "user", "content": "Quickly, what is 3 plus 5?"}]
            ).status_code
            == 503
        )
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        first, second = (
            r.decision for r in gateway.router.thing._learner.records._records.values()
        )
        assert (first.fallback, second.fallback) == (
            "",
            "model",
        ) and first.objective.cost_weight > 1
        assert (
            second.objective.latency_weight
            == first.objective.latency_weight
            == pytest.approx(0.3)
        )
        assert second.objective.cost_weight == pytest.approx(
            first.objective.cost_weight, rel=0.2
        )
        assert (
            second.prompt_hash == first.prompt_hash != ""
            and second.prompt == first.prompt
        )


def test_a_short_text_needs_no_profiler(gateway: Gateway) -> None:
    """The ingress profiles a short text itself, with the same result as the profiler."""
    gateway.tune(local_profile_max_chars=0)
    there = gateway.chat().headers["x-router-decision-id"]
    gateway.profiler.broken = True
    gateway.tune(local_profile_max_chars=4000)
    answer = gateway.chat()
    assert answer.headers["x-router-fallback"] == "none"
    ids = (there, answer.headers["x-router-decision-id"])
    profiles = [
        gateway.client.get(f"/v1/router/decisions/{i}").json()["profile"] for i in ids
    ]
    assert profiles[0] == profiles[1]


def test_another_model_answers_if_one_fails_before_its_first_byte(
    gateway: Gateway,
) -> None:
    """The gateway asks the other model once and records the failure as an error of the first."""
    gateway.models["small"].script = failing(RuntimeError("secret detail"))
    answer = gateway.chat(router={"models": ["small", "large"], "cost_weight": 1e6})
    assert answer.status_code == 200
    assert (
        answer.headers["x-router-model"] == "large"
        and answer.headers["x-router-fallback"] == "model"
    )


def test_a_model_that_fails_by_name_gives_a_clean_503(gateway: Gateway) -> None:
    """If a model that was asked for by name fails, the answer is a 503 without internal details."""
    gateway.models["large"].script = failing(RuntimeError("secret detail"))
    answer = gateway.chat(model="large")
    assert answer.status_code == 503 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


def test_a_stream_that_breaks_ends_with_an_error_event(gateway: Gateway) -> None:
    """After the first byte no other model can answer, so the stream ends with an error event."""
    gateway.models["large"].script = failing(RuntimeError("secret detail"), after=2)
    answer = gateway.chat(model="large", stream=True)
    events = [line for line in answer.text.split("\n\n") if line]
    assert events[:2] == ["data: 0", "data: 1"] and "secret" not in answer.text
    assert (
        json.loads(events[2].removeprefix("data: "))["error"]["type"] == "server_error"
    )


async def never(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
    """An engine that stops responding after its first chunk."""
    yield b"data: 1\n\n", None
    await asyncio.sleep(3600)


def talk(gateway: Gateway, receive: Any, send: Any) -> None:
    """Send a streamed request to `large` with a client's own `receive` and `send`."""
    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"",
        "query_string": b"",
    }
    scope |= {
        "headers": headers,
        "root_path": "",
        "scheme": "http",
        "server": ("a", 80),
        "http_version": "1.1",
    }
    assert gateway.client.portal is not None
    gateway.client.portal.call(gateway.client.app, scope, receive, send)  # type: ignore[arg-type]


def assert_freed(gateway: Gateway, headers: list[tuple[bytes, bytes]]) -> None:
    """Check that the engine was cancelled, its slot is free, and the outcome has a cost but is no failure."""
    line = gateway.ingress.dispatcher.admission.queues["large"]
    assert gateway.models["large"].cancelled == 1 and not line.running
    assert not any(gateway.ingress.router_client.in_flight.values())
    where = f"/v1/router/decisions/{dict(headers)[b'x-router-decision-id'].decode()}"
    eventually(lambda: gateway.client.get(where).json()["outcome"])
    outcome = gateway.client.get(where).json()["outcome"]
    assert outcome["status"] == "disconnected"
    assert (
        outcome["prompt_tokens"] > 0
        and outcome["output_tokens"] >= 1
        and outcome["cost_usd"] > 0
    ), "it was made"


BODY = b'{"model": "large", "stream": true, "messages": [{"role": "user", "content": "a"}]}'


def test_a_client_that_leaves_frees_the_engine(gateway: Gateway) -> None:
    """If a client leaves, its request is cancelled and recorded as disconnected, not as a failure of the model."""
    gateway.models["large"].script = never
    sent: list[dict[str, Any]] = []
    inbox = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> dict[str, Any]:
        while not inbox:
            await asyncio.sleep(0.01)
            if any(message.get("body") for message in sent):
                return {"type": "http.disconnect"}
        return inbox.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    talk(gateway, receive, send)
    assert_freed(gateway, sent[0]["headers"])


def test_a_client_that_reads_nothing_frees_the_engine(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that stops reading is cut off after answer_timeout_s, even if the model has finished."""
    monkeypatch.setattr(streaming, "LAST_EVENT_S", 0.1)
    gateway.tune(answer_timeout_s=0.2)
    sent: list[dict[str, Any]] = []
    inbox = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not inbox:
            await asyncio.sleep(100)
        return inbox.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message.get("body"):
            await asyncio.sleep(100)

    began = time.monotonic()
    talk(gateway, receive, send)
    # without the timeout it would take a hundred seconds
    assert time.monotonic() - began < 90 and len(sent) == 2
    assert_freed(gateway, sent[0]["headers"])


def test_in_flight_counts_return_to_zero(gateway: Gateway) -> None:
    """The in-flight counts are zero after a success, a failure and a broken stream."""
    gateway.chat()
    gateway.models["large"].script = failing(RuntimeError())
    gateway.chat(model="large")
    gateway.chat(model="large", stream=True)
    assert not any(gateway.ingress.router_client.in_flight.values())


def test_concurrent_requests_count_as_load_before_their_answers(
    tmp_path: Path,
) -> None:
    """Ten concurrent requests for a model count each other as load; a single request counts none."""
    gateway = Gateway(tmp_path)

    async def run() -> tuple[float, list[float]]:
        async with gateway.at_once() as client:

            async def ask() -> str:
                answer = await client.post(
                    "/v1/chat/completions", json={**ASK, "model": "large"}
                )
                return str(answer.headers["x-router-decision-id"])

            async def load(decision_id: str) -> float:
                models = (
                    await client.get(f"/v1/router/decisions/{decision_id}")
                ).json()["models"]
                return next(float(m["load"]) for m in models if m["arm"] == "large")

            alone = await ask()
            gateway.router.delay_s = 0.05  # so that all wait at the same time
            crowd = await asyncio.gather(*(ask() for _ in range(10)))
            return await load(alone), [await load(decision_id) for decision_id in crowd]

    alone, crowd = clock.run(run())
    assert alone == 0
    assert sorted(crowd)[5] >= 4


def test_a_model_without_replicas_is_not_chosen(gateway: Gateway) -> None:
    """`auto` avoids a model without replicas; a request for it by name gets a 503 with Retry-After."""
    gateway.replicas["large"] = 0
    eventually(
        lambda: (
            not gateway.client.get("/v1/router/state").json()["models"]["large"][
                "healthy"
            ]
        )
    )
    assert {gateway.chat().headers["x-router-model"] for _ in range(10)} == {"small"}
    answer = gateway.chat(model="large")
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_a_restarted_router_knows_what_it_had_learned(tmp_path: Path) -> None:
    """After a restart the journal restores the posterior to 1e-9, and feedback for old decisions still counts."""
    first = Gateway(tmp_path)
    with first.client:
        ids = [first.chat().headers["x-router-decision-id"] for _ in range(12)]
        for i, decision_id in enumerate(ids[:-1]):
            first.client.post(
                "/v1/feedback", json={"decision_id": decision_id, "score": i / 12}
            )
        eventually(lambda: not first.ingress.router_client.outcomes.unsent)
    before = first.router.thing._policy.state()
    second = Gateway(tmp_path)
    after = second.router.thing._policy.state()
    assert all(abs(after[name] - before[name]).max() < 1e-9 for name in before)
    with second.client:
        answer = second.client.post(
            "/v1/feedback", json={"decision_id": ids[-1], "score": 1.0}
        )
        assert answer.json()["status"] == "accepted"
        repeated = second.client.post(
            "/v1/feedback", json={"decision_id": ids[0], "score": 0.0}
        )
        assert repeated.json()["status"] == "duplicate"
        assert second.client.get("/v1/router/state").json()["decisions"] >= 12
