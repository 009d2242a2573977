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
PROMPTS = ("messages", "prompt", "input")
COMPLETION_TOKENS = 16  # OpenAI's default of a completion's max_tokens
# of vLLM's errors about the length
VLLM_TOO_LONG = re.compile(
    r"This model's maximum context length is (?P<context>\d+) tokens"
    r"|The decoder prompt \(length (?P<prompt>\d+)\).* maximum\s+model length of (?P<limit>\d+)"
)
VLLM_PROMPT = re.compile(r"contains (at least )?(?P<prompt>\d+) input tokens")


def answer_tokens(body: Body) -> int:
    """The room that a request in OpenAI's shape asks for its answer; 0 if it sets no limit."""
    for name in ANSWER_LIMITS:
        limit = body.get(name)
        if isinstance(limit, int) and limit:
            return limit
    if "prompt" in body and "max_tokens" not in body:
        return COMPLETION_TOKENS
    return 0


def too_long(context: int, prompt: int, body: Body) -> ModelError:
    """The error of a request that is longer than the context.

    Args:
        context: tokens of the model's context; of the largest, if several models could answer.
        prompt: tokens of the prompt, or the least number that it can have.
        body: the request in OpenAI's shape.
    """
    where = next((name for name in PROMPTS if name in body), "messages")
    limit = next((name for name in ANSWER_LIMITS if body.get(name)), "")
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
    error = too_long(context, prompt, body)
    return ApiError(error.status, error.message, error.param, error.code)


def from_engine(message: str, body: Body) -> ModelError | None:
    """The error in place of vLLM's, if vLLM's is about the length; otherwise None.

    Args:
        message: of vLLM's error.
        body: the request in OpenAI's shape.
    """
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
