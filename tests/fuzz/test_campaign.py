"""A small share of the campaign of `python -m tests.fuzz`, and tests of the campaign itself."""

import asyncio
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.models.capabilities import CODE
from tests.fuzz.campaign import Result, describe, holds, mutate, problem
from tests.fuzz.mutations import VALID, mutated
from tests.support.gateway import Gateway

MUTATIONS = 1_500
SEED = 7  # of this share; the command's is another
# the command's bar is 0.1 s; a slow or busy machine needs more CPU time for the same work
MOST_HOLD_S = 1.0


def test_no_mutation_is_a_server_error(gateway: Gateway) -> None:
    """All errors have OpenAI's shape, no callback holds the event loop for long, and many mutations pass the checks."""
    result = mutate(gateway, MUTATIONS, SEED)
    assert not result.failures, "\n".join(result.failures[:5])
    assert result.longest_s < MOST_HOLD_S, result.longest
    assert sum(result.statuses.values()) == MUTATIONS
    assert result.statuses[200] > 0.1 * MUTATIONS < result.statuses[400]


def test_every_valid_request_is_answered(gateway: Gateway) -> None:
    """Before a mutation a request is accepted, or refused for what the gateway has not.

    It has no MLflow, no decision, and no model that reads images.
    """
    refused = {}
    unable = []
    for method, path, body in VALID:
        given = {"json": body} if body is not None else {}
        answer = gateway.client.request(method, path, **given)
        if answer.status_code == 400 and answer.json()["error"]["code"] == CODE:
            unable.append(answer.json()["error"]["param"])
        elif answer.status_code not in (200, 202):
            refused[f"{method} {path}"] = answer.status_code
    assert set(refused.values()) <= {404, 409}, refused
    assert len(refused) < len(VALID) / 2, refused
    assert unable == ["messages.0.content"]


def test_a_seed_gives_the_same_requests_each_time() -> None:
    """Another seed gives others, and every route of the list is mutated."""

    def sent(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [describe(mutated(rng)) for _ in range(300)]

    assert sent(1) == sent(1) != sent(2)
    rng = random.Random(3)
    paths = {mutated(rng).path for _ in range(2_000)}
    assert {path for _, path, _ in VALID} <= paths


def test_the_campaign_sees_a_held_event_loop() -> None:
    """A callback that computes counts with its CPU time; one that waits does not."""

    async def compute() -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass

    async def wait() -> None:
        await asyncio.sleep(0.05)

    with holds() as longest:
        asyncio.run(wait())
        assert longest[0] < 0.05
        asyncio.run(compute())
        assert longest[0] >= 0.05


SHAPED = {"error": {"message": "a", "type": "b", "param": None, "code": "unavailable"}}


@pytest.mark.parametrize(
    ("status", "headers", "body", "wrong"),
    [
        (200, {}, None, False),
        (400, {}, SHAPED, False),
        (400, {}, {"detail": "a"}, True),
        (422, {}, "text", True),
        (500, {}, SHAPED, True),
        (502, {"retry-after": "2"}, SHAPED, True),
        (503, {}, SHAPED, True),
        (503, {"retry-after": "2"}, SHAPED, False),
        (503, {"retry-after": "2"}, {"error": {**SHAPED["error"], "code": "a"}}, True),
    ],
)
def test_the_campaign_knows_a_wrong_answer(
    status: int, headers: Any, body: Any, wrong: bool
) -> None:
    assert bool(problem(status, headers, body)) is wrong


def test_the_bars_of_the_campaign_can_fail() -> None:
    assert Result().held()
    for worse in (
        SimpleNamespace(failures=["a"]),
        SimpleNamespace(longest_s=0.11),
        SimpleNamespace(grown_mb=20.1),
    ):
        assert not Result(**vars(worse)).held()
