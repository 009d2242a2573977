"""The error of a request that is longer than a model's context: one wording and one code.

The gateway refuses what is certainly too long before it decides. The tokens that a chat template adds are known to the
engine alone, so the engine may refuse a request that seemed to fit; its error is put into the same words.
"""

import re

from deployments.errors import ApiError
from deployments.models.handle import Body
from deployments.models.report import ModelError

CODE = "context_length_exceeded"  # OpenAI's
ANSWER_LIMITS = ("max_completion_tokens", "max_tokens")
LIMITS = (*ANSWER_LIMITS, "min_tokens")
PROMPTS = ("messages", "prompt", "input")
COMPLETION_TOKENS = 16  # OpenAI's default of a completion's max_tokens
# of vLLM's errors about the length
VLLM_TOO_LONG = re.compile(
    r"This model's maximum context length is (?P<context>\d+) tokens"
    r"|The decoder prompt \(length (?P<prompt>\d+)\).* maximum\s+model length of (?P<limit>\d+)"
)
VLLM_CUT = re.compile(
    r"truncate_prompt_tokens=(?P<cut>\d+) cannot be greater than .* = (?P<room>\d+)\."
)
VLLM_PROMPT = re.compile(r"contains (at least )?(?P<prompt>\d+) input tokens")


def answer_tokens(body: Body) -> int:
    """The room that a request in OpenAI's shape asks for its answer; 0 if it sets no limit."""
    least = body.get("min_tokens")
    least = least if isinstance(least, int) else 0
    for name in ANSWER_LIMITS:
        limit = body.get(name)
        if isinstance(limit, int) and limit:
            return max(limit, least)
    if "prompt" in body and "max_tokens" not in body:
        return COMPLETION_TOKENS
    return least


def cut_too_long(context: int, cut: int, body: Body) -> ApiError:
    """The error of a request whose prompt would be cut to more tokens than there is room for.

    Args:
        context: tokens of the largest context.
        cut: the client's `truncate_prompt_tokens`.
        body: the request in OpenAI's shape.
    """
    return _as_api_error(_cut_too_long(context, cut, body))


def _cut_too_long(context: int, cut: int, body: Body) -> ModelError:
    answer = max(answer_tokens(body), 1)
    return ModelError(
        f"This model's maximum context length is {context} tokens. However, truncate_prompt_tokens is {cut}, and "
        f"{answer} tokens are for the answer. Please reduce truncate_prompt_tokens.",
        400,
        "truncate_prompt_tokens",
        CODE,
    )


def _as_api_error(error: ModelError) -> ApiError:
    return ApiError(error.status, error.message, error.param, error.code)


def too_long(context: int, prompt: int, body: Body) -> ModelError:
    """The error of a request that is longer than the context.

    Args:
        context: tokens of the model's context; of the largest, if several models could answer.
        prompt: tokens of the prompt, or the least number that it can have.
        body: the request in OpenAI's shape.
    """
    where = next((name for name in PROMPTS if name in body), "messages")
    limit = next((name for name in LIMITS if body.get(name)), "")
    answer = answer_tokens(body)
    # clients know this error by its code, or by these words of OpenAI's and of other APIs
    message = f"This model's maximum context length is {context} tokens. However, "
    held = f": it has at least {prompt} tokens" if prompt else ""
    if prompt >= context or not answer:
        message += (
            f"the prompt is too long{held}. Please reduce the length of the {where}."
        )
        return ModelError(message, 400, where, CODE)
    message += (
        f"with {answer} tokens for the answer ({limit or 'the default of max_tokens'}) the prompt is too long{held}. "
        f"Please reduce the length of the {where} or {limit or 'send a smaller max_tokens'}."
    )
    return ModelError(message, 400, limit or where, CODE)


def refusal(context: int, prompt: int, body: Body) -> ApiError:
    """The same as an error of the gateway."""
    return _as_api_error(too_long(context, prompt, body))


def from_engine(message: str, body: Body) -> ModelError | None:
    """The error in place of vLLM's, if vLLM's is about the length; otherwise None.

    Args:
        message: of vLLM's error.
        body: the request in OpenAI's shape.
    """
    cut = VLLM_CUT.search(message)
    if cut is not None:
        room = int(cut["room"])
        context = room + max(answer_tokens(body), 0)
        return _cut_too_long(context, int(cut["cut"]), body)
    found = VLLM_TOO_LONG.search(message)
    if found is None:
        return None
    context = int(found["context"] or found["limit"])
    counted = VLLM_PROMPT.search(message)
    prompt = int(found["prompt"] or (counted["prompt"] if counted else 0))
    if not prompt:
        # vLLM counted only the characters: they are more than the tokens that are left can have
        prompt = max(0, context - answer_tokens(body) + 1)
    return too_long(context, prompt, body)
