"""The settings of a model: its prices, its context, what it can do, and its variants.

deployments/settings.py has the others.
"""

import json
from dataclasses import replace
from hashlib import blake2b
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from policies.profiling.classifier import LANGUAGES
from policies.profiling.features import KINDS
from policies.types import Arm

# of a client's request, from no thinking to all that there is
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
# variables of chat templates that switch thinking on and off
THINKING_SWITCHES = ("enable_thinking", "thinking")
NO_THINKING: tuple[Effort, ...] = ("none", "minimal")


class StrictModel(BaseModel):
    """Refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _check_kinds(priors: dict[str, float]) -> dict[str, float]:
    for kind, expected in priors.items():
        if kind not in KINDS:
            raise ValueError(
                f"unknown kind '{kind}'; choose one of: {', '.join(KINDS)}"
            )
        if not 0 <= expected <= 1:
            raise ValueError(f"'{kind}' is {expected:g}; a score is between 0 and 1")
    return priors


def _check_languages(languages: tuple[str, ...]) -> tuple[str, ...]:
    for language in languages:
        if language not in LANGUAGES:
            raise ValueError(
                f"unknown language '{language}'; the profiler tells apart: {', '.join(LANGUAGES)}"
            )
    return languages


# Expected scores by kind of work.
KindPriors = Annotated[dict[str, float], AfterValidator(_check_kinds)]
Languages = Annotated[tuple[str, ...], AfterValidator(_check_languages)]
# Fields of a variant that change nothing in what the engine is asked.
NOT_ASKED = {"efforts", "prior_quality", "prior_quality_by_kind"}


class CapabilitySettings(StrictModel):
    """What a model can do. What is left out follows from the engine arguments of its application.

    tools: calls tools. By default if `enable_auto_tool_choice` and `tool_call_parser` are set.
    forced_tools: can be made to call a tool (`tool_choice: required`). By default as `tools`.
    parallel_tools: calls several tools at once. By default as `tools`.
    json_object, json_schema: can be held to JSON, and to a schema or another grammar. By default true.
    logprobs: returns log probabilities. By default true, unless `max_logprobs` is 0.
    images, audio, video: takes such parts of messages. By default if `limit_mm_per_prompt` has a number of `image`,
        `audio`, `video`.
    thinking: thinks, and returns it apart from the answer. By default if `reasoning_parser` is set.
    vllm_parameters: takes the parameters that vLLM has beside OpenAI's. By default if the engine is vLLM.
    languages: ISO 639-1 codes of the languages that it is for, as [en, de]. A text that is surely in another one goes
        to a model that is for it, if there is one. By default it is for all.
    """

    tools: bool | None = None
    forced_tools: bool | None = None
    parallel_tools: bool | None = None
    json_object: bool | None = None
    json_schema: bool | None = None
    logprobs: bool | None = None
    images: bool | None = None
    audio: bool | None = None
    video: bool | None = None
    thinking: bool | None = None
    vllm_parameters: bool | None = None
    languages: Languages = ()


class VariantSettings(StrictModel):
    """A variant of a model: the same application, asked with other defaults. It is an arm of its own.

    chat_template_kwargs: variables of the chat template, as {enable_thinking: false}.
    thinking_token_budget: maximum number of tokens that it thinks.
    reasoning_effort: what the engine gets as `reasoning_effort`.
    system_prompt: stands before the messages, and before the text of a system message that comes first. The router's
        estimate of prompt tokens leaves it out.
    adapter: name of a LoRA adapter, which the application serves beside the model (docs/guides/variants.md).
    efforts: the values of a client's `reasoning_effort` that go to it, and not to the model itself. Default: its own
        `reasoning_effort`; or `none` and `minimal` if it switches thinking off in the chat template, and the others if
        it switches thinking on; or else none.
    prior_quality: expected score before there is any feedback. Default: those of the model, also by kind.
    prior_quality_by_kind: the same for single kinds of work; other kinds keep theirs.
    """

    chat_template_kwargs: dict[str, object] = {}
    thinking_token_budget: int | None = Field(None, ge=0)
    reasoning_effort: Effort | None = None
    system_prompt: str = Field("", max_length=20_000)
    adapter: str = ""
    efforts: tuple[Effort, ...] | None = None
    prior_quality: float | None = Field(None, ge=0, le=1)
    prior_quality_by_kind: KindPriors = {}

    @model_validator(mode="after")
    def _check_difference(self) -> "VariantSettings":
        if not self.for_chats_only and not self.adapter:
            raise ValueError(
                "has no default that differs from the model's; set one of: chat_template_kwargs, "
                "thinking_token_budget, reasoning_effort, system_prompt, adapter"
            )
        effort = self.reasoning_effort
        if effort is not None and effort not in self.served_efforts:
            raise ValueError(
                f"reasoning_effort is {effort}, but efforts does not have it; add it there"
            )
        return self

    @property
    def for_chats_only(self) -> bool:
        """Whether it differs in what only a chat has."""
        chat = (self.chat_template_kwargs, self.reasoning_effort, self.system_prompt)
        return any(chat) or self.thinking_token_budget is not None

    @property
    def thinks(self) -> bool | None:
        """Whether its chat template thinks; None if its variables do not say."""
        for name in THINKING_SWITCHES:
            switch = self.chat_template_kwargs.get(name)
            if isinstance(switch, bool):
                return switch
        return None

    @property
    def served_efforts(self) -> tuple[Effort, ...]:
        """The efforts for which it answers, by `efforts` or by default."""
        if self.efforts is not None:
            return self.efforts
        if self.reasoning_effort is not None:
            return (self.reasoning_effort,)
        if self.thinks is None:
            return ()
        return tuple(e for e in EFFORTS if (e in NO_THINKING) is not self.thinks)

    @property
    def digest(self) -> str:
        """Changes with what the engine is asked."""
        asked = self.model_dump(mode="json", exclude=NOT_ASKED)
        encoded = json.dumps(asked, sort_keys=True).encode()
        return blake2b(encoded, digest_size=8).hexdigest()


class ModelSettings(StrictModel):
    """One arm, and an arm for each of its variants. The application that serves them has the model's name.

    prior_quality: expected score before there is any feedback. Default: by the price (policies/base.py).
    prior_quality_by_kind: the same for single kinds of work, as {arithmetic: 0.1, writing: 0.6}; other kinds keep
        prior_quality. The kinds are code, writing, translation, extraction, arithmetic, strings, question and other.
    prior_scores: number of scores that prior_quality_by_kind counts for. With 0 it only moves the prior.
    tasks: what it can do, of chat, completion and embed.
    context_tokens: maximum number of tokens of prompt and answer together.
    prompt_price_usd_per_million, output_price_usd_per_million: price of a million tokens; for your own GPU, its hourly
        price divided by its tokens an hour.
    parent: a model that this one replaces or was made from; this one starts with what was learned of its parent. A
        parent that is no longer served must be among `retired`.
    inherited_events: number of events that the knowledge of the parent counts for. If a model is served under the same
        name with other weights or engine arguments, its own past counts for as many.
    revision: change it when the weights change and the application's arguments do not show it.
    capabilities: what it can do, where its application's arguments do not say so.
    variants: by name, the same model asked with other defaults (docs/guides/variants.md). Clients may ask for them by
        name, and `auto` chooses among them.
    """

    tasks: tuple[Literal["chat", "completion", "embed"], ...] = Field(
        ("chat", "completion"), min_length=1
    )
    context_tokens: int = Field(4096, ge=1)
    prompt_price_usd_per_million: float = Field(0.0, ge=0)
    output_price_usd_per_million: float = Field(0.0, ge=0)
    prior_quality: float | None = Field(None, ge=0, le=1)
    prior_quality_by_kind: KindPriors = {}
    prior_scores: float = Field(10.0, ge=0)
    parent: str = ""
    inherited_events: float = Field(50.0, gt=0)
    revision: str = ""
    capabilities: CapabilitySettings = CapabilitySettings()
    variants: dict[str, VariantSettings] = {}

    def arm(self, name: str) -> Arm:
        """The arm as policies/ knows it."""
        return Arm(
            name=name,
            tasks=self.tasks,
            context_tokens=self.context_tokens,
            prompt_price_usd=self.prompt_price_usd_per_million / 1e6,
            output_price_usd=self.output_price_usd_per_million / 1e6,
            prior_quality=self.prior_quality,
            prior_by_kind=tuple(self.prior_quality_by_kind.items()),
            prior_scores=self.prior_scores,
            parent=self.parent,
            inherit=self.inherited_events,
            revision=self.revision,
            languages=self.capabilities.languages,
        )

    def arms(self, name: str) -> tuple[Arm, ...]:
        """The model's own arm, then its variants."""
        own = self.arm(name)
        return own, *(self._variant(own, *item) for item in self.variants.items())

    def _variant(self, own: Arm, name: str, variant: VariantSettings) -> Arm:
        tasks = tuple(task for task in own.tasks if task != "embed")
        prior = variant.prior_quality
        kinds = dict(own.prior_by_kind) if prior is None else {}
        return replace(
            own,
            name=name,
            tasks=("chat",) if variant.for_chats_only else tasks,
            prior_quality=own.prior_quality if prior is None else prior,
            prior_by_kind=tuple((kinds | variant.prior_quality_by_kind).items()),
            parent=own.name,
            revision=f"{own.revision}{variant.digest}",
            variant_of=own.name,
        )

    @model_validator(mode="after")
    def _check_variants(self) -> "ModelSettings":
        for name, variant in self.variants.items():
            possible = {"chat"} if variant.for_chats_only else {"chat", "completion"}
            if possible.isdisjoint(self.tasks):
                raise ValueError(
                    f"variants.{name}: the model does not do the task 'chat'; take the variant out"
                )
        return self
