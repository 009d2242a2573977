"""vLLM's parameters by name and by `auto`, whole and streamed; and how they change the room that a request needs."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from deployments.models import context_length
from deployments.models.report import ModelReport
from tests.support.fakes import FakeModel
from tests.support.gateway import ROOT, Gateway, eventually

USER = {"role": "user", "content": "What is 3 plus 5?"}
# what vLLM's own tests of its endpoints send, and what the engine must get; None: refused, with the parameter
COMMON: list[tuple[dict[str, Any], str | None]] = [
    ({"top_k": 5}, None),
    ({"min_p": 0.1}, None),
    ({"repetition_penalty": 1.2}, None),
    ({"min_tokens": 2}, None),
    ({"ignore_eos": True}, None),
    ({"skip_special_tokens": False}, None),
    ({"spaces_between_special_tokens": False}, None),
    ({"include_stop_str_in_output": True, "stop": "a"}, None),
    ({"bad_words": ["a"]}, None),
    ({"return_token_ids": True}, None),
    ({"truncate_prompt_tokens": 100}, None),
    ({"truncate_prompt_tokens": -1}, None),
    ({"structured_outputs": {"choice": ["a", "b"]}}, None),
    ({"structured_outputs": {"regex": "[a-z]+"}}, None),
    ({"structured_outputs": {"json": {"type": "object"}}}, None),
    ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar"),
    ({"response_format": {"type": "json_object"}}, None),
    ({"use_beam_search": False, "length_penalty": 1.0, "priority": 0}, None),
    ({"use_beam_search": True, "n": 2}, "use_beam_search"),
    ({"priority": 1}, "priority"),
    ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"guided_choice": ["a"]}, "guided_choice"),
]
CHATS: list[tuple[dict[str, Any], str | None]] = [
    *COMMON,
    ({"chat_template_kwargs": {"enable_thinking": False}}, None),
    ({"include_reasoning": False}, None),
    ({"echo": True}, None),
    ({"add_generation_prompt": False}, None),
    ({"reasoning_effort": "low"}, None),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"documents": [{"text": "a"}]}, "documents"),
]
TOKENS = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")
HARMLESS = ("use_beam_search", "length_penalty", "priority")


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that counts tokens; one model has a larger context than the other."""
    tokenizer = str(ROOT / "assets/models/nano/tokenizer.json")
    made = Gateway(
        tmp_path_factory.mktemp("counting"),
        models={"small": {"context_tokens": 256}, "large": {"context_tokens": 512}},
        profiler={"embedder": str(ROOT / "assets/embedder"), "tokenizer": tokenizer},
    )
    with made.client:
        yield made


@pytest.fixture(autouse=True)
def fresh(counting: Gateway) -> None:
    """Each test begins with models that say their name."""
    for name in counting.models:
        counting.models[name] = FakeModel(name)
    counting.ingress.dispatcher._methods.clear()


def sent(gateway: Gateway) -> list[dict[str, Any]]:
    """The bodies that the models got."""
    return [body for model in gateway.models.values() for body in model.calls]


def ask(gateway: Gateway, task: str, **body: Any) -> Any:
    """A chat or a completion."""
    given = {"model": "auto", "max_tokens": 20, **body}
    if task == "chat":
        return gateway.client.post(
            "/v1/chat/completions", json={"messages": [USER], **given}
        )
    return gateway.client.post("/v1/completions", json={"prompt": "3 plus", **given})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["large", "auto"])
@pytest.mark.parametrize("task", ["chat", "completion"])
def test_each_parameter_passes_or_is_refused_by_its_name(
    counting: Gateway, task: str, model: str, stream: bool
) -> None:
    """A model gets the value as it was sent; a refusal names the parameter, and no model is asked."""
    for change, refused in CHATS if task == "chat" else COMMON:
        for fake in counting.models.values():
            fake.calls.clear()
        answer = ask(counting, task, model=model, stream=stream, **change)
        if refused is None:
            assert answer.status_code == 200, (change, answer.text)
            (body,) = sent(counting)
            wanted = {k: v for k, v in change.items() if k not in HARMLESS}
            assert {k: body[k] for k in wanted} == wanted
            assert not body.keys() & set(HARMLESS)
        else:
            assert answer.status_code == 400, change
            assert answer.json()["error"]["param"] == refused
            assert "is not supported here; " in answer.json()["error"]["message"]
            assert sent(counting) == []


def test_prompt_logprobs_are_for_whole_answers(counting: Gateway) -> None:
    """As in vLLM."""
    for task in ("chat", "completion"):
        for model in ("large", "auto"):
            assert ask(counting, task, model=model, prompt_logprobs=3).is_success
            answer = ask(counting, task, model=model, prompt_logprobs=3, stream=True)
            assert answer.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", TOKENS)
def test_token_ids_are_for_one_model(
    counting: Gateway, name: str, stream: bool
) -> None:
    """By its name, or as the only one in `router.models`; with several the ids would mean different texts."""
    for task, logprobs in (("chat", True), ("completion", 1)):
        change: dict[str, Any] = {name: [5, 7], "stream": stream}
        if name == "logprob_token_ids":
            change["logprobs"] = logprobs
        assert ask(counting, task, model="large", **change).is_success
        one = {"models": ["small"]}
        answer = ask(counting, task, router=one, **change)
        assert answer.headers["x-router-model"] == "small"
        for wish in ({}, {"models": ["small", "large"]}):
            answer = ask(counting, task, router=wish, **change)
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == name
            assert "belong to the tokenizer of one model" in error["message"]


@pytest.mark.parametrize("asked", [True, False])
def test_usage_in_every_chunk_reaches_the_engine(
    counting: Gateway, asked: bool
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": asked}
    assert ask(counting, "chat", stream=True, stream_options=options).is_success
    assert sent(counting)[0]["stream_options"] == options


# --- room -------------------------------------------------------------------------------------------------------------


def long(tokens: int) -> dict[str, Any]:
    """A chat of about so many tokens."""
    return {"messages": [{"role": "user", "content": "7" * tokens}]}


def test_a_prompt_that_is_cut_fits(counting: Gateway) -> None:
    """Into every model that has room for what is left; without the cut it would fit into none."""
    refused = ask(counting, "chat", **long(600))
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    seen = set()
    for _ in range(12):
        answer = ask(counting, "chat", **long(600), truncate_prompt_tokens=100)
        assert answer.status_code == 200, answer.text
        seen.add(answer.headers["x-router-model"])
    assert seen == {"small", "large"}
    for _ in range(6):
        answer = ask(counting, "chat", **long(600), truncate_prompt_tokens=300)
        assert answer.headers["x-router-model"] == "large"


def test_a_cut_to_what_there_is_room_for_goes_to_the_largest(counting: Gateway) -> None:
    """If the whole prompt fits into none; a short prompt may go to all."""
    for _ in range(6):
        answer = ask(counting, "chat", **long(600), truncate_prompt_tokens=-1)
        assert answer.headers["x-router-model"] == "large"
        answer = ask(counting, "chat", **long(300), truncate_prompt_tokens=-1)
        assert answer.headers["x-router-model"] == "large"
    answer = ask(
        counting, "chat", model="small", **long(600), truncate_prompt_tokens=-1
    )
    assert answer.status_code == 200
    # each of several prompts is cut
    prompts = {"prompt": ["7" * 600, "7" * 600], "truncate_prompt_tokens": 100}
    assert ask(counting, "completion", **prompts).is_success


def test_a_cut_beyond_the_context_is_refused(counting: Gateway) -> None:
    """The engine would refuse it in its own words; the error names the parameter."""
    for model, cut in (("auto", 500), ("small", 250), ("large", 2**31 - 1)):
        answer = ask(counting, "chat", model=model, truncate_prompt_tokens=cut)
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert error["param"] == "truncate_prompt_tokens"
        assert error["code"] == "context_length_exceeded"
    assert sent(counting) == []


async def refuses_cut(_: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
    """An engine whose context is smaller than the cut."""
    said = (
        "truncate_prompt_tokens=240 cannot be greater than max_model_len - max_tokens = 236. "
        "Please request a smaller truncation size."
    )
    error = context_length.from_engine(said, body)
    assert error is not None and error.param == "truncate_prompt_tokens"
    yield b"", ModelReport(error=error)


def test_an_engine_without_room_for_the_cut_is_followed_by_a_larger_one(
    counting: Gateway,
) -> None:
    """It refuses a short prompt, too."""
    counting.models["small"].script = refuses_cut
    for _ in range(12):
        answer = ask(counting, "chat", truncate_prompt_tokens=240)
        assert answer.status_code == 200
        assert answer.headers["x-router-model"] == "large"


def test_the_least_answer_needs_room(counting: Gateway) -> None:
    """`min_tokens` without a limit counts as one, for every model that may answer."""
    body = {"max_tokens": None, "min_tokens": 500, **long(20)}
    answer = ask(counting, "chat", **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "min_tokens"
    assert error["code"] == "context_length_exceeded"
    assert "for the answer (min_tokens)" in error["message"]
    for _ in range(6):
        answer = ask(counting, "chat", **{**body, "min_tokens": 300})
        assert answer.headers["x-router-model"] == "large"


def test_parameters_do_not_make_flaws(counting: Gateway) -> None:
    """An answer that a stop token ends at once is empty on purpose; JSON by structured_outputs must be JSON."""

    async def says(_: str, __: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        yield b'{"choices":[{"message":{"content":""}}]}', ModelReport(7, 1, "stop")

    counting.models["large"].script = says
    flaws = []
    for change in (
        {"stop_token_ids": [5]},
        {"structured_outputs": {"json": {"type": "object"}}},
    ):
        answer = ask(counting, "chat", model="large", **change)
        where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
        eventually(lambda where=where: counting.client.get(where).json().get("outcome"))
        flaws.append(counting.client.get(where).json()["outcome"]["flaw"])
    assert flaws == ["", "empty"]
