"""The page of parameters has all capabilities, all parameters of vLLM, and a reason for each that is refused."""

from deployments.model_settings import CapabilitySettings
from deployments.parameters.vllm import (
    EngineChatParameters,
    RefusedChatParameters,
    RefusedCompletionParameters,
)
from docs.reference.parameters_table import (
    capabilities_page,
    parameters_page,
    refused_page,
)
from policies.capabilities import Capability
from tests.support.documents import ROOT


def test_all_capabilities_can_be_declared() -> None:
    """Each is a setting with the same name, and in the table; languages are declared beside them."""
    page = capabilities_page()
    declared = {name.value for name in Capability} | {"languages"}
    assert declared == set(CapabilitySettings.model_fields)
    assert all(f"| `{name}` |" in page for name in declared)
    assert page.count("\n") == len(declared) + 2


def test_all_parameters_are_in_the_tables() -> None:
    """With their bounds, or with the reason why they are refused."""
    page = parameters_page()
    for name in EngineChatParameters.model_fields:
        assert f"| `{name}` |" in page
    assert (
        "| `prompt_logprobs` | chats, completions | whole number, at least 0, at most 20 |"
        in page
    )
    refused = refused_page()
    for kind in (RefusedChatParameters, RefusedCompletionParameters):
        for name in kind.model_fields:
            assert f"| `{name}` |" in refused
    assert "| `structured_outputs.grammar` |" in refused


def test_the_page_names_every_rule_of_a_parameter() -> None:
    """The rules over several parameters are in the errors that field_error makes, and in the page."""
    page = (ROOT / "docs/parameters.md").read_text()
    for name in (
        "ignore_eos",
        "min_tokens",
        "truncate_prompt_tokens",
        "stop_token_ids",
        "logprob_token_ids",
        "prompt_logprobs",
        "structured_outputs",
        "continue_final_message",
        "chat_template_kwargs",
        "stream_options.continuous_usage_stats",
    ):
        assert f"`{name}`" in page
