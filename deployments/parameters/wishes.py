"""The options of the router for one request."""

from typing import Literal

from pydantic import Field

from deployments.model_settings import StrictModel
from deployments.parameters.values import Listed, Name, Number
from policies.types import Objective


class Wishes(StrictModel):
    """Options of the router for one request; the preset sets the others."""

    latency_weight: Number | None = Field(
        None,
        ge=0,
        le=1e9,
        description="Score points that a second of latency costs.",
    )
    cost_weight: Number | None = Field(
        None, ge=0, le=1e9, description="Score points that a US dollar costs."
    )
    max_latency_s: Number | None = Field(
        None,
        gt=0,
        description="Hard limit on the expected time of the whole answer, in seconds.",
    )
    max_cost: Number | None = Field(
        None,
        gt=0,
        description="Hard limit on the expected cost of this request, in US dollars.",
    )
    models: Listed[Name] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="The only models that may answer.",
    )
    priority: Literal["high", "normal", "batch"] | None = Field(
        None,
        description="Order of the requests that wait for a busy model; `high` needs the scope `priority`.",
    )

    def objective(self, base: Objective) -> Objective:
        """The preset's objective with these options applied."""
        return Objective(
            latency_weight=_or(self.latency_weight, base.latency_weight),
            cost_weight=_or(self.cost_weight, base.cost_weight),
            max_latency_s=_or(self.max_latency_s, base.max_latency_s),
            max_cost_usd=_or(self.max_cost, base.max_cost_usd),
            models=base.models if self.models is None else tuple(self.models),
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
