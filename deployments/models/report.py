"""What a model server reports beside the bytes of an answer: the tokens that it used, or the error that ended it.

The records cross from the model's process to the gateway's, so this module imports neither vLLM nor Ray.
"""

import msgspec


class ModelError(msgspec.Struct, frozen=True):
    """Why a model gave no complete answer.

    message: for the client. status: of HTTP; below 500 the request is at fault, from 500 on the engine. 429: the
    request may be sent again.
    param: the request's parameter at fault; None if the error is about none.
    code: for programs, one of OpenAI's codes; None for none.
    """

    message: str
    status: int
    param: str | None = None
    code: str | None = None

    def body(self) -> dict[str, object]:
        """The error object that OpenAI's clients understand."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


class ModelReport(msgspec.Struct, frozen=True):
    """What was measured of one answer.

    prompt_tokens, output_tokens: how many were read and written.
    finish_reason: why the model stopped, in OpenAI's words: stop, length, tool_calls; "" for an embedding.
    error: why there is no complete answer; None if there is one.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = ""
    error: ModelError | None = None


def failure(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> ModelReport:
    """The report of an answer that failed; see ModelError."""
    return ModelReport(error=ModelError(message, status, param, code))
