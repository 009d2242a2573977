"""Pairs on the gateway in this process: a second size answers in the background, and the judge grades both answers."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.access.api_keys import add
from deployments.dispatch.admission import NORMAL
from deployments.journal.ids import sampled
from deployments.judging.pairs import PairResult
from deployments.models.report import ModelReport
from deployments.router.actor import Router
from policies.constraints import Exclusion
from policies.events import ANY_OWNER, PAIR, Decision, Feedback, Outcome
from policies.types import Objective, Request
from tests.support.exposition import record
from tests.support.fakes import failing
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile

PAIRED = {"sample_rate": 0, "first": 0, "pair_rate": 1.0}
SECRET = "the answer of fort knox"


class Answering:
    """Scripts of the two sizes: each answers with its name, and `large` also grades.

    grades: number of answers that were graded.
    texts: by size, what it answers.
    """

    def __init__(self) -> None:
        self.grades = 0
        self.texts: dict[str, str] = {}

    def script(self, name: str) -> Any:
        async def answer(
            task: str, body: dict[str, Any]
        ) -> AsyncIterator[tuple[bytes, Any]]:
            text = self.texts.get(name, f"{SECRET} of {name}")
            if "Grade the answer" in str(body.get("messages")):
                self.grades += 1
                text = "8"
            report = ModelReport(7, 2, "stop")
            if body.get("stream"):
                chunk = {"choices": [{"delta": {"content": text}}]}
                yield f"data: {json.dumps(chunk)}\n\n".encode(), None
                yield b"data: [DONE]\n\n", report
            else:
                choice = {"message": {"content": text}}
                whole = {"choices": [choice if task == "chat" else {"text": text}]}
                yield json.dumps(whole).encode(), report

        return answer


class Paired(Gateway):
    """A gateway with a judge that grades pairs only; `large` answers first if the policy is `always`."""

    def __init__(self, folder: Path, policy: str = "always", **options: Any):
        super().__init__(folder, policy, **options)
        self.answering = Answering()
        for name in ("small", "large"):
            self.models[name].script = self.answering.script(name)

    def begin(self, **judge: Any) -> Counter[str]:
        """Switch the judge on; returns the counts of what became of the requests."""
        results = Counter[str]()
        self.ingress.pairs._count = lambda result: results.update([str(result)])
        self.tune(judge={**PAIRED, **judge})
        return results

    def events(self) -> list[Any]:
        return [event for _, event in self.router.thing._journal.replay()]

    def decisions(self) -> list[Decision]:
        return [event for event in self.events() if isinstance(event, Decision)]

    def scores(self) -> list[Feedback]:
        return [event for event in self.events() if isinstance(event, Feedback)]

    def settle(self, pairs: int) -> None:
        """Wait until the router has both answers of so many pairs, with their scores."""

        def settled() -> bool:
            totals = self.router.thing._arm_stats.totals
            counted = (totals.routed.scores, totals.paired.scores)
            return counted == (pairs, pairs) and not self.router.thing._journal.busy

        eventually(settled)

    def explain(self, decision_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/router/decisions/{decision_id}").json())


@pytest.fixture
def paired(tmp_path: Path) -> Iterator[Paired]:
    made = Paired(tmp_path)
    with made.client:
        yield made


@pytest.fixture
def learning(tmp_path: Path) -> Iterator[Paired]:
    made = Paired(tmp_path, "thompson")
    with made.client:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_size_answers_and_both_answers_are_graded(
    paired: Paired, stream: bool
) -> None:
    """The client gets the first answer. A pair adds two decisions and exactly two scores, which refer to each other."""
    results = paired.begin()
    answer = paired.chat(stream=stream, n=1)
    assert "of large" in answer.text and "of small" not in answer.text
    assert answer.headers["x-router-model"] == "large"
    assert answer.headers["x-router-fallback"] == "none"
    paired.settle(1)
    by_fallback = {decision.fallback: decision for decision in paired.decisions()}
    assert set(by_fallback) == {"", PAIR} and len(paired.decisions()) == 2
    first, second = by_fallback[""], by_fallback[PAIR]
    assert first.id == answer.headers["x-router-decision-id"]
    assert (first.pair, second.pair) == (second.id, first.id)
    assert (first.arm, second.arm) == ("large", "small")
    given = {(s.decision_id, s.source, s.score, s.owner) for s in paired.scores()}
    assert given == {(d.id, "judge", 0.8, ANY_OWNER) for d in (first, second)}
    assert paired.answering.grades == 2
    (asked,) = paired.models["small"].calls
    assert asked["messages"] == [{"role": "user", "content": "What is 3 plus 5?"}]
    assert not {"stream", "stream_options", "n"} & asked.keys()
    outcomes = [e for e in paired.events() if isinstance(e, Outcome)]
    assert {o.decision_id: o.status for o in outcomes} == {
        first.id: "ok",
        second.id: "ok",
    }
    assert results == {"asked": 1, "graded": 1}


def test_a_completion_is_paired(paired: Paired) -> None:
    """Its text is graded, too."""
    results = paired.begin()
    body = {"model": "auto", "prompt": "Once upon a time"}
    assert paired.client.post("/v1/completions", json=body).status_code == 200
    eventually(lambda: results["graded"] == 1)
    assert paired.models["small"].calls[0]["prompt"] == "Once upon a time"


def test_the_first_answer_is_that_of_the_best_estimate(learning: Paired) -> None:
    """Its request explores nothing, and the log says so; the second is drawn as for an answer that will be scored."""
    learning.begin()
    for _ in range(12):
        learning.chat()
    learning.settle(12)
    made = learning.decisions()
    firsts = [d for d in made if d.fallback == ""]
    seconds = [d for d in made if d.fallback == PAIR]
    assert len(firsts) == len(seconds) == 12
    for first in firsts:
        assert (first.score_chance, first.explore) == (0.0, 0.0)
        assert sum(e.propensity for e in first.estimates) == pytest.approx(1, abs=1e-3)
    first_arms = {first.id: first.arm for first in firsts}
    for second in seconds:
        assert (second.score_chance, second.explore) == (1.0, 0.0)
        answered = first_arms[second.pair]
        assert second.arm != answered
        assert sum(e.propensity for e in second.estimates) == pytest.approx(1, abs=1e-3)
        excluded = second.estimate(answered)
        assert excluded.propensity == 0
        assert Exclusion.of(excluded.removed_by) is Exclusion.ANSWERED


def test_the_propensities_of_the_second_answer_are_exact(tmp_path: Path) -> None:
    """Of 3,000 second answers each of three sizes gives its share, within four standard errors."""
    models = {
        name: {"output_price_usd_per_million": price}
        for name, price in (("a", 1), ("b", 2), ("c", 5), ("d", 10))
    }
    made = Paired.__new__(Paired)
    Gateway.__init__(made, tmp_path, models=models)
    with made.client:
        client = made.ingress.router_client
        client._rng = np.random.default_rng(5)
        profile = make_profile("Why is the sky blue?")
        out = ((("d"), Exclusion.ANSWERED.sentence()),)
        request = Request("r", profile, Objective(cost_weight=1000, unavailable=out))
        first = Decision("r", "d", 0, "", profile, request.objective, pair="s")
        drawn = [client.pair_decision(first, request) for _ in range(3000)]
    counts = Counter(decision.arm for decision in drawn)
    for arm in "abc":
        p = np.mean([decision.estimate(arm).propensity for decision in drawn])
        error = 4 * (p * (1 - p) / len(drawn)) ** 0.5
        assert 0.02 < p < 0.98
        assert counts[arm] / len(drawn) == pytest.approx(p, abs=error)
    assert counts["d"] == 0
    assert {d.id for d in drawn} == {"s"} and {d.pair for d in drawn} == {"r"}


def test_a_rule_draws_the_second_size_uniformly(tmp_path: Path) -> None:
    """A rule would always ask the same second size, and teach nothing about the others."""
    models = {name: {} for name in ("a", "b", "c")}
    made = Paired.__new__(Paired)
    Gateway.__init__(made, tmp_path, "always", models=models)
    with made.client:
        profile = make_profile()
        out = (("c", Exclusion.ANSWERED.sentence()),)
        request = Request("r", profile, Objective(unavailable=out))
        first = Decision("r", "c", 0, "", profile, request.objective, pair="s")
        client = made.ingress.router_client
        drawn = [client.pair_decision(first, request) for _ in range(200)]
    for decision in drawn:
        assert [e.propensity for e in decision.estimates] == [0.5, 0.5, 0.0]
    assert {decision.arm for decision in drawn} == {"a", "b"}
    assert {decision.policy_version for decision in drawn} == {"uniform-v0"}


def test_it_teaches_and_the_figures_of_routed_requests_do_not_change(
    learning: Paired,
) -> None:
    """Five pairs are five routed requests; the router learns from ten answers and ten scores."""
    learning.begin()
    for _ in range(5):
        assert "usage" not in learning.chat().json()  # as the fake model answers
    learning.settle(5)
    router = learning.router.thing
    learned = router._policy.state()
    assert learned["quality.count"].sum() == pytest.approx(10, rel=0.01)
    assert learned["availability.window"][:, :, 2].sum() == 10
    state = learning.client.get("/v1/router/state").json()
    counts = state["counts"]
    assert (counts["routed"], counts["pair"], counts["forced"]) == (5, 5, 0)
    assert counts["scores"] == counts["scored"] == 10
    assert state["recent"] == 5 and state["window"]["decisions"] == 5
    assert state["window"]["answers"] == state["window"]["votes"] == 5
    figures = [arm["figures"]["decisions"] for arm in state["models"].values()]
    assert sum(figures) == 5
    totals = router._arm_stats.totals
    assert totals.routed.answers == totals.paired.answers == 5
    assert totals.routed.scores == totals.paired.scores == 5
    first = [d.arm for d in learning.decisions() if d.fallback == ""]
    for arm in ("small", "large"):
        assert state["models"][arm]["share"] == first.count(arm) / 5
    rates = router._projections.scoring_rates._counts
    assert sum(answers for answers, _ in rates.values()) == 5


def test_the_explanations_name_both_answers(paired: Paired) -> None:
    """Each has the other's id, size and score, and says who got which answer."""
    paired.begin()
    answer = paired.chat()
    paired.settle(1)
    first = paired.explain(answer.headers["x-router-decision-id"])
    link = first["pair"]
    second = paired.explain(link["other_decision_id"])
    assert link == {
        "this_answer": "first",
        "other_decision_id": second["decision_id"],
        "other_model": "small",
        "other_score": 0.8,
    }
    assert second["pair"] == {
        "this_answer": "second",
        "other_decision_id": first["decision_id"],
        "other_model": "large",
        "other_score": 0.8,
    }
    assert second["fallback"] == PAIR and first["fallback"] == "none"
    assert "small gave a second answer in the background" in first["summary"]
    assert "No client got this answer" in second["summary"]
    assert "first answer by large" in second["summary"]
    assert "Not considered: large (it gave the first answer)" in second["summary"]


def busy(paired: Paired, arm: str) -> None:
    """Fill half of an arm's slots with requests of clients."""
    queue = paired.ingress.dispatcher.admission.queues[arm]
    queue.running += queue.slots // 2
    paired.ingress.router_client.in_flight[arm] += queue.slots // 2


def test_a_busy_size_is_not_asked(paired: Paired) -> None:
    """The first answer is not graded either: it would teach of the favourite alone."""
    results = paired.begin()
    busy(paired, "small")
    first = paired.chat().headers["x-router-decision-id"]
    eventually(lambda: len(paired.decisions()) == 1)
    assert results == {"busy": 1} and paired.models["small"].calls == []
    assert "so far there is no second answer" in paired.explain(first)["summary"]
    assert paired.explain(first)["pair"]["other_model"] is None
    assert paired.answering.grades == 0 and paired.scores() == []


def test_while_every_size_is_busy_a_request_is_an_ordinary_one(
    learning: Paired,
) -> None:
    """It belongs to the judge's sample as if it had not been picked."""
    results = learning.begin(sample_rate=1.0)
    for arm in ("small", "large"):
        busy(learning, arm)
    learning.chat()
    eventually(lambda: len(learning.scores()) == 1)
    (decision,) = learning.decisions()
    assert (decision.pair, decision.score_chance) == ("", 1.0)
    assert results == {"busy": 1}


def test_two_grades_are_counted_in_the_judges_budget(paired: Paired) -> None:
    """Five calls an hour are enough for two pairs; the third request is not paired."""
    results = paired.begin(calls_per_hour=5)
    for _ in range(4):
        paired.chat()
        eventually(lambda: not paired.ingress.judge._queue)
        eventually(lambda: not paired.ingress.pairs._running)
    eventually(lambda: results["graded"] == 2)
    assert results == {"asked": 2, "graded": 2, "budget": 2}
    assert paired.answering.grades == 4 and len(paired.models["small"].calls) == 2
    assert paired.ingress.judge._reserved == 0


def test_the_grade_of_a_second_answer_is_reserved_until_it_is_there(
    paired: Paired,
) -> None:
    """Meanwhile other answers cannot take it."""
    results = paired.begin(calls_per_hour=3)
    gate = asyncio.Event()
    answer = paired.answering.script("small")

    async def slow(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        await gate.wait()
        async for item in answer(task, body):
            yield item

    paired.models["small"].script = slow
    paired.chat()
    eventually(lambda: paired.answering.grades == 1)
    judge = paired.ingress.judge
    assert judge._reserved == 1 and judge.has_budget(1) and not judge.has_budget(2)
    assert results == {"asked": 1}
    assert paired.client.portal is not None
    paired.client.portal.call(gate.set)
    eventually(lambda: results["graded"] == 1)
    assert judge._reserved == 0 and paired.answering.grades == 2


@pytest.mark.parametrize(
    ("wishes", "result"),
    [
        ({"models": ["large"]}, "no_other_size"),
        ({"max_cost": 2e-4}, "no_other_size"),  # large is expected to cost 5e-4
    ],
)
def test_the_clients_limits_hold_for_the_second_answer(
    learning: Paired, wishes: dict[str, Any], result: str
) -> None:
    """A size that the client did not allow, or that is too expensive, is not asked."""
    results = learning.begin()
    answer = learning.chat(router=wishes)
    arm = answer.headers["x-router-model"]
    eventually(lambda: len(learning.decisions()) == 1)
    assert results == {result: 1} and learning.answering.grades == 0
    calls = {name: len(model.calls) for name, model in learning.models.items()}
    assert calls == {"small": 0, "large": 0, "minilm": 0} | {arm: 1}


@pytest.mark.parametrize(
    "body",
    [
        {"model": "small"},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "object"}},
            }
        },
    ],
)
def test_a_forced_request_and_one_with_a_schema_are_not_paired(
    paired: Paired, body: dict[str, Any]
) -> None:
    """The router did not choose the one, and the other may break a second engine, too."""
    results = paired.begin()
    paired.chat(**body)
    eventually(lambda: len(paired.decisions()) == 1)
    assert paired.decisions()[0].pair == "" and not results


def test_embeddings_are_not_paired(paired: Paired) -> None:
    """Embeddings of two models cannot be compared."""
    results = paired.begin()
    asked = paired.ingress.pairs.announce(
        Request("r", make_profile(task="embed"), Objective(), forced=True), False
    )
    assert asked.pair == "" and not results


def test_a_request_with_tools_is_paired(paired: Paired) -> None:
    """A model only names a tool; calling it is up to the client."""
    results = paired.begin()
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    paired.chat(tools=[tool])
    eventually(lambda: results["graded"] == 1)


@pytest.mark.parametrize("text", ["", " \n"])
def test_after_a_flawed_first_answer_there_is_no_second(
    paired: Paired, text: str
) -> None:
    """There would be nothing to compare."""
    results = paired.begin()
    paired.answering.texts["large"] = text
    paired.chat()
    eventually(lambda: len(paired.decisions()) == 1)
    assert results == {"no_answer": 1} and paired.models["small"].calls == []


def test_after_a_failover_there_is_no_second_answer(paired: Paired) -> None:
    """Both sizes have been asked already."""
    results = paired.begin()
    paired.models["large"].script = failing(RuntimeError("broken"))
    answer = paired.chat()
    assert answer.headers["x-router-model"] == "small"
    eventually(lambda: len(paired.decisions()) == 2)
    assert results == {"no_answer": 1} and len(paired.models["small"].calls) == 1


@pytest.mark.parametrize("text", [None, ""])
def test_a_second_answer_that_fails_is_a_failure_of_its_size(
    paired: Paired, text: str | None
) -> None:
    """The client notices nothing. The first answer has its grade; the outcome of the second is in the journal."""
    results = paired.begin()
    if text is None:
        paired.models["small"].script = failing(RuntimeError("broken"))
    else:
        paired.answering.texts["small"] = text
    assert paired.chat().status_code == 200
    eventually(lambda: len(paired.decisions()) == 2 and len(paired.scores()) == 1)
    first, second = sorted(paired.decisions(), key=lambda d: d.fallback)
    assert paired.scores()[0].decision_id == first.id
    outcomes = {e.decision_id: e for e in paired.events() if isinstance(e, Outcome)}
    if text is None:
        assert outcomes[second.id].status == "error"
    else:
        assert outcomes[second.id].flaw == "empty"
    assert results == {"asked": 1, "failed": 1}
    assert paired.ingress.judge._reserved == 0


def test_without_a_judge_nothing_happens(paired: Paired) -> None:
    """Nor if the judge is switched off while the first answer is on its way."""
    paired.chat()
    results = paired.begin()
    answer = paired.answering.script("large")

    async def switched_off(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        paired.tune(judge=None)
        async for item in answer(task, body):
            yield item

    paired.models["large"].script = switched_off
    paired.chat()
    eventually(lambda: len(paired.decisions()) == 2)
    assert not results and paired.answering.grades == 0
    assert paired.models["small"].calls == []


def test_the_second_call_is_a_background_call(paired: Paired) -> None:
    """It makes its size busy for no client, and the client does not wait for it."""
    paired.begin()

    async def never(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        await asyncio.Event().wait()
        yield b"", None

    paired.models["small"].script = never
    assert paired.chat().status_code == 200
    eventually(lambda: paired.models["small"].calls)
    queue = paired.ingress.dispatcher.admission.queues["small"]
    assert (queue.running, queue.background) == (1, 1)
    assert not queue.busy and queue.wait_s(NORMAL) == 0


def test_no_text_is_stored_or_logged(
    paired: Paired, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither question nor answers are in the journal or in the log; both decisions have the hash of the prompt."""
    paired.begin()
    with caplog.at_level(logging.DEBUG):
        paired.chat()
        paired.settle(1)
    written = b"".join(file.read_bytes() for file in tmp_path.glob("journal.db*"))
    for text in (SECRET, "3 plus 5"):
        assert text.encode() not in written and text not in caplog.text
    first, second = paired.decisions()
    assert first.prompt_hash == second.prompt_hash != ""
    assert first.prompt == second.prompt == ""


def test_a_client_sees_and_scores_the_first_answer_only(tmp_path: Path) -> None:
    """The second decision is an operator's: the client gets the error of an unknown decision."""
    keys = tmp_path / "keys.json"
    headers = {
        name: {"authorization": f"Bearer {add(keys, name, scopes)}"}
        for name, scopes in (
            ("client", ("infer", "feedback")),
            ("operator", ("operate",)),
        )
    }
    made = Paired(tmp_path, keys={"file": str(keys)})
    with made.client as client:
        made.begin()
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": "What is 3 plus 5?"}],
        }
        answer = client.post(
            "/v1/chat/completions", json=body, headers=headers["client"]
        )
        made.settle(1)
        first = answer.headers["x-router-decision-id"]
        path = "/v1/router/decisions"
        reply = client.get(f"{path}/{first}", headers=headers["client"]).json()
        second = reply["pair"]["other_decision_id"]
        seen = {
            name: client.get(f"{path}/{second}", headers=given).status_code
            for name, given in headers.items()
        }
        assert seen == {"client": 404, "operator": 200}
        score = {"decision_id": second, "score": 0.0}
        refused = client.post("/v1/feedback", json=score, headers=headers["client"])
        assert refused.status_code == 404
        score["decision_id"] = first
        taken = client.post("/v1/feedback", json=score, headers=headers["client"])
        assert taken.status_code == 200
        assert [d.owner for d in made.decisions()] == ["client", ""]


def test_an_ingress_that_shuts_down_cancels_its_second_answers(tmp_path: Path) -> None:
    """The model's call is cancelled, its slot is free, and the router has the outcome of both answers."""
    made = Paired(tmp_path)

    async def never(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        await asyncio.Event().wait()
        yield b"", None

    async def play() -> None:
        async with made.at_once() as client:
            results = made.begin()
            made.models["small"].script = never
            body = {
                "model": "auto",
                "messages": [{"role": "user", "content": "What is 3 plus 5?"}],
            }
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200
            while not made.models["small"].calls:
                await asyncio.sleep(0.01)
            await made.ingress.__del__()
            assert made.models["small"].cancelled == 1
            queue = made.ingress.dispatcher.admission.queues["small"]
            assert (queue.running, queue.background, queue.waiting) == (0, 0, 0)
            assert made.ingress.router_client.in_flight["small"] == 0
            assert not made.ingress.pairs._running
            assert made.ingress.judge._reserved == 0
            assert results == {"asked": 1, "failed": 1}
            records = made.router.thing._learner.records
            first = records.get(answer.headers["x-router-decision-id"])
            second = records.get(first.decision.pair)
            assert first.outcome.status == "ok"
            assert second.outcome.status == "disconnected"

    asyncio.run(play())


def test_a_restart_keeps_second_answers(learning: Paired) -> None:
    """A router that replays the journal has learned the same, and knows which decisions belong together."""
    learning.begin()
    for _ in range(3):
        learning.chat()
    learning.settle(3)
    before = learning.router.thing
    again = Router(learning.settings, lambda _: learning.replicas)
    for name, array in before._policy.state().items():
        assert again._policy.state()[name] == pytest.approx(array), name
    assert again._arm_stats.totals == before._arm_stats.totals
    assert again._arm_stats.totals.paired.scored == 3
    assert again._arm_stats.recent == 3
    for decision in learning.decisions():
        record = again._learner.records.get(decision.id)
        assert record is not None and record.mean_score == 0.8
        other = again._learner.records.get(record.decision.pair)
        assert other is not None and other.decision.pair == decision.id
        assert {record.decision.fallback, other.decision.fallback} == {"", PAIR}


def test_the_ceiling_on_the_cost_counts_second_answers(tmp_path: Path) -> None:
    """The mean cost of a routed request contains the cost of its second answer."""
    made = Paired(tmp_path, max_mean_cost_usd=1.0)
    with made.client:
        made.begin()
        made.chat()
        made.settle(1)
        budget = made.client.get("/v1/router/state").json()["budget"]
    # two tokens of each size, at 10 and 1 USD per million
    assert budget["mean_cost_usd"] == pytest.approx(2e-5 + 2e-6)


def test_the_sample_is_that_of_a_hash_and_not_that_of_the_judge(
    learning: Paired,
) -> None:
    """Two of a hundred requests are picked, as many of those that the judge grades as of the others."""
    learning.begin(pair_rate=0.02, sample_rate=0.05)
    profile = make_profile()
    ids = [f"dec-{n}" for n in range(20_000)]
    announce = learning.ingress.pairs.announce
    picked = {i for i in ids if announce(Request(i, profile, Objective()), False).pair}
    assert picked == {
        i for i in ids if announce(Request(i, profile, Objective()), False).pair
    }
    assert len(picked) / len(ids) == pytest.approx(0.02, abs=0.003)
    graded = {i for i in ids if sampled(i, 0.05)}
    assert len(picked & graded) / len(graded) == pytest.approx(0.02, abs=0.014)


def test_the_metric_counts_what_became_of_the_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pair that was asked and graded, and one request that allows one size only."""
    metrics = record(monkeypatch)
    made = Paired(tmp_path)
    with made.client:
        made.tune(judge=PAIRED)
        made.chat()
        made.chat(router={"models": ["large"]})
        expected = {
            f'ray_router_pairs_total{{result="{result}"}} 1.0'
            for result in ("asked", "graded", "no_other_size")
        }
        eventually(lambda: set(metrics["ray_router_pairs"].lines()) == expected)


def test_the_labels_of_the_metric_are_bounded() -> None:
    """Every result is one of this list."""
    assert {str(result) for result in PairResult} == {
        *("asked", "graded", "failed"),
        *("busy", "budget", "no_other_size", "no_answer"),
    }
