"""vLLM's parameters: each of the installed vLLM's is passed on within bounds, or refused on purpose with a reason."""

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.parameters.chat import ChatRequest
from deployments.parameters.completion import CompletionRequest
from deployments.parameters.generation import GenerationRequest
from deployments.parameters.values import Unsupported
from deployments.parameters.vllm import (
    RESERVED,
    EngineChatParameters,
    EngineParameters,
    RefusedChatParameters,
    RefusedCompletionParameters,
)
from policies.capabilities import Capability

CHAT: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "3 plus 5?"}],
}
COMPLETION: dict[str, Any] = {"model": "small", "prompt": "3 plus 5?"}
Request = type[ChatRequest] | type[CompletionRequest]
KINDS: list[tuple[Request, dict[str, Any]]] = [
    (ChatRequest, CHAT),
    (CompletionRequest, COMPLETION),
]
# the last good values, the first bad ones, and what else the parameter needs
EDGES: list[tuple[str, list[Any], list[Any], dict[str, Any]]] = [
    ("top_k", [-1, 0, 2**31 - 1], [-2, 2**31, True, "1", 1.5], {}),
    ("min_p", [0, 1], [-0.1, 1.1, True, float("nan")], {}),
    ("repetition_penalty", [0.01, 100], [0, 0.001, 101, float("inf")], {}),
    ("stop_token_ids", [[0], [2**31 - 1] * 1_024], [[], [-1], [2**31], ["1"]], {}),
    ("include_stop_str_in_output", [True, False], [1, "yes"], {}),
    ("ignore_eos", [True, False], [1], {"max_tokens": 5}),
    ("min_tokens", [0, 5], [-1, 6, True], {"max_tokens": 5}),
    ("skip_special_tokens", [True, False], ["no"], {}),
    ("spaces_between_special_tokens", [True, False], [0], {}),
    ("truncate_prompt_tokens", [-1, 1, 2**31 - 1], [-2, 0, 2**31, True], {}),
    ("truncation_side", ["left", "right"], ["both"], {"truncate_prompt_tokens": 9}),
    ("prompt_logprobs", [0, 20], [-1, 21, True], {}),
    ("logprob_token_ids", [[1] * 128], [[], [1] * 129], {"logprobs": True}),
    ("allowed_token_ids", [[1]], [[], [-1], [1] * 1_025], {}),
    ("bad_words", [[], ["a"] * 64], [[""], ["a"] * 65, "a"], {}),
    ("thinking_token_budget", [-1, 0, 9], [-2, 1.5], {}),
    ("add_special_tokens", [True], ["a"], {}),
    ("return_tokens_as_token_ids", [True], [1], {}),
    ("return_token_ids", [True], [1], {}),
    ("stream_interval", [1, 100], [0, 101], {}),
    ("cache_salt", ["a", "a" * 1_024], ["", "a" * 1_025, 5], {}),
    (
        "repetition_detection",
        [{"max_pattern_size": 9, "min_count": 2}, {}],
        [{"max_pattern_size": 9}, {"max_pattern_size": 257}, {"a": 1}],
        {},
    ),
    (
        "structured_outputs",
        [
            {"json": {"type": "object"}},
            {"json": '{"type": "object"}'},
            {"regex": "[a-z]{1,9}"},
            {"choice": ["yes", "no"]},
            {"json_object": True},
        ],
        [
            {},
            {"json_object": False},
            {"json": "{"},
            {"json": "[1]"},
            {"json": 5},
            {"regex": "a{129}"},
            {"choice": []},
            {"choice": [""]},
            {"grammar": 'root ::= "yes"'},
            {"structural_tag": "{}"},
            {"regex": "a", "choice": ["a"]},
            {"regex": "a", "backend": "outlines"},
        ],
        {},
    ),
]
CHAT_EDGES: list[tuple[str, list[Any], list[Any], dict[str, Any]]] = [
    ("include_reasoning", [True, False], [1], {}),
    ("echo", [True, False], [1], {}),
    ("add_generation_prompt", [True, False], ["a"], {}),
    ("continue_final_message", [True], [1], {}),
    ("return_prompt_text", [True], [1], {}),
    ("reasoning_effort", ["none", "low", "max"], ["a lot", 5], {}),
    (
        "chat_template_kwargs",
        [{}, {"enable_thinking": False}, {"a": {"b": [1, 2]}}],
        [{"a": [[[[[[]]]]]]}, {"a b": 1}, {"tools": []}, [], {"a": float("inf")}],
        {},
    ),
]


def extended(kind: Request, body: dict[str, Any], change: dict[str, Any]) -> Any:
    """The request with a change; `logprobs: true` of a chat is a number in a completion."""
    if kind is CompletionRequest and change.get("logprobs") is True:
        change = {**change, "logprobs": 1}
    return kind.model_validate({**body, **change})


@pytest.mark.parametrize(("field", "good", "bad", "others"), EDGES, ids=lambda v: "")
def test_edges_of_vllms_parameters(
    field: str, good: list[Any], bad: list[Any], others: dict[str, Any]
) -> None:
    """What is taken reaches the engine and needs one that is vLLM; what is beyond the edge is refused with its name."""
    for kind, body in KINDS:
        check_edges(kind, body, field, good, bad, others)


@pytest.mark.parametrize(
    ("field", "good", "bad", "others"), CHAT_EDGES, ids=lambda v: ""
)
def test_edges_of_vllms_parameters_of_chats(
    field: str, good: list[Any], bad: list[Any], others: dict[str, Any]
) -> None:
    """As for those that completions have, too."""
    check_edges(ChatRequest, CHAT, field, good, bad, others)


def check_edges(
    kind: Request,
    body: dict[str, Any],
    field: str,
    good: list[Any],
    bad: list[Any],
    others: dict[str, Any],
) -> None:
    for value in good:
        request = extended(kind, body, {**others, field: value})
        assert field in request.body(), value
        if field != "reasoning_effort":
            needed = {need.parameter for need in request.needs()}
            assert field in needed, value
    for value in bad:
        with pytest.raises(ValidationError) as raised:
            extended(kind, body, {**others, field: value})
        for error in raised.value.errors():
            where = (*error["loc"], error.get("ctx", {}).get("field"))
            assert where[0] == field, (value, error)
    assert field not in kind.model_validate({**body, field: None}).body()


def test_every_parameter_of_the_installed_vllm_is_decided_about() -> None:
    """A parameter that a new vLLM brings must be passed on or refused, in code and in the documentation."""
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion

    for theirs, ours in (
        (chat.ChatCompletionRequest, ChatRequest),
        (completion.CompletionRequest, CompletionRequest),
    ):
        unknown = set(theirs.model_fields) - set(ours.model_fields)
        assert unknown == set()
        passed = set(ours.engine_names())
        assert passed <= set(theirs.model_fields), passed - set(theirs.model_fields)


def test_every_edge_is_tested() -> None:
    """Each parameter that is passed on is in the tables above."""
    tested = {field for field, *_ in EDGES}
    assert set(EngineParameters.model_fields) == tested
    tested |= {field for field, *_ in CHAT_EDGES}
    assert set(EngineChatParameters.model_fields) == tested - {"reasoning_effort"}


def test_engines_take_what_is_passed_on() -> None:
    """The classes of vLLM take every good value, with the types that the gateway sends."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import (
        CompletionRequest as VllmCompletion,
    )

    for (kind, body), theirs, edges in (
        (KINDS[0], ChatCompletionRequest, [*EDGES, *CHAT_EDGES]),
        (KINDS[1], VllmCompletion, EDGES),
    ):
        for field, good, _, others in edges:
            for value in good:
                request = extended(kind, body, {**others, field: value})
                made = theirs.model_validate(request.body())
                made.to_sampling_params(64, {})


@pytest.mark.parametrize("kind", [RefusedChatParameters, RefusedCompletionParameters])
def test_refused_parameters_say_why(kind: Any) -> None:
    """Null and the default change nothing; any other value is refused with the reason."""
    request, body = KINDS[kind is RefusedCompletionParameters]
    for name, field in kind.model_fields.items():
        (check,) = (
            item.func for item in field.metadata if isinstance(item.func, Unsupported)
        )
        assert len(check.reason) > 10
        for harmless in (None, check.default):
            made = request.model_validate({**body, name: harmless})
            assert name not in made.body()
        with pytest.raises(ValidationError, match="is not supported here; "):
            request.model_validate({**body, name: {"a": 1}})


def test_variables_of_a_template_cannot_replace_arguments_of_the_engine() -> None:
    """All arguments of transformers' apply_chat_template are reserved."""
    import inspect

    from transformers import PreTrainedTokenizerBase

    found = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    names = {name for name in found if name not in ("self", "kwargs")}
    assert names <= set(RESERVED)
    for name in RESERVED:
        with pytest.raises(ValidationError, match="no variable of a chat template"):
            ChatRequest.model_validate({**CHAT, "chat_template_kwargs": {name: 1}})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"min_tokens": 9, "max_completion_tokens": 8}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (
            {
                "structured_outputs": {"regex": "a"},
                "response_format": {"type": "json_object"},
            },
            "structured_outputs",
        ),
        (
            {
                "structured_outputs": {"regex": "a"},
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": "required",
            },
            "structured_outputs",
        ),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
    ids=str,
)
def test_parameters_that_contradict_each_other(
    change: dict[str, Any], field: str
) -> None:
    """They are refused before an engine refuses them in its own words."""
    with pytest.raises(ValidationError) as raised:
        ChatRequest.model_validate({**CHAT, **change})
    assert raised.value.errors()[0]["ctx"]["field"] == field


def test_a_message_is_continued_without_a_new_one() -> None:
    """VLLM's default of add_generation_prompt contradicts continue_final_message."""
    request = ChatRequest.model_validate({**CHAT, "continue_final_message": True})
    assert request.body()["add_generation_prompt"] is False


@pytest.mark.parametrize(
    ("change", "capability", "parameter"),
    [
        ({"tools": 1}, Capability.TOOLS, "tools"),
        ({"tools": 1, "tool_choice": "required"}, Capability.FORCED_TOOLS, "tools"),
        (
            {"tools": 1, "parallel_tool_calls": True},
            Capability.PARALLEL_TOOLS,
            "parallel_tool_calls",
        ),
        ({"logprobs": True}, Capability.LOGPROBS, "logprobs"),
        (
            {"response_format": {"type": "json_object"}},
            Capability.JSON_OBJECT,
            "response_format",
        ),
        (
            {"structured_outputs": {"choice": ["a"]}},
            Capability.JSON_SCHEMA,
            "structured_outputs",
        ),
        (
            {"thinking_token_budget": 5},
            Capability.THINKING,
            "thinking_token_budget",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": True}},
            Capability.THINKING,
            "chat_template_kwargs.enable_thinking",
        ),
        ({"top_k": 5}, Capability.VLLM_PARAMETERS, "top_k"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            Capability.VLLM_PARAMETERS,
            "stream_options.continuous_usage_stats",
        ),
    ],
    ids=str,
)
def test_needs_are_read_from_the_request(
    change: dict[str, Any], capability: Capability, parameter: str
) -> None:
    """Each with the parameter that an error names."""
    if change.get("tools"):
        tool = {"type": "function", "function": {"name": "f"}}
        change = {**change, "tools": [tool]}
    found = ChatRequest.model_validate({**CHAT, **change}).needs()
    assert (capability, parameter) in [(n.capability, n.parameter) for n in found]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tools": None, "tool_choice": None},
        {"response_format": {"type": "text"}},
        {"chat_template_kwargs": None, "top_k": None},
        {"reasoning_effort": "low"},
    ],
    ids=str,
)
def test_ordinary_requests_need_nothing(change: dict[str, Any]) -> None:
    """So every model may answer them."""
    assert ChatRequest.model_validate({**CHAT, **change}).needs() == []


def test_openais_own_fields_are_no_parameters_of_vllm() -> None:
    """They go to every engine."""
    assert not EngineChatParameters.engine_names() & {"response_format", "logprobs"}
    assert "top_k" in GenerationRequest.engine_names()
