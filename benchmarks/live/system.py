"""The running system: its objective and prices, its replicas, and what its router has recorded."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from assets import talk
from deployments.commands.gateway import key_headers
from deployments.demonstration.client import state
from policies.types import Objective

AT_ONCE = 8  # questions to the router
PATIENCE_S = 10.0  # for a decision that is on its way to the router
SETTLE_S = 300.0  # for replicas that were added under load
LOOK_S = 0.5
# what the gateway says of one decision; None if it does not know
Ask = Callable[[httpx.AsyncClient, str], Awaitable[float | None]]


@dataclass(frozen=True)
class Price:
    """US dollars a token."""

    prompt_usd: float
    output_usd: float

    def cost_usd(self, prompt_tokens: int, output_tokens: int) -> float:
        """The cost of an answer."""
        return prompt_tokens * self.prompt_usd + output_tokens * self.output_usd


@dataclass(frozen=True)
class Running:
    """What the gateway says of itself.

    prices: by model and variant.
    sizes: the models that calculate, cheapest first, without variants.
    replicas: ready ones of all models that chat. in_flight: requests.
    """

    objective: Objective
    prices: Mapping[str, Price]
    sizes: tuple[str, ...]
    replicas: int
    in_flight: int


class System:
    """A gateway.

    Args:
        url: its address. ROUTER_API_KEY has its key, if it asks for one.
    """

    def __init__(self, url: str):
        self.url = url
        self._headers = key_headers()

    def running(self) -> Running:
        """The present state.

        Raises:
            SystemExit: no gateway answers, or no model that calculates is there.
        """
        found = state(self.url, self._headers)
        weights = found["objective"]
        chat = {
            name: model
            for name, model in found["models"].items()
            if "chat" in model["tasks"]
        }
        sizes = [
            name
            for name, model in chat.items()
            if not model["variant_of"] and name != talk.MODEL
        ]
        if not sizes:
            raise SystemExit(
                f"{self.url} has no model that calculates; start the default configuration"
            )
        models = [model for model in chat.values() if not model["variant_of"]]
        return Running(
            Objective(weights["latency_weight"], weights["cost_weight"]),
            {
                name: Price(model["prompt_price_usd"], model["output_price_usd"])
                for name, model in chat.items()
            },
            tuple(sizes),
            sum(model["replicas"] for model in models),
            sum(model["in_flight"] for model in models),
        )

    def settle(self, replicas: int) -> bool:
        """Wait until no request is in flight and no more than these replicas are there.

        Returns:
            Whether it came to this within SETTLE_S.
        """
        ends_s = time.monotonic() + SETTLE_S
        while time.monotonic() < ends_s:
            now = self.running()
            if not now.in_flight and now.replicas <= replicas:
                return True
            time.sleep(LOOK_S)
        return False

    def recorded_s(self, decision_ids: Sequence[str]) -> dict[str, float]:
        """The latency of each answer as the router recorded it, by decision; those without a record are left out."""
        return asyncio.run(self._each(self._recorded, decision_ids))

    def score(self, scores: Mapping[str, float]) -> int:
        """Send the score of each decision as a program's; returns how many were taken."""

        async def give(client: httpx.AsyncClient, decision_id: str) -> float | None:
            body = {
                "decision_id": decision_id,
                "score": scores[decision_id],
                "source": "program",
            }
            answer = await client.post("/v1/feedback", json=body)
            return 1.0 if answer.is_success else None

        return len(asyncio.run(self._each(give, list(scores))))

    async def _each(self, ask: Ask, decision_ids: Sequence[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        waiting = iter(decision_ids)
        async with httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=30
        ) as client:

            async def work() -> None:
                for decision_id in waiting:
                    value = await ask(client, decision_id)
                    if value is not None:
                        found[decision_id] = value

            await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        return found

    async def _recorded(
        self, client: httpx.AsyncClient, decision_id: str
    ) -> float | None:
        ends_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends_s:
            answer = await client.get(f"/v1/router/decisions/{decision_id}")
            if answer.status_code == httpx.codes.NOT_FOUND:
                return None
            outcome = answer.json().get("outcome") if answer.is_success else None
            if outcome:
                return float(outcome["latency_s"])
            await asyncio.sleep(LOOK_S)
        return None
