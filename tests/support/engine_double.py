"""vLLM without a model: its own parsers read a given text, and ModelServer answers with what they make of it."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from ray.serve.llm.openai_api_models import ChatCompletionResponse
from transformers import AutoTokenizer
from vllm.entrypoints.generate.base.protocol import DeltaMessage, ToolCall
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.parser.parser_manager import ParserManager

from deployments.models.server import ModelServer
from tests.support.gateway import ROOT

# what a Qwen3 model writes: it thinks, and calls a tool or answers
THOUGHT = "3 and 5 are to be added."
CALL = (
    f"<think>\n{THOUGHT}\n</think>\n\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 5}}\n</tool_call>'
)
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\nThe sum is 8."
AT_ONCE = "8"
ONLY_THOUGHT = "<think>\n3 and 5 are"
ARGUMENTS = {"a": 3, "b": 5}


class EngineDouble:
    """An engine with the parsers of serve_config.gpu.yaml.

    Args:
        text: what the model writes, whatever it is asked.
        finish_reason: why it ends.
        after_tools: what the model writes if the last message is the result of a tool. None: the text, too.
        at_once: what it writes where the chat template switches its thinking off. None: the text, too.
    """

    def __init__(
        self,
        text: str,
        finish_reason: str = "stop",
        after_tools: str | None = None,
        at_once: str | None = None,
    ):
        self._tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/models/nano")
        self._text = text
        self._finish_reason = finish_reason
        self._at_once = text if at_once is None else at_once
        self._after_tools = text if after_tools is None else after_tools
        self._parser = ParserManager.get_parser("hermes", "qwen3", True)
        self._server = object.__new__(ModelServer)
        self._server._llm_config = SimpleNamespace(model_id="double")
        self._server.chat = self._chat

    async def script(
        self, task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        """The script of a FakeModel."""
        if body.get("stream"):
            async for item in self._server.generate(task, body):
                yield item
        else:
            yield await self._server.complete(task, body)

    async def _chat(self, request: Any) -> AsyncIterator[Any]:
        """As LLMServer.chat."""
        return self._streamed(request) if request.stream else self._whole(request)

    def _made(self, request: Any) -> Any:
        options = {
            "chat_template_kwargs": request.chat_template_kwargs or {},
            "model_config": None,
        }
        return self._parser(self._tokenizer, request.tools, **options)

    @property
    def tokens(self) -> int:
        """How many the model writes, thinking included, if the last message is not of a tool."""
        return len(self._ids(self._text))

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return found

    def _written(self, request: Any) -> str:
        last = request.messages[-1]
        if (request.chat_template_kwargs or {}).get("enable_thinking") is False:
            return self._at_once
        return self._after_tools if last["role"] == "tool" else self._text

    async def _whole(self, request: Any) -> AsyncIterator[Any]:
        text = self._written(request)
        ids = self._ids(text)
        thought, content, calls = self._made(request).parse(
            text, request, enable_auto_tools=True, model_output_token_ids=ids
        )
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if request.include_reasoning:
            message["reasoning"] = thought
        if calls:
            message["tool_calls"] = [ToolCall(function=call) for call in calls]
        reason = "tool_calls" if calls else self._finish_reason
        yield ChatCompletionResponse.model_validate(
            {
                "model": "double",
                "choices": [{"index": 0, "finish_reason": reason, "message": message}],
                "usage": self._usage(len(ids)).model_dump(),
            }
        )

    @staticmethod
    def _usage(tokens: int) -> UsageInfo:
        return UsageInfo(
            prompt_tokens=9, completion_tokens=tokens, total_tokens=9 + tokens
        )

    async def _streamed(self, request: Any) -> AsyncIterator[Any]:
        parser = self._made(request)
        ids = self._ids(self._written(request))
        yield [self._chunk(DeltaMessage(role="assistant", content=""))]
        called = False
        for at, token in enumerate(ids, 1):
            delta = parser.parse_delta(
                delta_text=self._tokenizer.decode([token]),
                delta_token_ids=[token],
                request=request,
                prompt_token_ids=[1],
                finished=at == len(ids),
            )
            if delta is None:
                continue
            called = called or bool(delta.tool_calls)
            yield [self._chunk(delta)]
        reason = "tool_calls" if called else self._finish_reason
        last = ChatCompletionStreamResponse(
            model="double", choices=[], usage=self._usage(len(ids))
        )
        yield [
            self._chunk(DeltaMessage(), finish_reason=reason),
            f"data: {last.model_dump_json(exclude_unset=True, exclude_none=True)}\n\n",
            "data: [DONE]\n\n",
        ]

    def _chunk(self, delta: DeltaMessage, **more: Any) -> str:
        choice = ChatCompletionResponseStreamChoice(index=0, delta=delta, **more)
        chunk = ChatCompletionStreamResponse(model="double", choices=[choice])
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
