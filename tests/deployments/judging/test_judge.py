"""The judge in the background: its prompt, its feedback, its limits and its privacy."""

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

from deployments.dispatch.background import ModelFailedError
from deployments.journal.ids import sampled
from deployments.judging.judge import (
    MAX_REPLY,
    Judge,
    after_thinking,
    grade,
    question_of,
)
from deployments.models.report import ModelError, ModelReport
from deployments.settings import JudgeSettings
from policies.events import Decision, Feedback
from policies.types import Objective, Request
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile

SECRET = "the answer of fort knox"


class Judging:
    """A fake large model that grades the judge's prompts, and answers other requests."""

    def __init__(self, reply: str = "8", delay_s: float = 0.0):
        self.reply = reply
        self.delay_s = delay_s
        self.asked = list[dict[str, Any]]()

    async def script(
        self, task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        judged = "Grade the answer" in body["messages"][0]["content"]
        if judged:
            self.asked.append(body)
            await asyncio.sleep(self.delay_s)
        report = ModelReport(7, 2, "stop")
        content = self.reply if judged else SECRET
        if body.get("stream"):
            yield (
                f"data: {json.dumps({'choices': [{'delta': {'content': content}}]})}\n\n".encode(),
                None,
            )
            yield b"data: [DONE]\n\n", report
        else:
            yield (
                json.dumps({"choices": [{"message": {"content": content}}]}).encode(),
                report,
            )


@pytest.fixture
def judging(gateway: Gateway) -> Judging:
    made = Judging()
    for name in ("small", "large"):
        gateway.models[name].script = made.script
    return made


def scores(gateway: Gateway, answer: Any) -> list[dict[str, Any]]:
    decision_id = answer.headers["x-router-decision-id"]
    explained = gateway.client.get(f"/v1/router/decisions/{decision_id}").json()
    return list(explained.get("feedback", ()))


def test_the_judge_is_off_by_default(gateway: Gateway, judging: Judging) -> None:
    """Without settings of the judge no answer is graded."""
    gateway.chat()
    time.sleep(0.3)
    assert judging.asked == []


@pytest.mark.parametrize("stream", [False, True])
def test_the_largest_model_grades_and_its_grade_is_feedback(
    gateway: Gateway, judging: Judging, stream: bool
) -> None:
    """The judge reads question and answer; a grade of 8 becomes a score of 0.8 of the source `judge`."""
    gateway.tune(judge={"sample_rate": 1.0})
    answer = gateway.chat(stream=stream)
    assert SECRET in answer.text
    eventually(lambda: scores(gateway, answer) == [{"source": "judge", "score": 0.8}])
    prompt = judging.asked[0]["messages"][0]["content"]
    assert "What is 3 plus 5?" in prompt and SECRET in prompt


def test_an_answer_whose_text_was_not_kept_is_not_judged(
    gateway: Gateway, judging: Judging
) -> None:
    """The judge is switched on in the middle of a stream; the next stream is judged."""

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        async for payload, report in judging.script(task, body):
            if body.get("stream") and report is not None:
                gateway.tune(judge={"sample_rate": 1.0})
                yield (
                    f"data: {json.dumps({'choices': [{'delta': {'content': '!'}}]})}\n\n".encode(),
                    None,
                )
            yield payload, report

    for name in ("small", "large"):
        gateway.models[name].script = script
    gateway.chat(stream=True)
    answer = gateway.chat(stream=True)
    eventually(lambda: scores(gateway, answer))
    assert (
        len(judging.asked) == 1
        and SECRET + "!" in judging.asked[0]["messages"][0]["content"]
    )


def test_calls_of_the_judge_are_not_routed_learned_or_judged(
    gateway: Gateway, judging: Judging
) -> None:
    """Three answers make three decisions and three calls of the judge; answers of forced models are not judged."""
    gateway.tune(judge={"sample_rate": 1.0})
    answers = [gateway.chat() for _ in range(3)]
    gateway.chat(model="small")
    for answer in answers:
        eventually(lambda answer=answer: scores(gateway, answer))
    time.sleep(0.3)
    assert len(judging.asked) == 3
    counts = gateway.client.get("/v1/router/state").json()["counts"]
    assert counts["routed"] == 3 and counts["forced"] == 1 and counts["feedback"] == 3
    assert not any(gateway.ingress.router_client.in_flight.values())
    assert all(
        line.running == 0
        for line in gateway.ingress.dispatcher.admission.queues.values()
    )


def test_a_slow_judge_delays_no_request_and_drops_what_exceeds_its_queue(
    gateway: Gateway, judging: Judging
) -> None:
    """Eight requests are answered while the judge grades the first; two more are queued, the others are not judged."""
    judging.delay_s = 3600.0
    gateway.tune(judge={"sample_rate": 1.0, "max_queued": 2, "timeout_s": 7200.0})
    gateway.chat()
    eventually(lambda: len(judging.asked) == 1)
    for _ in range(7):
        assert gateway.chat().status_code == 200
    assert len(judging.asked) == 1 and not gateway.ingress.judge._worker.done()
    assert len(gateway.ingress.judge._queue) == 2


def test_a_judges_call_has_a_deadline(gateway: Gateway, judging: Judging) -> None:
    """The judge continues after a failure."""
    judging.delay_s = 3600.0
    gateway.tune(judge={"sample_rate": 1.0, "timeout_s": 0.1})
    gateway.chat()
    eventually(lambda: len(judging.asked) == 1 and gateway.ingress.judge._worker.done())
    judging.delay_s = 0.0
    gateway.tune(judge={"sample_rate": 1.0, "timeout_s": 60.0})
    answer = gateway.chat()
    eventually(lambda: scores(gateway, answer))


def test_the_budget_is_kept(gateway: Gateway, judging: Judging) -> None:
    """The judge makes no more calls an hour than `calls_per_hour`."""
    gateway.tune(judge={"sample_rate": 1.0, "calls_per_hour": 3})
    for _ in range(8):
        gateway.chat()
    eventually(lambda: len(judging.asked) == 3)
    time.sleep(0.3)
    assert len(judging.asked) == 3


def test_the_judge_keeps_texts_in_memory_only(
    gateway: Gateway, judging: Judging, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Journal and log have no word of question, answer or the judge's reply, also after a failure."""
    gateway.tune(judge={"sample_rate": 1.0})
    with caplog.at_level(logging.DEBUG):
        answer = gateway.chat()
        eventually(lambda: scores(gateway, answer))
        judging.reply = f"no number, but {SECRET}"
        gateway.chat()
        eventually(
            lambda: len(judging.asked) == 2 and gateway.ingress.judge._worker.done()
        )
    written = b"".join(file.read_bytes() for file in tmp_path.glob("journal.db*"))
    assert SECRET.encode() not in written and b"3 plus 5" not in written
    assert SECRET not in caplog.text and "3 plus 5" not in caplog.text


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A fake OpenAI-compatible server outside of the gateway."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            calls.append((self.headers["authorization"], body))
            reply = json.dumps(
                {"choices": [{"message": {"content": "Grade: 6/10"}}]}
            ).encode()
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
    gateway: Gateway,
    judging: Judging,
    endpoint: tuple[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The judge uses the endpoint's model and key, and asks none of the gateway's models."""
    url, calls = endpoint
    monkeypatch.setenv("JUDGE_KEY", "sk-judge")
    gateway.tune(
        judge={
            "sample_rate": 1.0,
            "url": url,
            "model": "a-judge",
            "key_env": "JUDGE_KEY",
        }
    )
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
    """An ambiguous reply gives no score, rather than zero."""
    assert grade(reply) == score


def test_samples_of_decisions_nest() -> None:
    """A decision is always in a sample or always out of it, and a larger share contains a smaller one."""
    ids = [f"dec-{n}" for n in range(20_000)]
    tenth = {i for i in ids if sampled(i, 0.1)}
    assert tenth == {i for i in ids if sampled(i, 0.1)} and tenth < {
        i for i in ids if sampled(i, 0.3)
    }
    assert len(tenth) / len(ids) == pytest.approx(0.1, abs=0.01)
    assert not any(sampled(i, 0.0) for i in ids) and all(sampled(i, 1.0) for i in ids)


def test_a_second_attempt_is_sampled_with_its_request() -> None:
    """The sample was known for the request's first decision, so a hedge's answer is judged as that would have been."""

    async def submit(_: list[Feedback]) -> None:
        pass

    async def ask(_: str, __: dict[str, Any]) -> str:
        return ""

    scored = 0
    judge = Judge(ask, "large", submit, lambda: scored)
    judge.configure(JudgeSettings(sample_rate=0.3, first=20))
    profile = make_profile()
    for n in range(200):
        asked = judge.announce(Request(f"dec-{n}", profile, Objective()))
        first = Decision(f"dec-{n}", "small", n, "", profile, Objective())
        hedge = Decision(
            f"dec-{n} hedge", "large", n, "", profile, Objective(), retry_of=first.id
        )
        picked = asked.explore > 0 or scored < 20
        assert judge.picks(first) == judge.picks(hedge) == picked
        assert picked == sampled(first.id, 0.3 if scored >= 20 else 1.0)
        scored += picked
        # What was announced does not change when the share does.
        assert judge.picks(first) == picked


def test_the_first_answers_are_all_judged_and_then_a_share(
    gateway: Gateway, judging: Judging
) -> None:
    """Until `first` decisions have a score every answer is graded; the router's snapshot counts them."""
    gateway.tune(judge={"sample_rate": 1e-9, "first": 3})
    answers = [gateway.chat() for _ in range(3)]
    for answer in answers:
        eventually(lambda answer=answer: scores(gateway, answer))
    eventually(lambda: gateway.ingress.router_client.scored >= 3)
    asked = len(judging.asked)
    gateway.chat()
    time.sleep(0.3)
    assert len(judging.asked) == asked >= 3


@pytest.mark.parametrize(
    ("body", "question"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": ["a", "b"]}, "a"),
        ({"prompt": [1, 2]}, ""),
        ({"prompt": [[1], [2]]}, ""),
        ({"messages": [{"role": "user", "content": "a"}]}, "a"),
    ],
    ids=str,
)
def test_the_question_is_what_the_first_choice_answers(
    body: dict[str, Any], question: str
) -> None:
    """Token ids are no text that a judge could read."""
    assert question_of(body) == question


def test_only_the_beginning_of_a_long_reply_is_read() -> None:
    """A reply of megabytes, as a foreign endpoint may send it, costs no more than a short one."""
    assert grade("7" + " " * MAX_REPLY + "3" * 10**6) == 0.7


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>\n7, or 3?\n</think>\n\n9", "9"),
        ("7, or 3?\n</think>9", "9"),
        ("\n<think>\n7, or", ""),
        ("9", "9"),
        ("a <think> b", "a <think> b"),
    ],
)
def test_thinking_is_no_answer(text: str, rest: str) -> None:
    """An engine without a reasoning parser returns it within the text."""
    assert after_thinking(text).strip() == rest
    assert grade(text) == (0.9 if rest == "9" else None)


def test_the_judge_reads_the_answer_without_its_thinking(
    gateway: Gateway, judging: Judging
) -> None:
    """Neither what comes apart nor what comes in the text; and a judge of this system does not think itself."""
    thought = "I wonder whether the answer is nine"

    async def thinks(_: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        message = {"content": f"<think>{thought}</think>8", "reasoning": thought}
        choices = {"choices": [{"message": message}]}
        yield json.dumps(choices).encode(), ModelReport(7, 2, "stop")

    gateway.models["small"].script = thinks
    gateway.tune(judge={"sample_rate": 1.0})
    gateway.chat(router={"models": ["small"]})
    eventually(lambda: judging.asked)
    (asked,) = judging.asked
    told = asked["messages"][0]["content"]
    assert thought not in told and "<answer>\n8\n</answer>" in told
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("thinks", [True, False])
def test_a_judge_without_a_template_of_variables_is_asked_without_them(
    thinks: bool,
) -> None:
    """One that does not think gets none, and one whose engine refuses them is asked again."""
    asked: list[dict[str, Any]] = []

    async def ask(_: str, body: dict[str, Any]) -> str:
        asked.append(body)
        if "chat_template_kwargs" in body:
            raise ModelFailedError(ModelError("no template", 400))
        return "8"

    async def submit(_: list[Feedback]) -> None:
        pass

    judge = Judge(ask, "large", submit, lambda: 0, lambda name: thinks)
    assert asyncio.run(judge.score("a", "b")) == 0.8
    assert ["chat_template_kwargs" in body for body in asked] == [True] * thinks + [
        False
    ]
