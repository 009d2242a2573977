"""Adjusts the objectives of requests to what their texts ask for and to the budget."""

from collections.abc import Sequence
from dataclasses import replace

from policies.types import Objective, Request

# Factor by which a text that asks for speed or accuracy changes the weights of latency and cost.
SENSITIVITY = 3.0


def with_text_sensitivity(requests: Sequence[Request]) -> list[Request]:
    """The requests with their objectives adjusted to what their texts say about speed and accuracy.

    It is applied once, before any policy decides, so all policies decide and are evaluated under the same objective.
    """
    adjusted = []
    for request in requests:
        objective = _adjusted_objective(request)
        if objective is not request.objective:
            request = replace(request, objective=objective)
        adjusted.append(request)
    return adjusted


def _adjusted_objective(request: Request) -> Objective:
    objective = request.objective
    profile = request.profile
    haste = profile.time_sensitivity
    care = profile.accuracy_sensitivity
    if not haste and not care:
        return objective
    return replace(
        objective,
        latency_weight=objective.latency_weight * SENSITIVITY ** (haste - care),
        cost_weight=objective.cost_weight * SENSITIVITY**-care,
    )


def paced(requests: Sequence[Request], cost_weight: float) -> list[Request]:
    """The requests with `cost_weight` added to their objectives' cost weight; forced requests stay as they are."""
    adjusted = []
    for request in requests:
        if not request.forced:
            objective = request.objective
            if cost_weight:
                total = objective.cost_weight + cost_weight
                objective = replace(objective, cost_weight=total)
            request = replace(request, objective=objective, paced_weight=cost_weight)
        adjusted.append(request)
    return adjusted
