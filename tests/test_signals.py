"""What an answer says of its own quality: only what is certain, and no news is no score."""

import json
from dataclasses import replace
from typing import Any

import pytest

from deployments.listener import Listener
from policies.signals import implied
from policies.types import Decision, Objective, Outcome
from tests.helpers import make_profile


def score_of(outcome: Outcome, **profile: Any) -> tuple[str, float] | None:
    decision = Decision("d0", "small", 0, "static", replace(make_profile(), **profile), Objective())
    found = implied(decision, outcome, 1.0)
    return found and (found.source, found.score)


@pytest.mark.parametrize("status", ["error", "disconnected", "rejected", "ok"])
def test_how_a_request_ended_is_no_score(status: str) -> None:
    """An error is learned as such; a client that left, or an answer that came well, says nothing of quality."""
    assert score_of(Outcome("d0", status, finish_reason="stop")) is None


def test_an_answer_that_is_wrong_for_certain_is_a_zero() -> None:
    """Empty, or no JSON where JSON was asked for."""
    assert score_of(Outcome("d0", flaw="empty")) == score_of(Outcome("d0", flaw="invalid_json")) == ("check", 0.0)
    assert score_of(Outcome("d0", "disconnected", flaw="empty")) is None


def test_a_cut_off_answer_is_a_weak_sign_unless_the_client_wanted_it() -> None:
    """Its own source; with a limit of the client's, none."""
    assert score_of(Outcome("d0", finish_reason="length")) == ("implicit", 0.0)
    assert score_of(Outcome("d0", finish_reason="length"), max_output_tokens=5) is None
    assert score_of(Outcome("d0", finish_reason="length"), task="embed") is None


JSON = {"response_format": {"type": "json_object"}}


def hear(body: dict[str, Any], *parts: str, key: str = "content", task: str = "chat") -> Listener:
    """A listener that heard an answer in these parts."""
    listener = Listener(task, body, keep=True)
    for part in parts:
        if body.get("stream"):
            listener.hear(f"data: {json.dumps({'choices': [{'index': 0, 'delta': {key: part}}]})}\n\n".encode())
        else:
            listener.hear(json.dumps({"choices": [{"index": 0, "message": {key: part}}]}).encode())
    if body.get("stream"):
        listener.hear(b"data: [DONE]\n\n")
    return listener


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "text", "reason", "flaw"),
    [
        ({}, "yes", "stop", ""),
        ({}, " \n", "stop", "empty"),
        ({}, "", "length", ""),
        ({"stop": ["x"]}, "", "stop", ""),
        (JSON, '{"a": 1}', "stop", ""),
        (JSON, "{'a': 1}", "stop", "invalid_json"),
        (JSON, '{"a": ', "length", "invalid_json"),
        ({**JSON, "max_tokens": 3}, '{"a": ', "length", ""),
        ({"response_format": {"type": "text"}}, "{", "stop", ""),
    ],
)
def test_listening(stream: bool, body: dict[str, Any], text: str, reason: str, flaw: str) -> None:
    """The same in one piece and in many."""
    parts = list(text) if stream else [text]
    listener = hear({**body, "stream": stream}, *(parts or [""]))
    assert listener.flaw(reason) == flaw and listener.text == text


def test_what_is_no_text_is_not_judged() -> None:
    """Calls of tools, embeddings, bytes that nobody understands, and an answer that never came."""
    assert hear({}, [{"id": 1}], key="tool_calls").flaw("tool_calls") == ""  # type: ignore[arg-type]
    assert hear({}, "", task="embed").flaw("") == ""
    for garbage in (b"data: 0\n\n", b"\xff", b"[]", b'{"choices": [5]}'):
        for stream in (False, True):
            listener = Listener("chat", {"stream": stream})
            listener.hear(garbage)
            assert listener.flaw("stop") == "" and listener.text == ""
    assert Listener("chat", {}).flaw("stop") == ""


def test_a_stream_that_speaks_is_not_read_to_its_end() -> None:
    """Once it is known not to be empty, its chunks are passed on unread."""
    listener = Listener("chat", {"stream": True})
    listener.hear(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
    listener.hear(b'data: {"choices": [{"delta": {"content": "b"}}]}\n\n')
    assert listener.flaw("stop") == "" and listener.text == "a"
