"""OpenAI's interface as its clients use it: what is taken, what reaches the model, and how the rest is refused."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deployments.models import capabilities, context_length
from deployments.models.report import ModelReport, failure
from tests.support.gateway import ROOT, Gateway, eventually

USER = {"role": "user", "content": "What is 3 plus 5?"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {
    "id": "call_1",
    "type": "function",
    "index": 0,
    "function": {"name": "f", "arguments": '{"a": 3}'},
}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "tool_call_id": "call_1", "content": "8"}


def complete(gateway: Gateway, **body: Any) -> Any:
    return gateway.client.post("/v1/completions", json={"model": "auto", **body})


def embed(gateway: Gateway, **body: Any) -> Any:
    given = {"model": "auto", "input": "a", **body}
    return gateway.client.post("/v1/embeddings", json=given)


def sent(gateway: Gateway) -> list[dict[str, Any]]:
    """The bodies that the models got."""
    return [body for model in gateway.models.values() for body in model.calls]


def refused(answer: Any, param: str | None, status: int = 400) -> str:
    """The message of a refusal in OpenAI's shape that names this parameter."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    return str(error["message"])


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a", ["a"], ["a", "b"]], ids=str)
def test_texts_as_prompts_reach_the_model_as_they_are(
    gateway: Gateway, prompt: Any
) -> None:
    """A text or a list of texts, for `auto` and for a named model."""
    for model in ("auto", "large"):
        assert complete(gateway, model=model, prompt=prompt).status_code == 200
    assert [body["prompt"] for body in sent(gateway)] == [prompt, prompt]


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2], [3]]], ids=str)
def test_token_ids_are_for_a_named_model(gateway: Gateway, prompt: Any) -> None:
    """The sizes behind `auto` may have different tokenizers, so the ids would mean different texts."""
    assert complete(gateway, model="large", prompt=prompt).status_code == 200
    assert gateway.models["large"].calls[0]["prompt"] == prompt
    for model in ("auto", "auto:fast"):
        answer = complete(gateway, model=model, prompt=prompt)
        assert "name that model" in refused(answer, "prompt")
    assert len(sent(gateway)) == 1


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt.0"),
        (["a", ""], "prompt.1"),
        (["a", 1], "prompt.1"),
        ([[]], "prompt.0"),
        ([1, True], "prompt.1"),
        ([1, -1], "prompt.1"),
        ([[1], [2, "a"]], "prompt.1.1"),
        ([1.5], "prompt.0"),
        ({"a": 1}, "prompt"),
        (None, "prompt"),
        (["a"] * 2_049, "prompt"),
        (["a"] * 129, "prompt"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_prompts_are_refused_with_their_place(
    gateway: Gateway, prompt: Any, param: str
) -> None:
    refused(complete(gateway, prompt=prompt), param)
    assert not sent(gateway)


def test_each_prompt_must_fit_and_not_their_sum(tmp_path: Path) -> None:
    """Twenty prompts of 200 tokens fit into a context of 512; one of 600 does not."""
    tokenizer = str(ROOT / "assets/models/nano/tokenizer.json")
    profiler = {"embedder": str(ROOT / "assets/embedder"), "tokenizer": tokenizer}
    made = Gateway(tmp_path, profiler=profiler)
    with made.client:
        assert complete(made, prompt=["7" * 200] * 20, max_tokens=5).status_code == 200
        answer = complete(made, prompt=["7", "7" * 600], max_tokens=5)
        refused(answer, "prompt")
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        ids = complete(made, model="large", prompt=[[1], [1] * 600], max_tokens=5)
        refused(ids, "prompt")


# --- messages ---------------------------------------------------------------------------------------------------------


def test_text_parts_are_one_text_for_profiler_and_model(gateway: Gateway) -> None:
    """Nothing is put between the parts, in messages of every role."""
    parts = [{"type": "text", "text": "What is 347"}, {"type": "text", "text": " plus"}]
    roles = ("system", "developer", "user", "assistant")
    messages = [{"role": role, "content": parts} for role in roles]
    assert gateway.chat(model="large", messages=messages).status_code == 200
    (body,) = sent(gateway)
    assert [m["content"] for m in body["messages"]] == ["What is 347 plus"] * 4
    assert body["messages"][1]["role"] == "system"


@pytest.mark.parametrize(
    "messages",
    [
        [USER, CALLED, ANSWERED],
        [USER, {k: v for k, v in CALLED.items() if k != "content"}, ANSWERED],
        [USER, {**CALLED, "content": []}, ANSWERED],
        [USER, {**CALLED, "content": ""}, ANSWERED],
        [USER, CALLED, {**ANSWERED, "content": [{"type": "text", "text": "8"}]}],
        [USER, CALLED, {**ANSWERED, "content": ""}],
        [USER, {"role": "assistant", "content": ""}, USER],
        [USER, {"role": "assistant", "content": None, "refusal": "No."}, USER],
        [USER, {"role": "assistant", "content": None, "reasoning": "Hm."}, USER],
        [{"role": "user", "content": ""}],
    ],
    ids=range(10),
)
def test_histories_that_clients_send_are_taken(
    gateway: Gateway, messages: list[dict[str, Any]]
) -> None:
    """Of tool calls, refusals and thoughts; every message without tool calls reaches the model with a content."""
    assert gateway.chat(messages=messages).status_code == 200
    for message in sent(gateway)[0]["messages"]:
        assert isinstance(message.get("content"), str) or message.get("tool_calls")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "system"}, USER], "messages.0.content"),
        ([USER, {"role": "assistant"}], "messages.1.content"),
        (
            [USER, {"role": "assistant", "content": None, "tool_calls": []}],
            "messages.1.content",
        ),
        ([USER, CALLED, {**ANSWERED, "content": None}], "messages.2.content"),
        ([USER, CALLED, {"role": "tool", "content": "8"}], "messages.2.tool_call_id"),
    ],
    ids=range(8),
)
def test_messages_without_a_content_are_refused_with_their_place(
    gateway: Gateway, messages: list[dict[str, Any]], param: str
) -> None:
    refused(gateway.chat(messages=messages), param)
    assert not sent(gateway)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"function": {"name": "f", "arguments": {}}}, "function.arguments"),
        ({"function": {"name": "f", "arguments": "{"}}, "function.arguments"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "function.arguments"),
        ({"function": {"arguments": "{}"}}, "function.name"),
        ({"function": None}, "function"),
        ({"id": None}, "id"),
        ({"type": "custom"}, "type"),
    ],
    ids=str,
)
def test_wrong_calls_in_the_history_are_refused_with_the_clients_path(
    gateway: Gateway, change: dict[str, Any], field: str
) -> None:
    """The names of the engine's classes do not appear."""
    messages = [USER, {**CALLED, "tool_calls": [{**CALL, **change}]}, ANSWERED]
    message = refused(
        gateway.chat(messages=messages), f"messages.1.tool_calls.0.{field}"
    )
    assert "Param" not in message


# --- fields -----------------------------------------------------------------------------------------------------------


CHAT_FIELDS = [
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "modalities",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
    "router",
]
COMPLETION_FIELDS = [
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_p",
    "user",
    "router",
]


def test_fields_that_are_null_are_as_if_left_out(gateway: Gateway) -> None:
    """Every field of OpenAI's reference, in chats, completions and embeddings; none reaches the model."""
    assert gateway.chat(**dict.fromkeys(CHAT_FIELDS)).status_code == 200
    nulls = dict.fromkeys(COMPLETION_FIELDS)
    assert complete(gateway, prompt="a", **nulls).status_code == 200
    fields = ("encoding_format", "dimensions", "user", "router")
    assert embed(gateway, **dict.fromkeys(fields)).status_code == 200
    for body in sent(gateway):
        assert body.keys() <= {"messages", "prompt", "input"}


@pytest.mark.parametrize(
    "field", ["functions", "function_call", "audio", "web_search_options"]
)
def test_other_values_of_unsupported_fields_say_what_to_use(
    gateway: Gateway, field: str
) -> None:
    assert "is not supported here; " in refused(gateway.chat(**{field: {}}), field)


def test_best_of_and_suffix_are_refused_unless_they_change_nothing(
    gateway: Gateway,
) -> None:
    """`best_of` equal to n is what happens anyway."""
    assert complete(gateway, prompt="a", best_of=1).status_code == 200
    assert complete(gateway, prompt="a", best_of=2, n=2).status_code == 200
    refused(complete(gateway, prompt="a", best_of=2), "best_of")
    refused(complete(gateway, prompt="a", suffix="b"), "suffix")
    assert all("best_of" not in body for body in sent(gateway))


CHAT_EDGES: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 2], [-0.1, 2.1, True, "1"]),
    ("top_p", [0, 1], [-0.1, 1.1, False]),
    ("n", [1, 128], [0, 129, True, 1.5, "2"]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1, True]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("seed", [-(2**63), 2**63 - 1, 0], [-(2**63) - 1, 2**63, True]),
    ("stop", ["a", [], ["a"] * 4], ["", [""], ["a"] * 5]),
    ("max_tokens", [1], [0, -1, True]),
    ("max_completion_tokens", [1], [0, True]),
    ("stream", [False], [1, "true"]),
    ("logit_bias", [{"1": -100}], [{"1": True}, {"a": 1}]),
]


@pytest.mark.parametrize(("field", "good", "bad"), CHAT_EDGES, ids=str)
def test_edges_of_documented_ranges(
    gateway: Gateway, field: str, good: list[Any], bad: list[Any]
) -> None:
    """The last value within a range is taken and the first beyond it refused; `true` and texts are no numbers."""
    for value in good:
        assert gateway.chat(**{field: value}).status_code == 200, value
    for value in bad:
        answer = gateway.chat(**{field: value})
        assert answer.status_code == 400, value
        assert answer.json()["error"]["param"].startswith(field), value


def test_logprobs_of_chats_and_completions(gateway: Gateway) -> None:
    """0 to 20 of a chat need `logprobs: true`; 0 to 5 of a completion."""
    for top in (0, 20):
        assert gateway.chat(logprobs=True, top_logprobs=top).status_code == 200
    refused(gateway.chat(logprobs=True, top_logprobs=21), "top_logprobs")
    assert "logprobs: true" in refused(gateway.chat(top_logprobs=3), "top_logprobs")
    for logprobs in (0, 5):
        assert complete(gateway, prompt="a", logprobs=logprobs).status_code == 200
    refused(complete(gateway, prompt="a", logprobs=6), "logprobs")


def test_values_that_engines_refuse_are_put_into_their_words(gateway: Gateway) -> None:
    """A `top_p` of 0 is the most probable token; several choices at temperature 0 are the most probable ones."""
    assert gateway.chat(model="large", top_p=0).status_code == 200
    assert gateway.chat(model="large", temperature=0, n=2).status_code == 200
    assert gateway.chat(model="large", temperature=0, n=1).status_code == 200
    first, several, one = gateway.models["large"].calls
    assert 0 < first["top_p"] < 1e-3
    assert several["top_k"] == 1 and several["temperature"] > 0
    assert one["temperature"] == 0 and "top_k" not in one


def test_a_completion_of_no_tokens_is_an_echo(gateway: Gateway) -> None:
    """It is how evaluations get the probabilities of a prompt."""
    body = {"prompt": "a", "max_tokens": 0}
    assert complete(gateway, **body, echo=True, logprobs=1).status_code == 200
    assert "echo" in refused(complete(gateway, **body), "max_tokens")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": []}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice.function.name",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function.name"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "object"}},
                }
            },
            "response_format.json_schema.name",
        ),
    ],
    ids=str,
)
def test_mistakes_are_found_before_a_model_is_asked(
    gateway: Gateway, change: dict[str, Any], param: str
) -> None:
    """No decision is made for them, so there is none in the answer's headers."""
    answer = gateway.chat(**change)
    refused(answer, param)
    assert not sent(gateway) and "x-router-decision-id" not in answer.headers


# --- the choice -------------------------------------------------------------------------------------------------------


def test_ids_with_a_slash_are_retrieved(tmp_path: Path) -> None:
    """As a hub has them, plain and percent-encoded; unknown ones are `model_not_found`."""
    models = {"Qwen/Qwen3-4B": {"context_tokens": 512}}
    made = Gateway(tmp_path, models=models)
    with made.client:
        for name in ("Qwen/Qwen3-4B", "Qwen%2FQwen3-4B", "auto%3Afast"):
            card = made.client.get(f"/v1/models/{name}")
            assert card.status_code == 200 and card.json()["object"] == "model"
        for name in ("Qwen/Qwen3", "Qwen%2FQwen3", "Qwen/Qwen3-4B/", "auto:"):
            answer = made.client.get(f"/v1/models/{name}")
            assert answer.json()["error"]["code"] == "model_not_found", name
        assert made.chat(model="Qwen/Qwen3-4B").status_code == 200


def test_wishes_hold_for_named_models_and_embeddings(gateway: Gateway) -> None:
    """Unknown names are refused, and hard limits are kept or refused, whatever `model` is."""
    for model in ("auto", "large"):
        answer = gateway.chat(model=model, router={"models": ["nope"]})
        assert "unknown model 'nope'" in refused(answer, "router.models")
        answer = gateway.chat(model=model, router={"max_cost": 1e-12})
        assert "is over the limit" in refused(answer, "router")
    refused(gateway.chat(model="large", router={"models": ["small"]}), "router.models")
    answer = gateway.chat(model="large", router={"models": ["small", "large"]})
    assert answer.status_code == 200
    for model in ("auto", "minilm"):
        for models in (["nope"], ["small"]):
            answer = embed(gateway, model=model, router={"models": models})
            refused(answer, "router.models")
        answer = embed(gateway, model=model, router={"models": ["minilm", "small"]})
        assert answer.status_code == 200


def test_names_of_the_router_are_exact(gateway: Gateway) -> None:
    for name in ("auto:", "AUTO", " auto", "auto:fast:", "auto:Fast"):
        refused(gateway.chat(model=name), "model", 404)


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/messages", "/v1/responses/resp_1/cancel"]
)
def test_an_interface_that_is_not_supported_names_the_one_to_use(
    gateway: Gateway, path: str
) -> None:
    answer = gateway.client.post(path, json={"model": "auto", "input": "Hello"})
    assert "/v1/chat/completions" in refused(answer, None, 404)


def lacks_tools(gateway: Gateway, *names: str) -> None:
    """Let the router know from their arguments that these models cannot call tools."""
    for name in names:
        gateway.deploy(name, {"engine_kwargs": {"max_model_len": 512}})


@pytest.mark.parametrize("choice", [None, "auto", "required"])
def test_tools_are_refused_before_a_decision_if_no_model_can_call_them(
    gateway: Gateway, choice: str | None
) -> None:
    """The parameter is `tools`. Without a call (`none`), and without tools, nothing changes."""
    lacks_tools(gateway, "small", "large")
    for model in ("auto", "large"):
        answer = gateway.chat(model=model, tools=[TOOL], tool_choice=choice)
        refused(answer, "tools")
        assert "x-router-decision-id" not in answer.headers
    assert not sent(gateway)
    assert gateway.chat(tools=[TOOL], tool_choice="none").status_code == 200
    assert gateway.chat().status_code == 200


def test_tools_go_to_the_models_that_can_call_them(gateway: Gateway) -> None:
    lacks_tools(gateway, "small")
    for _ in range(8):
        answer = gateway.chat(tools=[TOOL])
        assert answer.headers["x-router-model"] == "large"
    refused(gateway.chat(tools=[TOOL], model="small"), "tools")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["tools", "context"])
def test_a_refusal_for_want_of_a_capability_is_tried_on_another_model(
    tmp_path: Path, kind: str, stream: bool
) -> None:
    """Once, and only on a model that may be able. The first decision is `rejected`, from which nothing is learned."""
    sizes = {
        "small": {"context_tokens": 512},
        "large": {"context_tokens": 1024, "output_price_usd_per_million": 10},
    }
    made = Gateway(tmp_path, models=sizes)
    report = failure("no", 400, "tools", capabilities.CODE)
    if kind == "context":
        report = failure("no", 400, "messages", context_length.CODE)

    async def refuses(_: str, __: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        yield b"", report

    with made.client:
        made.models["small"].script = refuses
        wish = {"cost_weight": 1e6}
        answer = made.chat(router=wish, stream=stream)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-router-model"] == "large"
        assert answer.headers["x-router-fallback"] == "model"
        assert len(made.models["small"].calls) == len(made.models["large"].calls) == 1
        # a model that the client named has no successor
        assert made.chat(model="small", stream=stream).status_code == 400
        # a smaller context is no help
        made.models["large"].script = refuses
        made.models["small"].script = None
        answer = made.chat(model="auto", router={"models": ["large", "small"]})
        assert answer.status_code in (200, 400)


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counting(tmp_path: Path) -> Any:
    """A gateway that counts tokens; one model has a larger context than the other."""
    tokenizer = str(ROOT / "assets/models/nano/tokenizer.json")
    made = Gateway(
        tmp_path,
        models={"small": {"context_tokens": 256}, "large": {"context_tokens": 512}},
        profiler={"embedder": str(ROOT / "assets/embedder"), "tokenizer": tokenizer},
    )
    with made.client:
        yield made


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "user", "content": "7" * 600}]}, "messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "7"}] * 600}
                ]
            },
            "messages",
        ),
        ({"max_tokens": 500}, "max_tokens"),
        ({"max_tokens": 512}, "max_tokens"),
        ({"max_tokens": 4096}, "max_tokens"),
        ({"max_completion_tokens": 2**31 - 1}, "max_completion_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_too_long_is_one_error_before_a_decision(
    counting: Gateway, change: dict[str, Any], param: str
) -> None:
    """400, OpenAI's code, and one wording, for `auto` and for a named model."""
    for model in ("auto", "large"):
        answer = counting.chat(model=model, **change)
        message = refused(answer, param)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert message.startswith("This model's maximum context length is 512 tokens.")
        assert "x-router-decision-id" not in answer.headers
    assert not sent(counting)


def test_too_long_for_a_completion(counting: Gateway) -> None:
    """OpenAI's default of 16 tokens for the answer counts."""
    answer = complete(counting, prompt="7" * 500)
    refused(answer, "prompt")
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert complete(counting, prompt="7" * 490).status_code == 200
    assert complete(counting, prompt="7" * 500, max_tokens=5).status_code == 200


def test_what_fits_one_model_goes_there(counting: Gateway) -> None:
    for change in (
        {"messages": [{"role": "user", "content": "7" * 300}]},
        {"max_tokens": 400},
    ):
        for _ in range(6):
            answer = counting.chat(**change)
            assert answer.headers["x-router-model"] == "large"
        refused(
            counting.chat(model="small", **change),
            "max_tokens" if "max_tokens" in change else "messages",
        )


def test_without_a_tokenizer_only_what_is_certain_is_refused(gateway: Gateway) -> None:
    """The number of tokens is then an estimate, and the engine knows the exact one."""
    refused(gateway.chat(max_tokens=512), "max_tokens")
    assert gateway.chat(max_tokens=510).status_code == 200


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_refused_request_has_no_answer_to_score(gateway: Gateway) -> None:
    """A score for it gets a 409, and nothing is learned."""

    async def refuses(_: str, __: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        yield b"", ModelReport(error=failure("no", 400, "messages").error)

    for name in ("small", "large"):
        gateway.models[name].script = refuses
    decision_id = gateway.chat().headers["x-router-decision-id"]
    where = f"/v1/router/decisions/{decision_id}"
    eventually(lambda: gateway.client.get(where).json().get("outcome") is not None)
    given = {"decision_id": decision_id, "score": 1.0}
    answer = gateway.client.post("/v1/feedback", json=given)
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "no_answer"
    found = gateway.client.get(where).json()
    assert found["feedback"] == [] and found["outcome"]["status"] == "rejected"
    state = gateway.client.get("/v1/router/state").json()
    assert json.dumps(state) and state["window"]["scored"] == 0
