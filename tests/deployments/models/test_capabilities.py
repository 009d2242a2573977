"""What models can do, from the arguments of their applications and from the settings, and vLLM's refusals."""

from typing import Any

import pytest

from deployments.model_settings import CapabilitySettings
from deployments.models.capabilities import (
    CODE,
    contradictions,
    from_engine,
    lacking,
    of_application,
    without_hints,
)
from policies.capabilities import MEDIA, Capability

PARSES = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


@pytest.mark.parametrize(
    ("engine", "capability", "can"),
    [
        ({}, Capability.TOOLS, False),
        ({"enable_auto_tool_choice": True}, Capability.TOOLS, False),
        ({"tool_call_parser": "hermes"}, Capability.TOOLS, False),
        ({"tool_call_parser": "hermes"}, Capability.FORCED_TOOLS, False),
        (PARSES, Capability.TOOLS, True),
        (PARSES, Capability.FORCED_TOOLS, True),
        (PARSES, Capability.PARALLEL_TOOLS, True),
        ({}, Capability.THINKING, False),
        ({"reasoning_parser": "qwen3"}, Capability.THINKING, True),
        (
            {"structured_outputs_config": {"reasoning_parser": "qwen3"}},
            Capability.THINKING,
            True,
        ),
        ({}, Capability.JSON_SCHEMA, True),
        ({}, Capability.LOGPROBS, True),
        ({"max_logprobs": 0}, Capability.LOGPROBS, False),
        ({}, Capability.IMAGES, None),
        ({"limit_mm_per_prompt": {"image": 4}}, Capability.IMAGES, True),
        ({"limit_mm_per_prompt": {"image": {"count": 2}}}, Capability.IMAGES, True),
        ({"limit_mm_per_prompt": {"image": 0}}, Capability.IMAGES, False),
        ({"limit_mm_per_prompt": {"video": 1}}, Capability.IMAGES, None),
        ({"language_model_only": True}, Capability.IMAGES, False),
        ({}, Capability.VLLM_PARAMETERS, True),
        ({"runner": "pooling"}, Capability.JSON_OBJECT, False),
    ],
    ids=str,
)
def test_capabilities_follow_from_the_engine_arguments(
    engine: dict[str, Any], capability: Capability, can: bool | None
) -> None:
    """None where the arguments do not say."""
    assert of_application({"engine_kwargs": engine}).get(capability) is can


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"model_id": "minilm", "source": "assets/embedder"},
        {
            "engine_kwargs": {},
            "model_loading_config": {"model_source": "openai/gpt-oss-20b"},
        },
    ],
    ids=str,
)
def test_nothing_is_known_of_tools_without_arguments(args: dict[str, Any]) -> None:
    """So that a model which calls tools in a way of its own is asked."""
    assert Capability.TOOLS not in of_application(args)


def test_thinking_of_models_with_a_way_of_their_own() -> None:
    """gpt-oss returns it apart without a parser; Mistral's models need one."""
    for source, thinks in (("openai/gpt-oss-20b", True), ("mistralai/a", False)):
        loading = {"model_source": source}
        args = {"engine_kwargs": {}, "model_loading_config": loading}
        assert of_application(args)[Capability.THINKING] is thinks


def test_another_engine_does_not_take_vllms_parameters() -> None:
    known = of_application({"llm_engine": "SGLang", "engine_kwargs": {}})
    assert known == {Capability.VLLM_PARAMETERS: False}


def test_what_is_declared_counts_more_than_what_follows() -> None:
    """What neither says is assumed, except for images, audio and videos."""
    unknown = lacking(CapabilitySettings(), {})
    assert unknown == MEDIA
    known = of_application({"engine_kwargs": PARSES})
    declared = CapabilitySettings(tools=False, images=True, thinking=True)
    heard = {Capability.AUDIO, Capability.VIDEO}
    assert lacking(declared, known) == {Capability.TOOLS} | heard


def test_contradictions_say_what_to_change() -> None:
    """Only what is declared and cannot be is one; a capability may be switched off."""
    known = of_application({"engine_kwargs": PARSES})
    declared = CapabilitySettings(tools=False, thinking=True, images=True)
    (problem,) = contradictions(declared, known)
    assert problem.startswith("thinking is true, but") and "reasoning_parser" in problem


@pytest.mark.parametrize(
    ("said", "parameter"),
    [
        ('tool_choice="required" requires --tool-call-parser to be set', "tools"),
        ("x is not a multimodal model", "messages"),
        ("At most 0 image(s) may be provided in one prompt.", "messages"),
        ("At most 0 audio(s) may be provided in one prompt.", "messages"),
        ("At most 0 video(s) may be provided in one prompt.", "messages"),
        ("Resolving modality 'audio' requires a multimodal processor", "messages"),
        (
            "thinking_token_budget is set but reasoning_config is not configured.",
            "thinking_token_budget",
        ),
        (
            "Requested sample logprobs of 5, which is greater than max allowed: 0",
            "logprobs",
        ),
    ],
)
def test_vllms_refusals_for_want_of_a_capability(said: str, parameter: str) -> None:
    """Their code lets the next model be asked, and the words are those of this API."""
    error = from_engine(said)
    assert error is not None
    assert (error.status, error.param, error.code) == (400, parameter, CODE)
    assert "--" not in error.message and parameter in error.message


def test_other_refusals_are_no_want_of_a_capability() -> None:
    assert from_engine("At most 4 image(s) may be provided in one prompt.") is None


def test_wishes_are_left_out_where_a_model_cannot_follow_them() -> None:
    """An engine might refuse them; everything else is passed on."""
    body = {"messages": [], "reasoning_effort": "low", "top_k": 5}
    assert without_hints(body, ()) is body
    assert without_hints(body, {"tools"}) is body
    assert without_hints(body, {"thinking"}) == {"messages": [], "top_k": 5}
