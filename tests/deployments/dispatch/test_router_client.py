"""RouterClient: local decisions on a fresh snapshot, fallbacks, and the report of outcomes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numpy.random import default_rng

from deployments.dispatch import outcome_reporter
from deployments.gateway import feedback_routes
from deployments.model_settings import ModelSettings
from deployments.router.learner import Learner
from policies.events import Outcome, Record
from policies.registry import make_policy
from policies.rollout.roles import CHALLENGER, CHAMPION, Roles
from policies.story import story
from policies.types import Arm, Objective, Request
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile, make_request


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    found = Gateway(tmp_path)
    with found.client:
        found.tune(snapshot_max_age_s=1e6)
        yield found


def inside(gateway: Gateway, method: Any, *arguments: Any) -> Any:
    """Result of a method, run in the gateway's event loop, to which its locks belong."""
    portal = gateway.client.portal
    assert portal is not None
    return portal.call(method, *arguments)


def record(gateway: Gateway, decision_id: str) -> Any:
    return gateway.router.thing._learner.records.get(decision_id)


def test_local_decision_reaches_the_router_with_the_outcome(gateway: Gateway) -> None:
    """It is no fallback, and feedback finds the decision."""
    answer = gateway.chat()
    decision_id = answer.headers["x-router-decision-id"]
    assert answer.headers["x-router-fallback"] == "none"
    eventually(lambda: record(gateway, decision_id))
    known = record(gateway, decision_id)
    assert (
        known.decision.arm == answer.headers["x-router-model"]
        and known.outcome.status == "ok"
    )
    assert sum(e.propensity for e in known.decision.estimates) == pytest.approx(1.0)
    score = {"decision_id": decision_id, "score": 1.0}
    assert (
        gateway.client.post("/v1/feedback", json=score).json()["status"] == "accepted"
    )


def test_feedback_that_arrives_before_the_outcome_counts(gateway: Gateway) -> None:
    gateway.router.delay_s = 0.3
    decision_id = gateway.chat().headers["x-router-decision-id"]
    status = gateway.client.post(
        "/v1/feedback", json={"decision_id": decision_id, "score": 1.0}
    ).status_code
    assert status in (200, 202)
    eventually(
        lambda: (
            (known := record(gateway, decision_id)) and known.scores == {"user": 1.0}
        )
    )


@pytest.mark.parametrize(
    ("fallback", "said"),
    [
        ("", "\nsmall was chosen with probability"),
        (
            "profiler",
            "The profiler did not answer in time; the text was read without its embedding.\nSeen",
        ),
        (
            "router",
            "The router did not answer in time; the ingress decided on its last snapshot",
        ),
        ("model", "a second try: the model that was chosen first failed"),
        (
            "hedge",
            "a second try: the model that was chosen first was silent for too long",
        ),
        ("forced", "The client named the model small; the router did not choose."),
    ],
)
def test_explanation_names_the_fallback(
    gateway: Gateway, fallback: str, said: str
) -> None:
    """Each fallback has its own sentence."""
    request = make_request(objective=Objective(models=("small",)))
    decision = gateway.ingress.router_client.decide_locally(request, fallback)
    text = "\n".join(story(Record(decision)))
    assert decision.fallback == fallback and said in text


def test_explanation_names_random_exploration_and_the_version() -> None:
    """With a minimum propensity the chosen arm need not have the largest draw; without one it always has."""
    arms = (Arm("small"), Arm("large"))
    requests = [make_request()] * 200
    for least in (0.0, 0.2):
        champion, challenger = (
            make_policy("thompson", arms, {"least_propensity": least}) for _ in range(2)
        )
        made = Roles({CHAMPION: champion, CHALLENGER: challenger}, 0.5).decide(
            requests, {}, default_rng(0), 0
        )
        beaten = [
            any(e.sampled_utility > d.estimate().sampled_utility for e in d.estimates)
            for d in made
        ]
        assert any(beaten) is (least > 0) and not all(beaten)
        told = ["\n".join(story(Record(decision))) for decision in made]
        assert [": tried by chance (least_propensity)" in text for text in told] == (
            beaten
        )
        assert ["the largest draw." in text for text in told] == [
            not other for other in beaten
        ]
        assert all(f" by {d.policy_version}: " in t for d, t in zip(made, told))
        assert {d.policy_version for d in made} == {"thompson", CHALLENGER}


def test_decision_can_be_explained_when_its_answer_is_there(
    gateway: Gateway,
) -> None:
    decision_id = gateway.chat().headers["x-router-decision-id"]
    explained = gateway.client.get(f"/v1/router/decisions/{decision_id}")
    assert explained.status_code == 200


def test_decision_that_has_not_reached_the_router_gives_a_503(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision is on its way, so the client may ask again."""
    monkeypatch.setattr(feedback_routes, "POLLS", 1)
    answer = gateway.client.get(
        f"/v1/router/decisions/{gateway.ingress.router_client.new_id()}"
    )
    assert answer.status_code == 503 and "retry-after" in answer.headers


def test_router_is_not_asked_while_the_snapshot_is_fresh(gateway: Gateway) -> None:
    gateway.router.broken = True
    assert gateway.chat().headers["x-router-fallback"] == "none"
    gateway.tune(snapshot_max_age_s=0.0)
    assert gateway.chat().headers["x-router-fallback"] == "router"


def test_local_decisions_explore_and_count_like_the_router(gateway: Gateway) -> None:
    ids = [gateway.chat().headers["x-router-decision-id"] for _ in range(12)]
    eventually(lambda: all(record(gateway, decision_id) for decision_id in ids))
    decisions = [record(gateway, decision_id).decision for decision_id in ids]
    assert len({d.arm for d in decisions}) == 2, "without feedback both arms are tried"
    assert sorted({d.sequence for d in decisions}) == [d.sequence for d in decisions], (
        "the sequence must grow"
    )
    summary = inside(gateway, gateway.router.thing.summary)
    assert summary.decisions == 12 and summary.totals.routed.decisions == 12


def test_router_numbers_the_decisions_of_all_ingresses(gateway: Gateway) -> None:
    """Each ingress counts from the same snapshot on. The router counts them all, as forgetting depends on it."""
    memory: Learner = gateway.router.thing._learner

    def report(decisions: list[Any]) -> None:
        inside(
            gateway,
            gateway.router.thing.observe,
            [(d, Outcome(d.id)) for d in decisions],
            "test",
            {},
        )

    ingresses = []
    for _ in range(3):
        router_client = gateway.ingress.router_client
        inside(gateway, router_client._refresh)
        requests = [
            Request(router_client.new_id(), make_profile(), Objective())
            for _ in range(10)
        ]
        ingresses.append(
            [router_client._decide_on_snapshot([request])[0] for request in requests]
        )
    assert [d.sequence for made in ingresses for d in made] == [*range(10)] * 3
    for made in ingresses:
        report(made)
        report(made)
    assert memory.sequence == 30
    assert sorted(r.decision.sequence for r in memory.records._records.values()) == [
        *range(30)
    ]


@pytest.mark.parametrize("policy", ["static", "thompson"])
@pytest.mark.parametrize("here", [0.0, 1e6])
def test_latency_words_of_a_prompt_affect_all_policies(
    tmp_path: Path, policy: str, here: float
) -> None:
    """Otherwise the utility of an answer would depend on the policy that decided."""
    made = Gateway(tmp_path, policy)
    with made.client:
        made.tune(snapshot_max_age_s=here, objective={"latency_weight": 0.1})
        answer = made.chat(
            messages=[{"role": "user", "content": "Quickly, what is 3 plus 5?"}]
        )
        decision_id = answer.headers["x-router-decision-id"]
        eventually(lambda: record(made, decision_id))
        assert record(
            made, decision_id
        ).decision.objective.latency_weight == pytest.approx(0.3)


def test_snapshot_has_the_load_of_the_other_ingresses(gateway: Gateway) -> None:
    router = gateway.router.thing
    inside(gateway, router.observe, [], "one", {"small": 3})
    inside(gateway, router.observe, [], "other", {"small": 4})
    states = inside(gateway, router.snapshot, "one").states
    assert states["small"].in_flight == 4


def test_learner_knows_a_decision_it_has_seen(gateway: Gateway) -> None:
    """Whether it is in memory or only in the journal."""
    decision_id = gateway.chat().headers["x-router-decision-id"]
    eventually(lambda: (known := record(gateway, decision_id)) and known.outcome)
    memory: Learner = gateway.router.thing._learner
    decision = record(gateway, decision_id).decision
    inside(gateway, memory.journal.flush)
    assert memory.unseen([decision]) == []
    memory.records._records.clear()
    assert memory.unseen([decision]) == []
    assert (
        inside(gateway, memory.observe, [(decision, Outcome(decision_id))], 0.0) == []
    )


def test_router_gets_the_expected_waits(gateway: Gateway) -> None:
    """Otherwise a decision of the router would ignore the queue in front of a model."""
    gateway.tune(snapshot_max_age_s=0.0)
    router_client = gateway.ingress.router_client
    router_client.in_flight["large"] += 1
    router_client.wait_s = lambda arm, rank: {"small": 99.0, "large": 7.0}.get(arm, 0.0)
    decision_id = gateway.chat().headers["x-router-decision-id"]
    eventually(lambda: record(gateway, decision_id))
    small, large = (
        record(gateway, decision_id).decision.estimate(arm).latency_s
        for arm in ("small", "large")
    )
    assert large > 7.0 and small < 7.0, "there is no wait where no request is in flight"


def test_every_refresh_reports_the_load(gateway: Gateway) -> None:
    """An ingress that decides locally may have no outcome to report."""
    gateway.ingress.router_client.in_flight["large"] = 5
    inside(gateway, gateway.ingress.router_client._refresh)
    assert (
        inside(gateway, gateway.router.thing.snapshot, "another")
        .states["large"]
        .in_flight
        == 5
    )


def test_ingress_does_not_use_an_arm_added_after_its_start(
    gateway: Gateway,
) -> None:
    """During a redeploy, which replaces the ingresses one by one, the router has the new settings already."""
    gateway.tune(snapshot_max_age_s=0.0)
    huge = ModelSettings(prior_quality=1.0)
    settings = gateway.settings.model_copy(
        update={"models": {**gateway.settings.models, "huge": huge}}
    )
    inside(gateway, gateway.router.thing.configure, settings)
    gateway.replicas["huge"] = 1
    inside(gateway, gateway.router.thing._maintain)
    answers = [gateway.chat() for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-router-model"] for answer in answers} <= {
        "small",
        "large",
    }
    assert "router" in {answer.headers["x-router-fallback"] for answer in answers}


def test_queue_of_unsent_outcomes_is_bounded(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a long outage of the router the oldest outcomes are dropped, and the newest are sent afterwards."""
    monkeypatch.setattr(outcome_reporter, "MAX_UNSENT", 5)
    gateway.router.broken = True
    ids = [gateway.chat().headers["x-router-decision-id"] for _ in range(12)]
    assert len(gateway.ingress.router_client.outcomes.unsent) == 5
    gateway.router.broken = False
    eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    assert [record(gateway, decision_id) is not None for decision_id in ids] == [
        False
    ] * 7 + [True] * 5
