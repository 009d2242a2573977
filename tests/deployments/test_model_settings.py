"""The settings of variants: what they become as arms, their defaults, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.model_settings import ModelSettings, VariantSettings
from deployments.settings import GatewaySettings, explain

THINKS_NOT = {"chat_template_kwargs": {"enable_thinking": False}}


def settings(**models: Any) -> GatewaySettings:
    return GatewaySettings.model_validate({"models": models})


def test_a_variant_is_an_arm_with_the_prices_of_its_model() -> None:
    """It comes after its model, whose context, prices, prior and knowledge it has."""
    large = {
        "context_tokens": 512,
        "output_price_usd_per_million": 3,
        "prior_quality_by_kind": {"code": 0.2},
        "revision": "r1",
        "variants": {
            "large-direct": THINKS_NOT | {"prior_quality_by_kind": {"arithmetic": 0.3}},
            "large-brief": {
                "system_prompt": "Be brief.",
                "prior_quality": 0.4,
                "prior_quality_by_kind": {"writing": 0.1},
            },
        },
    }
    small, own, direct, brief = settings(small={}, large=large).arms()
    names = [arm.name for arm in (small, own, direct, brief)]
    assert names == ["small", "large", "large-direct", "large-brief"]
    assert [arm.application for arm in (own, direct, brief)] == ["large"] * 3
    assert own.variant_of == "" and direct.variant_of == direct.parent == "large"
    for arm in (direct, brief):
        assert arm.context_tokens == 512 and arm.output_price_usd == 3e-6
        assert arm.tasks == ("chat",)
    assert dict(direct.prior_by_kind) == {"code": 0.2, "arithmetic": 0.3}
    assert direct.prior_quality is None and dict(own.prior_by_kind) == {"code": 0.2}
    # what is expected of the model does not count where a variant has a value of its own
    assert brief.prior_quality == 0.4 and dict(brief.prior_by_kind) == {"writing": 0.1}
    # other defaults are a new revision of the variant alone
    large["variants"] = {"large-direct": {"thinking_token_budget": 9}}
    _, again, changed = settings(small={}, large=large).arms()
    assert again == own and changed.revision != direct.revision != own.revision


def test_an_adapter_also_completes_texts() -> None:
    """Nothing of it is for chats alone."""
    _, arm = settings(large={"variants": {"legal": {"adapter": "legal"}}}).arms()
    assert arm.tasks == ("chat", "completion")


@pytest.mark.parametrize(
    ("given", "efforts"),
    [
        (THINKS_NOT, ("none", "minimal")),
        (
            {"chat_template_kwargs": {"thinking": True}},
            ("low", "medium", "high", "xhigh", "max"),
        ),
        ({"reasoning_effort": "low"}, ("low",)),
        ({"thinking_token_budget": 64}, ()),
        ({"thinking_token_budget": 64, "efforts": ["low"]}, ("low",)),
        ({**THINKS_NOT, "efforts": ["none", "low"]}, ("none", "low")),
        ({"adapter": "legal"}, ()),
    ],
    ids=str,
)
def test_the_efforts_of_a_variant(
    given: dict[str, Any], efforts: tuple[str, ...]
) -> None:
    """They are given, or follow from its switch of thinking or its own effort."""
    assert VariantSettings.model_validate(given).served_efforts == efforts


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"large": {"variants": {"large": THINKS_NOT}}}, "has this name, too"),
        (
            {"small": {}, "large": {"variants": {"small": THINKS_NOT}}},
            "models.'small' has this name, too",
        ),
        (
            {
                "small": {"variants": {"direct": THINKS_NOT}},
                "large": {"variants": {"direct": THINKS_NOT}},
            },
            "models.'small'.variants.'direct' has this name, too",
        ),
        ({"large": {"variants": {"auto:x": THINKS_NOT}}}, "the router's own names"),
        ({"large": {"variants": {"a b": THINKS_NOT}}}, "letters and digits"),
        ({"large": {"variants": {"direct": {}}}}, "no default that differs"),
        (
            {"large": {"variants": {"direct": {"efforts": ["none"]}}}},
            "no default that differs",
        ),
        (
            {"e": {"tasks": ["embed"], "variants": {"direct": THINKS_NOT}}},
            "does not do the task 'chat'",
        ),
        (
            {
                "large": {
                    "variants": {"l": {"reasoning_effort": "low", "efforts": ["high"]}}
                }
            },
            "efforts does not have it",
        ),
        (
            {"large": {"variants": {"direct": {"chat_template_kwarg": {}}}}},
            "did you mean 'chat_template_kwargs'?",
        ),
    ],
    ids=str,
)
def test_a_wrong_variant_is_refused(models: dict[str, Any], message: str) -> None:
    """With what to change."""
    with pytest.raises(ValidationError) as refused:
        settings(**models)
    assert message in explain(refused.value)


def test_a_retired_name_is_no_variant() -> None:
    """Nor is a variant's name retired."""
    given = {"models": {"large": {"variants": {"direct": THINKS_NOT}}}}
    with pytest.raises(ValidationError, match="among retired, too"):
        GatewaySettings.model_validate({**given, "retired": ["direct"]})


def test_settings_without_variants_are_as_before() -> None:
    """Journals hold settings of earlier releases."""
    assert ModelSettings().arms("large") == (ModelSettings().arm("large"),)
