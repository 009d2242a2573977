"""Requests of hostile and careless clients, for the tests and the catalogue of faults."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import schemathesis
import schemathesis.specs.openapi.schemas  # loaded here: compiling it within a test hit a defect of CPython 3.11
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal import lambda_sources
from schemathesis import GenerationMode

from tests.support.gateway import Gateway

ASK: dict[str, Any] = {
    "model": "auto",
    "messages": [{"role": "user", "content": "What is 3 plus 5?"}],
}
JSON = {"content-type": "application/json"}


def nested(depth: int) -> Any:
    """Empty lists, nested to this depth."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def tool(schema: Any) -> dict[str, Any]:
    """A function whose argument `a` is of this schema."""
    return {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": schema}}},
    }


def with_schema(schema: Any) -> bytes:
    """A request for a chat in JSON of this schema."""
    return with_(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema},
        }
    )


def with_(**change: Any) -> bytes:
    """A request for a chat with these fields changed."""
    return json.dumps({**ASK, **change}).encode()


def chunks(size: int) -> Iterator[bytes]:
    """A body without a length."""
    for _ in range(size // 65_536):
        yield b" " * 65_536


# bodies for /v1/chat/completions, and the status that each must get
CORPUS: dict[str, tuple[Any, int]] = {
    "two MiB": (b" " * 2**21, 413),
    "two MiB in one string": (
        with_(messages=[{"role": "user", "content": "x" * 2**21}]),
        413,
    ),
    "JSON 10,000 deep": (b"[" * 10_000 + b"]" * 10_000, 400),
    "JSON 900 deep": (
        b'{"model": "auto", "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        400,
    ),
    "tools 100 deep": (with_(tools=[{"a": nested(100)}]), 400),
    "a schema of 20,000 parts": (with_schema({"a": [0] * 20_000}), 400),
    "not finite in a schema": (with_schema({"a": float("inf")}), 400),
    "a schema of 127 kB": (
        with_schema({"enum": ["a" * i for i in range(1, 500)]}),
        400,
    ),
    "a pattern of 2,000 characters": (
        with_schema({"items": {"type": "string", "pattern": "(a|b)" * 400}}),
        400,
    ),
    "a property's pattern that counts to 5,000": (
        with_schema({"patternProperties": {"a{1, 5000}": {}}}),
        400,
    ),
    "a tool whose pattern counts to 129": (
        with_(tools=[tool({"pattern": "[a-z]{129}"})], tool_choice="required"),
        400,
    ),
    "a tool of 60 kB": (with_(tools=[tool({"const": "a" * 60_000})]), 400),
    "tools of 200 kB": (with_(tools=[tool({"const": "a" * 20_000})] * 10), 400),
    "a grammar": (
        with_(
            response_format={"type": "structural_tag", "format": {"type": "grammar"}}
        ),
        400,
    ),
    "half a million brackets": (b"[" + b"[]," * 300_000 + b"[]]", 400),
    "invalid UTF-8": (b'{"model": "\xff\xfe"}', 400),
    "lone surrogate": (
        b'{"model": "auto", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
    ),
    "lone surrogate as a key": (b'{"\\ud800": 1}', 400),
    "a number of 5,000 digits": (b'{"model": "auto", "n": ' + b"9" * 5_000 + b"}", 400),
    "1e400": (b'{"model": "auto", "temperature": 1e400}', 400),
    "n = 1e9": (with_(n=10**9), 400),
    "max_tokens = -1": (with_(max_tokens=-1), 400),
    "max_tokens = 1e18": (with_(max_tokens=10**18), 400),
    "top_logprobs = 50": (with_(top_logprobs=50), 400),
    "10,000 messages": (
        with_(messages=[{"role": "user", "content": "a"}] * 10_000),
        400,
    ),
    "a stop of 10,000 characters": (with_(stop="x" * 10_000), 400),
    "50 stops": (with_(stop=["x"] * 50), 400),
    "1,000 tools": (with_(tools=[{"type": "function"}] * 1_000), 400),
    "1,000 biases": (with_(logit_bias={str(i): 1 for i in range(1_000)}), 400),
    "an image by URL": (
        with_(
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "http://a/"}}
                    ],
                }
            ]
        ),
        400,
    ),
    "chat_template": (with_(chat_template="{{ 1 }}"), 400),
    "chat_template_kwargs 20 deep": (
        with_(chat_template_kwargs={"a": nested(20)}),
        400,
    ),
    "chat_template_kwargs that replace the template": (
        with_(chat_template_kwargs={"chat_template": "{{ 1 }}"}),
        400,
    ),
    "chat_template_kwargs that replace the messages": (
        with_(chat_template_kwargs={"conversation": []}),
        400,
    ),
    "100 chat_template_kwargs": (
        with_(chat_template_kwargs={f"a{i}": i for i in range(100)}),
        400,
    ),
    "chat_template_kwargs of 100 kB": (
        with_(chat_template_kwargs={"a": "x" * 100_000}),
        400,
    ),
    "chat_template_kwargs that are not finite": (
        with_(chat_template_kwargs={"a": float("nan")}),
        400,
    ),
    "mm_processor_kwargs": (with_(mm_processor_kwargs={}), 400),
    "vllm_xargs": (with_(vllm_xargs={}), 400),
    "a cache_salt of 2,000 characters": (with_(cache_salt="a" * 2_000), 400),
    "request_id": (with_(request_id="a"), 400),
    "ignore_eos without a limit": (with_(ignore_eos=True), 400),
    "min_tokens above max_tokens": (with_(min_tokens=5, max_tokens=4), 400),
    "min_tokens = 1e18": (with_(min_tokens=10**18), 400),
    "top_k = 1e18": (with_(top_k=10**18), 400),
    "top_k = true": (with_(top_k=True), 400),
    "min_p that is not finite": (with_(min_p=float("nan")), 400),
    "a tiny repetition_penalty": (with_(repetition_penalty=1e-320), 400),
    "a repetition_penalty that is not finite": (
        with_(repetition_penalty=float("inf")),
        400,
    ),
    "100,000 allowed_token_ids": (
        with_(model="small", allowed_token_ids=[1] * 100_000),
        400,
    ),
    "a negative stop_token_id": (with_(model="small", stop_token_ids=[-1]), 400),
    "a stop_token_id of 2**63": (with_(model="small", stop_token_ids=[2**63]), 400),
    "1,000 bad_words": (with_(bad_words=["x"] * 1_000), 400),
    "an empty bad word": (with_(bad_words=[""]), 400),
    "prompt_logprobs of the whole vocabulary": (with_(prompt_logprobs=-1), 400),
    "prompt_logprobs = 1e9": (with_(prompt_logprobs=10**9), 400),
    "a prompt cut to nothing": (with_(truncate_prompt_tokens=0), 400),
    "beams": (with_(use_beam_search=True, n=128), 400),
    "a stream_interval of 1e9": (with_(stream=True, stream_interval=10**9), 400),
    "a regex that counts to 1,000": (
        with_(structured_outputs={"regex": "a{1000}"}),
        400,
    ),
    "a regex of nested counts": (
        with_(structured_outputs={"regex": "^((a?){1,100}){1,100}$"}),
        400,
    ),
    "a regex of 100 kB": (with_(structured_outputs={"regex": "a" * 100_000}), 400),
    "100,000 choices": (with_(structured_outputs={"choice": ["a"] * 100_000}), 400),
    "a choice with a line break": (
        with_(structured_outputs={"choice": ["a\n"]}),
        400,
    ),
    "an ambiguous grammar": (
        with_(structured_outputs={"grammar": 'root ::= "a" | root "a" | "a" root'}),
        400,
    ),
    "a structural tag": (with_(structured_outputs={"structural_tag": "{}"}), 400),
    "structured_outputs as a text 20,000 deep": (
        with_(structured_outputs={"json": "[" * 20_000 + "]" * 20_000}),
        400,
    ),
    "structured_outputs 100 deep": (
        with_(structured_outputs={"json": {"a": nested(100)}}),
        400,
    ),
    "structured_outputs of two kinds": (
        with_(structured_outputs={"regex": "a", "choice": ["a"]}),
        400,
    ),
    "kv_transfer_params": (with_(kv_transfer_params={"remote_host": "a"}), 400),
    "documents": (with_(documents=[{"text": "a"}]), 400),
    "media_io_kwargs": (with_(media_io_kwargs={"image": {}}), 400),
    "return_token_offsets": (with_(return_token_offsets=True), 400),
    "best_of": (with_(best_of=20), 400),
    "priority as vLLM has it": (with_(priority=-100), 400),
    "a model of 10,000 letters": (with_(model="x" * 10_000), 400),
    "a model by path": (with_(model="../../etc/passwd"), 404),
    "a key of 900 kB": (with_(**{"k" * 900_000: 1}), 400),
    "a key of 900 kB in a message": (
        with_(messages=[{"role": "user", "content": "a", "k" * 900_000: 1}]),
        400,
    ),
    "a key of wide characters": (with_(**{"\ufdfa" * 2_000: 1}), 400),
    "1e999 in a tool": (with_(tools=[{"a": 1}]).replace(b"1}]", b"1e999}]"), 400),
    "a number of 900,000 digits": (
        with_()[:-1] + b', "seed": ' + b"9" * 900_000 + b"}",
        400,
    ),
    "metadata 100,000 deep": (
        with_()[:-1]
        + b', "metadata": {"a": '
        + b"[" * 100_000
        + b"]" * 100_000
        + b"}}",
        400,
    ),
    "metadata 150 deep": (with_(metadata={"a": nested(150)}), 400),
    "60,000 models": (b"{" + b'"model": "x", ' * 60_000 + b'"n": 9}', 400),
    "compressed": (gzip.compress(with_()), 400),
    "UTF-16": (with_().decode().encode("utf-16"), 400),
    "a byte order mark": (b"\xef\xbb\xbf" + with_(), 400),
    "a schema of 900,000 digits": (
        with_schema({"const": 1}).replace(b": 1}", b": " + b"9" * 900_000 + b"}"),
        400,
    ),
    "200,000 stops": (with_(stop=["x"] * 200_000), 400),
    "50,000 biases": (with_(logit_bias={str(i): 1 for i in range(50_000)}), 400),
    "null": (b"null", 400),
    "no object": (b'"a"', 400),
}


# vLLM's parameters that depend on others, or on what the models can do
VLLM_RULES = (
    "add_generation_prompt",
    "allowed_token_ids",
    "chat_template_kwargs",
    "continue_final_message",
    "ignore_eos",
    "logprob_token_ids",
    "min_tokens",
    "prompt_logprobs",
    "repetition_detection",
    "response_format",
    "stop_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "truncate_prompt_tokens",
    "truncation_side",
)


def consistent(body: dict[str, Any]) -> dict[str, Any]:
    """A body without what only a rule over several fields forbids, which a schema cannot state."""
    alone = ("stream_options", "top_logprobs", "tools", "tool_choice", "best_of", "n")
    kept = {key: value for key, value in body.items() if key not in alone}
    if kept.get("max_tokens") is not None:
        kept["max_tokens"] = kept["max_tokens"] % 100 + 1
    kept.pop("max_completion_tokens", None)
    # of vLLM's, several need others, a named model or an arm that can do it
    for name in VLLM_RULES:
        kept.pop(name, None)
    if isinstance(messages := kept.get("messages"), list):
        kept["messages"] = [
            {**message, "content": message.get("content") or "a", "tool_calls": None}
            | ({"tool_call_id": "b"} if message.get("role") == "tool" else {})
            for message in messages
        ]
    if isinstance(prompt := kept.get("prompt"), list) and prompt:
        kept["prompt"] = [item if isinstance(item, str) else "a" for item in prompt]
    return kept


def _no_description(*_: Any, **__: Any) -> str:
    """What stands for a lambda in hypothesis's reports."""
    return "lambda"


# codes of a 503, each with a Retry-After
LATER = ("unavailable", "model_unavailable", "not_ready", "too_many_unfinished")


def fuzz(gateway: Gateway, cases: int, first_seed: int = 0) -> Counter[tuple[str, int]]:
    """Send requests that schemathesis makes from the OpenAPI schema; the schema allows half of them and forbids half.

    In the schema a model is any text. The names are added here, or no request would name a model that exists.

    Args:
        gateway: gets the requests.
        cases: at least so many.
        first_seed: of hypothesis.

    Returns:
        The number of answers by path and status.
    """
    schema = gateway.client.get("/openapi.json").json()
    names = [card["id"] for card in gateway.client.get("/v1/models").json()["data"]]
    for component in schema["components"]["schemas"].values():
        if "model" in component.get("properties", ()):
            component["properties"]["model"] = {"type": "string", "enum": names}
    operations = [
        found.ok()
        for found in schemathesis.openapi.from_dict(schema).get_all_operations()
    ]
    rich = [operation for operation in operations if operation.body]
    answers: Counter[tuple[str, int]] = Counter()

    def play(operation: Any, mode: GenerationMode, examples: int) -> None:
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @seed(first_seed + sum(answers.values()))
        def run(case: Any) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body = consistent(case.body)
            request = case.as_transport_kwargs(base_url="http://localhost")
            known = (
                "method",
                "url",
                "headers",
                "params",
                "content",
                "json",
                "data",
                "cookies",
            )
            answer = gateway.client.request(
                **{key: value for key, value in request.items() if key in known}
            )
            answers[operation.path, answer.status_code] += 1
            if answer.status_code >= 400:
                assert openai_shape(answer.json()), answer.text
            if answer.status_code >= 500:
                refused = documented_refusal(
                    answer.status_code, answer.headers, answer.json()
                )
                assert refused, f"{request}: {answer.text}"

        # Hypothesis parses sources to describe a lambda, and CPython 3.11 may answer with a SystemError
        # ("recursion depth mismatch", python/cpython#106905).
        with mock.patch.object(lambda_sources, "_lambda_description", _no_description):
            run()

    for operation in operations:
        if operation not in rich:
            play(operation, GenerationMode.POSITIVE, 20)
    before = sum(answers.values())
    while sum(answers.values()) - before < cases:
        for operation in rich:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                play(operation, mode, min(100, cases // (2 * len(rich)) + 1))
    return answers


def documented_refusal(status: int, headers: Any, body: Any) -> bool:
    """Whether an answer is a 503 that asks the client to come back, for a documented reason."""
    if status != 503 or not openai_shape(body):
        return False
    return headers.get("retry-after", "").isdigit() and body["error"]["code"] in LATER


def openai_shape(body: Any) -> bool:
    """Whether an error's body is what OpenAI's clients expect."""
    error = body.get("error") if isinstance(body, dict) else None
    return (
        isinstance(error, dict)
        and set(error) == {"message", "type", "param", "code"}
        and bool(error["message"])
    )
