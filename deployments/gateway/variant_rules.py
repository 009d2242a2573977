"""Which variants of a model answer in the way that a request asks for.

A value that a variant sets belongs to the variants that set it; a value that none of them sets belongs to the arms
that leave the parameter open. So `reasoning_effort: none` goes to a variant that does not think, and not to its model.
Models without such a variant are not concerned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deployments.errors import ApiError
from deployments.gateway.eligibility import AnyRequest
from deployments.model_settings import ModelSettings, VariantSettings
from deployments.parameters.chat import ChatRequest
from policies.constraints import Exclusion, candidates
from policies.types import Arm, Objective

# the values that an arm sets, by parameter
Values = Mapping[str, Sequence[object]]
EFFORT = "reasoning_effort"
BUDGET = "thinking_token_budget"
TEMPLATE = "chat_template_kwargs"


class VariantRules:
    """Leaves out the variants that a request's parameters contradict.

    Args:
        models: their settings by name.
        arms: all arms by name.
    """

    def __init__(self, models: Mapping[str, ModelSettings], arms: Mapping[str, Arm]):
        self._arms = arms
        # of each model with variants, what its arms set
        self._families: dict[str, dict[str, Values]] = {
            name: {name: {}}
            | {variant: _values(own) for variant, own in model.variants.items()}
            for name, model in models.items()
            if model.variants
        }

    def resolved(self, name: str, request: AnyRequest) -> str:
        """The arm that a name in a request means.

        A model's name means its own defaults, or the first of its variants that fits if the request's
        parameters contradict them. Every other name means itself.
        """
        wrong = self._contradictions(request)
        if name not in wrong:
            return name
        family = self._families.get(name, {})
        return next((arm for arm in family if arm not in wrong), name)

    def bounded(
        self, task: str, objective: Objective, request: AnyRequest
    ) -> Objective:
        """The objective without the variants that the request contradicts.

        Raises:
            ApiError: 400, because none of the arms that may answer fits.
        """
        wrong = self._contradictions(request)
        if not wrong:
            return objective
        sentences = tuple(
            (arm, Exclusion.VARIANT.sentence(parameter))
            for arm, parameter in wrong.items()
        )
        bounded = replace(objective, unavailable=sentences)
        if candidates(self._arms.values(), task, bounded):
            return bounded
        before = candidates(self._arms.values(), task, objective)
        names = [arm.name for arm in before if arm.name in wrong]
        if not names:
            return bounded
        parameter = wrong[names[0]]
        raise ApiError(
            400,
            f"{parameter}: no model that may answer does so as it asks ({', '.join(names)}); leave it out, or allow "
            "another model",
            parameter,
        )

    def _contradictions(self, request: AnyRequest) -> dict[str, str]:
        """By arm, the request's parameter that its values contradict."""
        wrong: dict[str, str] = {}
        asked = _asked(request) if self._families else {}
        for parameter, value in asked.items():
            for family in self._families.values():
                setting = [arm for arm, values in family.items() if parameter in values]
                right = [arm for arm in setting if _has(family[arm][parameter], value)]
                if not setting:
                    continue
                for arm in family:
                    if arm not in right if right else arm in setting:
                        wrong.setdefault(arm, parameter)
        return wrong


def _values(variant: VariantSettings) -> Values:
    values: dict[str, Sequence[object]] = {
        f"{TEMPLATE}.{name}": (value,)
        for name, value in variant.chat_template_kwargs.items()
    }
    if variant.served_efforts:
        values[EFFORT] = variant.served_efforts
    if variant.thinking_token_budget is not None:
        values[BUDGET] = (variant.thinking_token_budget,)
    return values


def _asked(request: AnyRequest) -> dict[str, object]:
    """The parameters of a request by which variants may differ."""
    if not isinstance(request, ChatRequest):
        return {}
    template = request.chat_template_kwargs or {}
    asked = {f"{TEMPLATE}.{name}": value for name, value in template.items()}
    if request.reasoning_effort is not None:
        asked[EFFORT] = request.reasoning_effort
    if request.thinking_token_budget is not None:
        asked[BUDGET] = request.thinking_token_budget
    return asked


def _has(values: Sequence[object], wanted: object) -> bool:
    """Whether a value is among these; 1 is not true."""
    return any(type(value) is type(wanted) and value == wanted for value in values)
