"""A judge in the background: what it is asked, what its grade becomes, and what it never does."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.identity import sampled
from deployments.judge import grade
from tests.gateway import Gateway, eventually

SECRET = "the answer of fort knox"


class Judging:
    """A large model that grades what it is asked to grade, and answers all else."""

    def __init__(self, reply: str = "8", delay_s: float = 0.0):
        self.reply, self.delay_s, self.asked = reply, delay_s, list[dict[str, Any]]()

    async def script(self, task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        judged = "Grade the answer" in body["messages"][0]["content"]
        if judged:
            self.asked.append(body)
            await asyncio.sleep(self.delay_s)
        report = {"prompt_tokens": 7, "output_tokens": 2, "finish_reason": "stop"}
        content = self.reply if judged else SECRET
        if body.get("stream"):
            yield f"data: {json.dumps({'choices': [{'delta': {'content': content}}]})}\n\n".encode(), None
            yield b"data: [DONE]\n\n", report
        else:
            yield json.dumps({"choices": [{"message": {"content": content}}]}).encode(), report


@pytest.fixture
def judging(gateway: Gateway) -> Judging:
    made = Judging()
    for name in ("small", "large"):
        gateway.models[name].script = made.script
    return made


def scores(gateway: Gateway, answer: Any) -> list[dict[str, Any]]:
    told = gateway.client.get(f"/v1/router/decisions/{answer.headers['x-router-decision-id']}").json()
    return list(told.get("feedback", ()))


def test_nobody_judges_unless_somebody_switched_it_on(gateway: Gateway, judging: Judging) -> None:
    """Off by default."""
    gateway.chat()
    time.sleep(0.3)
    assert judging.asked == []


@pytest.mark.parametrize("stream", [False, True])
def test_the_largest_model_grades_and_its_grade_is_feedback(gateway: Gateway, judging: Judging, stream: bool) -> None:
    """It reads question and answer; 8 of 10 arrives as 0.8 of the source `judge`."""
    gateway.tune(judge={"share": 1.0})
    answer = gateway.chat(stream=stream)
    assert SECRET in answer.text
    eventually(lambda: scores(gateway, answer) == [{"source": "judge", "score": 0.8}])
    prompt = judging.asked[0]["messages"][0]["content"]
    assert "What is 3 plus 5?" in prompt and SECRET in prompt


def test_an_answer_that_nobody_listened_to_is_not_judged(gateway: Gateway, judging: Judging) -> None:
    """The judge is switched on in the middle of a stream; of the next one it reads all."""

    async def script(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        async for payload, report in judging.script(task, body):
            if body.get("stream") and report is not None:
                gateway.tune(judge={"share": 1.0})
                yield f"data: {json.dumps({'choices': [{'delta': {'content': '!'}}]})}\n\n".encode(), None
            yield payload, report

    for name in ("small", "large"):
        gateway.models[name].script = script
    gateway.chat(stream=True)
    answer = gateway.chat(stream=True)
    eventually(lambda: scores(gateway, answer))
    assert len(judging.asked) == 1 and SECRET + "!" in judging.asked[0]["messages"][0]["content"]


def test_its_own_calls_are_neither_routed_nor_learned_from_nor_judged(gateway: Gateway, judging: Judging) -> None:
    """Three answers make three decisions and three calls of the judge; what clients forced is not judged."""
    gateway.tune(judge={"share": 1.0})
    answers = [gateway.chat() for _ in range(3)]
    gateway.chat(model="small")
    for answer in answers:
        eventually(lambda answer=answer: scores(gateway, answer))
    time.sleep(0.3)
    assert len(judging.asked) == 3
    counts = gateway.client.get("/v1/router/state").json()["counts"]
    assert counts["routed"] == 3 and counts["forced"] == 1 and counts["feedback"] == 3
    assert not any(gateway.ingress.decider.in_flight.values())
    assert all(line.running == 0 for line in gateway.ingress.dispatcher.admission.lines.values())


def test_a_slow_judge_slows_nobody_and_what_does_not_fit_is_dropped(gateway: Gateway, judging: Judging) -> None:
    """Eight requests are answered while the judge thinks about the first; two more wait for it, the rest is let go."""
    judging.delay_s = 3600.0
    gateway.tune(judge={"share": 1.0, "waiting": 2, "timeout_s": 7200.0})
    gateway.chat()
    eventually(lambda: len(judging.asked) == 1)
    for _ in range(7):
        assert gateway.chat().status_code == 200
    assert len(judging.asked) == 1 and not gateway.ingress.judge._working.done()
    assert len(gateway.ingress.judge._waiting) == 2


def test_a_judges_call_has_a_deadline(gateway: Gateway, judging: Judging) -> None:
    """It goes on after its failures."""
    judging.delay_s = 3600.0
    gateway.tune(judge={"share": 1.0, "timeout_s": 0.1})
    gateway.chat()
    eventually(lambda: len(judging.asked) == 1 and gateway.ingress.judge._working.done())
    judging.delay_s = 0.0
    gateway.tune(judge={"share": 1.0, "timeout_s": 60.0})
    answer = gateway.chat()
    eventually(lambda: scores(gateway, answer))


def test_the_budget_is_kept(gateway: Gateway, judging: Judging) -> None:
    """So many calls an hour, no more."""
    gateway.tune(judge={"share": 1.0, "calls_per_hour": 3})
    for _ in range(8):
        gateway.chat()
    eventually(lambda: len(judging.asked) == 3)
    time.sleep(0.3)
    assert len(judging.asked) == 3


def test_texts_stay_in_memory(
    gateway: Gateway, judging: Judging, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the journal nor the log has a word of question, answer, or grade's reply; failing or not."""
    gateway.tune(judge={"share": 1.0})
    with caplog.at_level(logging.DEBUG):
        answer = gateway.chat()
        eventually(lambda: scores(gateway, answer))
        judging.reply = f"no number, but {SECRET}"
        gateway.chat()
        eventually(lambda: len(judging.asked) == 2 and gateway.ingress.judge._working.done())
    written = b"".join(file.read_bytes() for file in tmp_path.glob("journal.db*"))
    assert SECRET.encode() not in written and b"3 plus 5" not in written
    assert SECRET not in caplog.text and "3 plus 5" not in caplog.text


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """An OpenAI-compatible server of another's."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            calls.append((self.headers["authorization"], body))
            reply = json.dumps({"choices": [{"message": {"content": "Grade: 6/10"}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", calls
    server.shutdown()


def test_any_openai_compatible_endpoint_may_judge(
    gateway: Gateway, judging: Judging, endpoint: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its model and key; our own models are left alone."""
    url, calls = endpoint
    monkeypatch.setenv("JUDGE_KEY", "sk-judge")
    gateway.tune(judge={"share": 1.0, "url": url, "model": "a-judge", "key_env": "JUDGE_KEY"})
    answer = gateway.chat()
    eventually(lambda: scores(gateway, answer) == [{"source": "judge", "score": 0.6}])
    assert calls[0][0] == "Bearer sk-judge" and calls[0][1]["model"] == "a-judge"
    assert judging.asked == []


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("8", 0.8),
        ("10", 1.0),
        ("7.5/10", 0.75),
        ("Grade: 0.", 0.0),
        ("9 out of 10", 0.9),
        ("I say 3, no, 9", None),
        ("12", None),
        ("", None),
    ],
)
def test_a_reply_is_a_grade_or_it_is_none(reply: str, score: float | None) -> None:
    """In doubt there is no score: none is not zero."""
    assert grade(reply) == score


def test_samples_of_decisions_nest() -> None:
    """The same decision is always in or out; a share is a share; judged answers are the traced ones' neighbours."""
    ids = [f"dec-{n}" for n in range(20_000)]
    tenth = {i for i in ids if sampled(i, 0.1)}
    assert tenth == {i for i in ids if sampled(i, 0.1)} and tenth < {i for i in ids if sampled(i, 0.3)}
    assert len(tenth) / len(ids) == pytest.approx(0.1, abs=0.01)
    assert not any(sampled(i, 0.0) for i in ids) and all(sampled(i, 1.0) for i in ids)
