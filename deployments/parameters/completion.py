"""The parameters of a completion."""

import json
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from deployments.errors import field_error
from deployments.models.context_length import COMPLETION_TOKENS
from deployments.parameters.generation import MAX_CHOICES, GenerationRequest, Texts
from deployments.parameters.needs import Need
from deployments.parameters.values import (
    MAX_CHARS,
    MAX_TOKENS,
    Flag,
    Listed,
    Unsupported,
    Whole,
)
from deployments.parameters.vllm import RefusedCompletionParameters
from policies.capabilities import Capability

MAX_PROMPTS = 2_048  # of one completion


def _prompts(value: object) -> object:
    """Refuse a prompt that is no text, list of texts, list of token ids or list of such lists."""
    if isinstance(value, str):
        _check_text(value, "")
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            "is no text, list of texts, list of token ids or list of such lists"
        )
    if len(value) > MAX_PROMPTS and not _is_token(value[0]):
        raise ValueError(f"has more than {MAX_PROMPTS} prompts; send fewer")
    kind = type(value[0])
    for i, item in enumerate(value):
        if type(item) is not kind:
            raise field_error(str(i), "is of another type than the prompts before it")
        if isinstance(item, str):
            _check_text(item, str(i))
        elif isinstance(item, list):
            if not item:
                raise field_error(str(i), "is empty; send at least one token id")
            for j, token in enumerate(item):
                _check_token(token, f"{i}.{j}")
        else:
            _check_token(item, str(i))
    return value


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_text(text: str, where: str) -> None:
    if text and len(text) <= MAX_CHARS:
        return
    message = f"has more than {MAX_CHARS} characters; send less"
    if not text:
        message = "is empty; send at least one character"
    raise field_error(where, message) if where else ValueError(message)


def _check_token(value: object, where: str) -> None:
    if not _is_token(value) or not 0 <= value < 2**31:  # type: ignore[operator]
        raise field_error(where, "is no text and no token id")


class CompletionRequest(RefusedCompletionParameters, GenerationRequest):
    """POST /v1/completions. Each prompt gets `n` choices."""

    prompt: Annotated[
        str | Listed[str] | Listed[int] | Listed[Listed[int]], BeforeValidator(_prompts)
    ]
    max_tokens: Whole | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: Whole | None = Field(None, ge=0, le=5)
    echo: Flag | None = None
    best_of: Whole | None = Field(None, ge=1, le=MAX_CHOICES, exclude=True)
    suffix: Annotated[
        None, BeforeValidator(Unsupported("the models only continue a prompt"))
    ] = Field(None, exclude=True)

    @model_validator(mode="after")
    def _check_choices(self) -> "CompletionRequest":
        each = self.n or 1
        if self.best_of is not None and self.best_of != each:
            raise field_error(
                "best_of", f"other than n ({each}) is not supported; leave it out"
            )
        if each * self.prompts > MAX_CHOICES:
            raise field_error(
                "prompt" if each == 1 else "n",
                f"the prompts times n are more than {MAX_CHOICES}; send several requests",
            )
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "0 needs echo: true; ask for a token")
        if self.logprob_token_ids is not None and self.logprobs is None:
            raise field_error("logprob_token_ids", "needs logprobs; add it")
        return self

    def needs(self) -> list[Need]:
        """See GenerationRequest."""
        needs = GenerationRequest.needs(self)
        if self.logprobs is not None:
            needs.append(Need(Capability.LOGPROBS, "logprobs"))
        return needs

    @property
    def token_list(self) -> str | None:
        """See EngineParameters."""
        return "prompt" if self.has_tokens else super().token_list

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return 1
        return len(self.prompt)

    @property
    def has_tokens(self) -> bool:
        """Whether the prompts are token ids."""
        return not isinstance(self.prompt, str) and not isinstance(self.prompt[0], str)

    def limit(self) -> int:
        """See GenerationRequest. OpenAI's default is small, and is no flaw of a model."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def texts(self) -> Texts:
        """See Texts."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return Texts(prompt, prompt)
        if not self.has_tokens:
            texts = tuple(str(text) for text in prompt)
            context = "\n".join(texts)
            return Texts(context, context, parts=texts)
        lists = [prompt] if isinstance(prompt[0], int) else prompt
        return Texts("", json.dumps(prompt), token_counts=tuple(map(len, lists)))  # type: ignore[arg-type]
