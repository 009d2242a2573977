"""Implicit feedback: only certain defects of an answer give a score."""

import json
from dataclasses import replace
from typing import Any

import pytest

from deployments.gateway.answer_checks import AnswerChecker
from policies.events import Decision, Outcome
from policies.feedback.implicit import implicit_feedback
from policies.types import Objective
from tests.support.requests import make_profile


def score_of(outcome: Outcome, **profile: Any) -> tuple[str, float] | None:
    decision = Decision(
        "d0", "small", 0, "static", replace(make_profile(), **profile), Objective()
    )
    found = implicit_feedback(decision, outcome, 1.0)
    return found and (found.source, found.score)


@pytest.mark.parametrize("status", ["error", "disconnected", "rejected", "ok"])
def test_the_status_of_an_outcome_is_no_score(status: str) -> None:
    """The policy learns an error itself; a disconnected client or a normal answer gives no score."""
    assert score_of(Outcome("d0", status, finish_reason="stop")) is None


def test_an_answer_that_is_wrong_for_certain_is_a_zero() -> None:
    """An empty answer, or one that is not JSON although JSON was requested, scores 0."""
    assert (
        score_of(Outcome("d0", flaw="empty"))
        == score_of(Outcome("d0", flaw="invalid_json"))
        == ("check", 0.0)
    )
    assert score_of(Outcome("d0", "disconnected", flaw="empty")) is None


def test_a_truncated_answer_is_weak_evidence_unless_the_client_limited_it() -> None:
    """It gives a 0 of the source "implicit"; with a limit of the client it gives no score."""
    assert score_of(Outcome("d0", finish_reason="length")) == ("implicit", 0.0)
    assert score_of(Outcome("d0", finish_reason="length"), max_output_tokens=5) is None
    assert score_of(Outcome("d0", finish_reason="length"), task="embed") is None


JSON = {"response_format": {"type": "json_object"}}


def fed(
    body: dict[str, Any], *parts: str, key: str = "content", task: str = "chat"
) -> AnswerChecker:
    """A checker that has read an answer in these parts."""
    checker = AnswerChecker(task, body, keep_text=True)
    for part in parts:
        if body.get("stream"):
            checker.feed(
                f"data: {json.dumps({'choices': [{'index': 0, 'delta': {key: part}}]})}\n\n".encode()
            )
        else:
            checker.feed(
                json.dumps({"choices": [{"index": 0, "message": {key: part}}]}).encode()
            )
    if body.get("stream"):
        checker.feed(b"data: [DONE]\n\n")
    return checker


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
def test_a_checker_finds_the_same_in_one_piece_and_in_many(
    stream: bool, body: dict[str, Any], text: str, reason: str, flaw: str
) -> None:
    """The defect of an answer does not depend on how its bytes are divided."""
    parts = list(text) if stream else [text]
    checker = fed({**body, "stream": stream}, *(parts or [""]))
    assert checker.defect(reason) == flaw and checker.text == text


def test_answers_without_text_are_not_checked() -> None:
    """Calls of tools, embeddings, bytes that cannot be decoded, and a missing answer have no defect."""
    assert fed({}, [{"id": 1}], key="tool_calls").defect("tool_calls") == ""  # type: ignore[arg-type]
    assert fed({}, "", task="embed").defect("") == ""
    for garbage in (b"data: 0\n\n", b"\xff", b"[]", b'{"choices": [5]}'):
        for stream in (False, True):
            checker = AnswerChecker("chat", {"stream": stream})
            checker.feed(garbage)
            assert checker.defect("stop") == "" and checker.text == ""
    assert AnswerChecker("chat", {}).defect("stop") == ""


def test_an_answer_that_is_nested_too_deeply_to_be_read_is_not_checked() -> None:
    """A field that the checker ignores may be nested deeper than the parser reads; so may a field that it needs."""
    deep = b"[" * 100_000 + b"]" * 100_000
    for payload in (
        b'{"choices": [], "x": ' + deep + b"}",
        b'{"choices": [{"index": 0, "message": {"content": ' + deep + b"}}]}",
    ):
        checker = AnswerChecker("chat", {})
        checker.feed(payload)
        assert checker.defect("stop") == ""


def test_a_stream_with_text_is_not_read_to_its_end() -> None:
    """Once a stream is known not to be empty, the checker ignores its further chunks."""
    checker = AnswerChecker("chat", {"stream": True})
    checker.feed(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
    checker.feed(b'data: {"choices": [{"delta": {"content": "b"}}]}\n\n')
    assert checker.defect("stop") == "" and checker.text == "a"
