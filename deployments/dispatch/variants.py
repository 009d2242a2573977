"""What an application gets where a variant of its model answers: the client's request with the variant's defaults."""

from collections.abc import Iterable, Mapping, Sequence

from deployments.model_settings import ModelSettings, VariantSettings
from deployments.models.handle import ANSWERS_AS, Body


class Variants:
    """The variants of all models.

    Args:
        models: the settings of all models.
    """

    def __init__(self, models: Iterable[ModelSettings]):
        self._variants: Mapping[str, VariantSettings] = {
            name: variant
            for model in models
            for name, variant in model.variants.items()
        }

    def body(self, arm: str, body: Body) -> Body:
        """The body for an arm's application; that of an arm which is no variant is the client's.

        The client's own values win. A request whose values contradict an arm is not given to it (variant_rules.py in
        gateway/).

        Args:
            arm: which answers.
            body: the client's request in OpenAI's shape.
        """
        variant = self._variants.get(arm)
        if variant is None:
            return body
        return {**_with_defaults(variant, body), ANSWERS_AS: arm}


def _with_defaults(variant: VariantSettings, body: Body) -> Body:
    made = dict(body)
    if variant.chat_template_kwargs:
        given = body.get("chat_template_kwargs")
        own = given if isinstance(given, Mapping) else {}
        made["chat_template_kwargs"] = {**variant.chat_template_kwargs, **own}
    if variant.thinking_token_budget is not None:
        made.setdefault("thinking_token_budget", variant.thinking_token_budget)
    if variant.reasoning_effort is not None:
        # the client's value is one that the variant serves, but its engine gets its own
        made["reasoning_effort"] = variant.reasoning_effort
    messages = body.get("messages")
    if variant.system_prompt and isinstance(messages, Sequence):
        made["messages"] = _prefixed(messages, variant.system_prompt)
    if variant.adapter:
        made["model"] = variant.adapter
    return made


def _prefixed(messages: Sequence[object], prefix: str) -> list[object]:
    """Messages that begin with a system message, whose text begins with the prefix."""
    first = messages[0] if messages else None
    if not isinstance(first, Mapping) or first.get("role") != "system":
        return [{"role": "system", "content": prefix}, *messages]
    content = first.get("content")
    if isinstance(content, list):
        content = [{"type": "text", "text": f"{prefix}\n\n"}, *content]
    else:
        content = f"{prefix}\n\n{content or ''}"
    return [{**first, "content": content}, *messages[1:]]
