"""`router check` compares the variants of a model with the application that serves it."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.operations.config_check import check_config

ROOT = Path(__file__).resolve().parents[3]
THINKS_NOT = {"chat_template_kwargs": {"enable_thinking": False}}
LORA = {"enable_lora": True, "lora_modules": [{"name": "legal", "path": "/legal"}]}


def checked(
    model: str, variant: dict[str, Any], engine: dict[str, Any], **args: Any
) -> list[str]:
    """The problems of the default configuration with one variant of a model, and more engine arguments."""
    config: dict[str, Any] = copy.deepcopy(
        yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    )
    applications = {one["name"]: one for one in config["applications"]}
    applications["gateway"]["args"]["models"][model]["variants"] = {"other": variant}
    if model != "minilm":
        own = applications[model]["args"]
        own |= args
        own["engine_kwargs"] = {**own["engine_kwargs"], **engine}
    return check_config(config)


@pytest.mark.parametrize(
    ("variant", "engine"),
    [
        (THINKS_NOT, {}),
        ({"thinking_token_budget": 64}, {"reasoning_parser": "qwen3"}),
        ({"reasoning_effort": "low"}, {}),
        ({"system_prompt": "Be brief."}, {}),
        ({"adapter": "legal"}, LORA),
        (THINKS_NOT, {"chat_template": "any.jinja"}),
    ],
    ids=str,
)
def test_a_variant_that_its_application_can_serve(
    variant: dict[str, Any], engine: dict[str, Any]
) -> None:
    """It is no problem."""
    assert checked("large", variant, engine) == []


@pytest.mark.parametrize(
    ("variant", "engine", "message"),
    [
        (
            {"chat_template_kwargs": {"enable_thinkin": False}},
            {},
            "chat_template_kwargs.enable_thinkin: the model's chat template does not read it",
        ),
        (
            {"chat_template_kwargs": {"tokenize": False}},
            {},
            "is no variable of a chat template",
        ),
        ({"thinking_token_budget": 64}, {}, "needs `reasoning_parser`"),
        ({"adapter": "legal"}, {}, "serves no adapter 'legal'"),
        ({"adapter": "medical"}, LORA, "serves no adapter 'medical'"),
        ({"adapter": "legal"}, {**LORA, "enable_lora": False}, "enable_lora"),
    ],
    ids=str,
)
def test_a_variant_that_its_application_cannot_serve(
    variant: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    """One line with its path and what to change."""
    (problem,) = checked("large", variant, engine)
    assert "args.models.large.variants.other." in problem and message in problem


def test_another_engine_than_vllm_has_no_variants() -> None:
    """Whose defaults are vLLM's parameters."""
    (problem,) = checked("large", THINKS_NOT, {}, llm_engine="SGLang")
    assert "is for an engine of vLLM" in problem


def test_a_model_without_a_chat_template_takes_no_variables(tmp_path: Path) -> None:
    """Nor does one whose template is among several that do not read them."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "assets/models/nano", folder)
    source = {
        "model_loading_config": {"model_id": "large", "model_source": str(folder)}
    }
    (problem,) = checked("large", THINKS_NOT, {}, **source)
    assert "does not read it" in problem
    (folder / "chat_template.jinja").unlink()
    (problem,) = checked("large", THINKS_NOT, {}, **source)
    assert "the model has no chat template" in problem
    known = json.loads((folder / "tokenizer_config.json").read_text())
    known["chat_template"] = "{% if enable_thinking %}so {% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    assert checked("large", THINKS_NOT, {}, **source) == []
