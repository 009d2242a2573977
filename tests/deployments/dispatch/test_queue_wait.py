"""The wait in a model's queue is expected at the decision and reported with the outcome."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deployments.dispatch.admission import NORMAL
from tests.deployments.dispatch.test_admission import takes
from tests.support import clock
from tests.support.gateway import Gateway

HELD_S = 2.5  # long, so that no draw of a latency makes up for three times this wait


def test_expected_and_actual_waits_are_reported(tmp_path: Path) -> None:
    """The wait is part of the expected latency, and a field of its own in the state and in the outcome."""
    gateway = Gateway(tmp_path)
    gateway.models["large"].script = takes(HELD_S)

    async def run() -> list[Any]:
        async with gateway.at_once() as client:
            gateway.tune(
                snapshot_max_age_s=1e6,
                admission={"max_running": 1, "max_queued": 16, "max_queue_wait_s": 10},
            )

            async def ask(model: str) -> str:
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": "Why?"}],
                }
                return (await client.post("/v1/chat/completions", json=body)).headers[
                    "x-router-decision-id"
                ]

            # the policy knows `small` then: an unknown arm may be tried in spite of a long wait
            await ask("small")
            # the queue learns how long a slot is held
            await ask("large")
            crowd = [asyncio.create_task(ask("large")) for _ in range(3)]
            while gateway.ingress.dispatcher.admission.queues["large"].waiting < 2:
                await asyncio.sleep(0.01)
            decided = await ask("auto:fast")
            told = (await client.get("/v1/router/state")).json()["models"]["large"][
                "wait_s"
            ]
            assert told == pytest.approx(3 * HELD_S, abs=0.05)
            ids = [*await asyncio.gather(*crowd), decided]
            while gateway.ingress.router_client.outcomes.unsent:
                await asyncio.sleep(0.05)
            return [await gateway.router.thing.record(one) for one in ids]

    *crowd, last = clock.run(run())
    waited = sorted(record.outcome.waited_s for record in crowd)
    assert waited == pytest.approx([0, HELD_S, 2 * HELD_S], abs=0.02)
    foreseen = {
        arm: last.decision.estimate(arm).latency_s for arm in ("small", "large")
    }
    assert (
        last.decision.arm == "small"
        and foreseen["large"] > foreseen["small"] + 3 * HELD_S
    )


def test_wait_of_a_disconnected_client_is_not_latency_of_the_model(
    tmp_path: Path,
) -> None:
    """Clients that disconnect from a long queue do not make a fast model look slow."""
    gateway = Gateway(tmp_path)

    async def run() -> Any:
        async with gateway.at_once() as client:
            gateway.tune(
                snapshot_max_age_s=1e6,
                admission={"max_running": 1, "max_queued": 16, "max_queue_wait_s": 10},
            )
            router_client = gateway.ingress.router_client
            told = list[Any]()
            report = router_client.report
            router_client.report = lambda decision, outcome: (
                told.append(outcome),
                report(decision, outcome),
            )
            queue = gateway.ingress.dispatcher.admission.queues["small"]
            await queue.enter(NORMAL)  # the only slot
            body = {"model": "small", "messages": [{"role": "user", "content": "Why?"}]}
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not queue.waiting:
                await asyncio.sleep(0.01)
            await asyncio.sleep(3.0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            queue.leave(None)
            return told

    (outcome,) = clock.run(run())
    assert (
        outcome.status == "disconnected"
        and outcome.waited_s == outcome.latency_s == pytest.approx(3.0, abs=0.02)
    )
    assert not gateway.models["small"].calls


def test_queue_too_long_for_the_deadline_gives_a_429(tmp_path: Path) -> None:
    """The answer has a Retry-After. A request of high priority does not wait, and is answered."""
    gateway = Gateway(tmp_path)
    for arm in ("small", "large"):
        gateway.models[arm].script = takes(0.4)

    async def run() -> None:
        async with gateway.at_once() as client:
            gateway.tune(
                snapshot_max_age_s=1e6,
                admission={"max_running": 1, "max_queued": 16, "max_queue_wait_s": 10},
            )

            async def ask(model: str, **more: Any) -> Any:
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": "Why?"}],
                    **more,
                }
                return await client.post("/v1/chat/completions", json=body)

            for arm in ("small", "large"):
                for _ in range(3):
                    await ask(arm)
            assert (await ask("auto", router={"max_latency_s": 3.0})).status_code == 200
            crowd = [
                asyncio.create_task(ask(arm))
                for arm in ("small", "large")
                for _ in range(8)
            ]
            queues = gateway.ingress.dispatcher.admission.queues
            while min(queues[arm].waiting for arm in ("small", "large")) < 7:
                await asyncio.sleep(0.01)
            late = await ask("auto", router={"max_latency_s": 3.0})
            assert late.status_code == 429 and int(late.headers["retry-after"]) >= 1
            urgent = await ask(
                "auto", router={"max_latency_s": 3.0, "priority": "high"}
            )
            assert urgent.status_code == 200
            await asyncio.gather(*crowd)
            assert (
                await ask("auto", router={"max_latency_s": 1e-4})
            ).status_code == 400  # the queue is not the reason

    clock.run(run())
