"""The wait for a place at a model, foreseen at the decision and told after the answer."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deployments.admission import NORMAL
from tests import clock
from tests.gateway import Gateway
from tests.test_admission import takes


def test_what_a_line_takes_is_foreseen_and_told(tmp_path: Path) -> None:
    """The wait for a place is part of the latency that is expected, and is told apart from it, in state and outcome."""
    gateway = Gateway(tmp_path)
    gateway.models["large"].script = takes(0.4)

    async def run() -> list[Any]:
        async with gateway.at_once() as client:
            gateway.tune(decide_here_s=1e6, admission={"running": 1, "waiting": 16, "wait_s": 10})

            async def ask(model: str) -> str:
                body = {"model": model, "messages": [{"role": "user", "content": "Why?"}]}
                return (await client.post("/v1/chat/completions", json=body)).headers["x-router-decision-id"]

            await ask("small")  # known then: of what is not, even a long wait may be worth a try
            await ask("large")  # from which the line knows how long a place is held
            crowd = [asyncio.create_task(ask("large")) for _ in range(3)]
            while gateway.ingress.dispatcher.admission.lines["large"].waiting < 2:
                await asyncio.sleep(0.01)
            decided = await ask("auto:fast")
            told = (await client.get("/v1/router/state")).json()["models"]["large"]["wait_s"]
            assert told == pytest.approx(3 * 0.4, abs=0.05)
            ids = [*await asyncio.gather(*crowd), decided]
            while gateway.ingress.decider._reporting:
                await asyncio.sleep(0.05)
            return [await gateway.router.thing.record(one) for one in ids]

    *crowd, last = clock.run(run())
    waited = sorted(record.outcome.waited_s for record in crowd)
    assert waited == pytest.approx([0, 0.4, 0.8], abs=0.02)
    foreseen = {arm: last.decision.estimate(arm).latency_s for arm in ("small", "large")}
    assert last.decision.arm == "small" and foreseen["large"] > foreseen["small"] + 1.2


def test_who_leaves_the_line_has_waited_for_a_place_and_not_for_the_model(tmp_path: Path) -> None:
    """Impatient clients in a long line do not make a fast model slow."""
    gateway = Gateway(tmp_path)

    async def run() -> Any:
        async with gateway.at_once() as client:
            gateway.tune(decide_here_s=1e6, admission={"running": 1, "waiting": 16, "wait_s": 10})
            decider, told = gateway.ingress.decider, list[Any]()
            report = decider.report
            decider.report = lambda decision, outcome: (told.append(outcome), report(decision, outcome))
            line = gateway.ingress.dispatcher.admission.lines["small"]
            await line.enter(NORMAL)  # the only place
            body = {"model": "small", "messages": [{"role": "user", "content": "Why?"}]}
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not line.waiting:
                await asyncio.sleep(0.01)
            await asyncio.sleep(3.0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            line.leave(None)
            return told

    (outcome,) = clock.run(run())
    assert outcome.status == "disconnected" and outcome.waited_s == outcome.latency_s == pytest.approx(3.0, abs=0.02)
    assert not gateway.models["small"].calls


def test_a_line_that_is_too_long_for_a_deadline_is_a_429(tmp_path: Path) -> None:
    """With the time to come back, which clients heed; and who goes first does not wait like all others."""
    gateway = Gateway(tmp_path)
    for arm in ("small", "large"):
        gateway.models[arm].script = takes(0.4)

    async def run() -> None:
        async with gateway.at_once() as client:
            gateway.tune(decide_here_s=1e6, admission={"running": 1, "waiting": 16, "wait_s": 10})

            async def ask(model: str, **more: Any) -> Any:
                body = {"model": model, "messages": [{"role": "user", "content": "Why?"}], **more}
                return await client.post("/v1/chat/completions", json=body)

            for arm in ("small", "large"):
                for _ in range(3):
                    await ask(arm)
            assert (await ask("auto", router={"max_latency_s": 3.0})).status_code == 200
            crowd = [asyncio.create_task(ask(arm)) for arm in ("small", "large") for _ in range(8)]
            lines = gateway.ingress.dispatcher.admission.lines
            while min(lines[arm].waiting for arm in ("small", "large")) < 7:
                await asyncio.sleep(0.01)
            late = await ask("auto", router={"max_latency_s": 3.0})
            assert late.status_code == 429 and int(late.headers["retry-after"]) >= 1
            urgent = await ask("auto", router={"max_latency_s": 3.0, "priority": "high"})
            assert urgent.status_code == 200
            await asyncio.gather(*crowd)
            assert (await ask("auto", router={"max_latency_s": 1e-4})).status_code == 400  # no line explains that

    clock.run(run())
