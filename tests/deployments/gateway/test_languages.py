"""Texts go to the models that are for their language; nothing is refused for a language."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.model_settings import CapabilitySettings
from policies.constraints import Exclusion
from tests.support.gateway import ROOT, Gateway, eventually

GERMAN = "Erkläre mir bitte, wie eine Wärmepumpe funktioniert."
POLISH = "Wyjaśnij mi proszę, jak działa pompa ciepła w domu."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A model for English, and one for English and German."""
    folder: Path = tmp_path_factory.mktemp("languages")
    size = {"context_tokens": 4096}
    gateway = Gateway(
        folder,
        models={
            "english": size | {"capabilities": {"languages": ["en"]}},
            "both": size | {"capabilities": {"languages": ["en", "de"]}},
        },
        profiler={"embedder": str(ROOT / "assets/embedder")},
    )
    with gateway.client:
        yield gateway


def models_of(gateway: Gateway, text: str, model: str = "auto") -> set[str]:
    """The models that answered a text, sent a few times."""
    messages = [{"role": "user", "content": text}]
    answers = [gateway.chat(messages=messages, model=model) for _ in range(12)]
    assert all(answer.status_code == 200 for answer in answers)
    return {answer.headers["x-router-model"] for answer in answers}


def test_a_text_goes_to_a_model_for_its_language(made: Gateway) -> None:
    """The explanation says why the other one was left out, and has the language."""
    assert models_of(made, GERMAN) == {"both"}
    messages = [{"role": "user", "content": GERMAN}]
    answer = made.chat(messages=messages)
    where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    eventually(lambda: made.client.get(where).json().get("outcome"))
    found = made.client.get(where).json()
    assert found["profile"]["language"] == "de"
    removed = {row["arm"]: row["removed_by"] for row in found["models"]}
    assert Exclusion.of(removed["english"]) is Exclusion.LANGUAGE
    assert not removed["both"]


def test_a_language_refuses_nothing(made: Gateway) -> None:
    """A text in a language that no model is for, one in none, and one for a model that the client names."""
    assert models_of(made, POLISH) == {"english", "both"}
    assert models_of(made, "2 + 2") == {"english", "both"}
    assert models_of(made, GERMAN, "english") == {"english"}


def test_an_unknown_language_is_refused_in_the_settings() -> None:
    """With those that the profiler tells apart."""
    with pytest.raises(ValidationError, match="tells apart: ar, de, en"):
        CapabilitySettings(languages=("sv",))
