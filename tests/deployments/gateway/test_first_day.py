"""The first day on the gateway: from the rule to the policy by operators' commands, and back."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from policies.events import Feedback, Outcome
from policies.types import Objective, Request
from tests.support.commands import data_of, invoke, refusal_of
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile

RULE = {"policy": "always", "options": {"arm": "large"}}
DAY = {"start": "observe", "rule": RULE, "first_scores": 30, "first_rewards": 3}
# `small` is nearly as good at a tenth of the price
SCORES = {"small": 0.75, "large": 0.8}
COSTS = {"small": 2e-5, "large": 2e-4}
OBJECTIVE = Objective(cost_weight=1000.0)


class Operated(Gateway):
    """A gateway that begins with a rule, and the operator's command line."""

    def command(self, line: str, *more: str) -> str:
        result = invoke(self.client, line, *more)
        assert result.exit_code == 0, result.output
        return result.stdout

    def refused(self, line: str) -> str:
        return refusal_of(self.client, line)

    def day(self) -> dict[str, Any]:
        state = self.client.get("/v1/router/state").json()
        day: dict[str, Any] = state["rollout"]["first_day"]
        return day

    def version(self) -> str:
        """The version that decides the next request."""
        version: str = self.chat().headers["x-router-policy-version"]
        return version

    def score(self, answer: Any) -> None:
        body = {
            "decision_id": answer.headers["x-router-decision-id"],
            "score": SCORES[answer.headers["x-router-model"]],
        }
        assert self.client.post("/v1/feedback", json=body).status_code in (200, 202)

    def serve(self, count: int) -> None:
        """Serve requests without HTTP, in batches, each with an outcome and a score."""
        assert self.client.portal is not None
        self.client.portal.call(self._serve, count)

    async def _serve(self, count: int) -> None:
        router = self.router.thing
        for _ in range(count // 20):
            now = time.time()
            requests = [
                Request(router._learner.ids.new_id(now), make_profile(), OBJECTIVE)
                for _ in range(20)
            ]
            made = await router.decide(requests, "test", {})
            finished = [
                (d, Outcome(d.id, "ok", 0.1, 0.3, 20, 20, COSTS[d.arm])) for d in made
            ]
            await router.observe(finished, "test", {})
            await router.feedback(
                [Feedback(d.id, SCORES[d.arm], time_s=now) for d in made]
            )

    def serve_until_passed(self, most: int = 6000) -> int:
        served = 0
        while not self.day()["passed"]:
            assert served < most, self.day()["next_waits_for"]
            self.serve(100)
            served += 100
        return served


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Operated]:
    """A gateway whose ingress may decide on snapshots, as the shipped configuration has it."""
    made = Operated(tmp_path, rollout={**DAY, "first_margin": 0.05})
    with made.client:
        made.tune(snapshot_max_age_s=5.0)
        yield made


def test_the_first_day_from_the_rule_to_the_policy(gateway: Operated) -> None:
    """Clients get the rule's answers until the gate and an operator give the policy 1, 10 and 100 %."""
    answers = [gateway.chat() for _ in range(12)]
    assert {a.headers["x-router-model"] for a in answers} == {"large"}
    assert {a.headers["x-router-policy-version"] for a in answers} == {"always-v0"}
    assert {a.headers["x-router-fallback"] for a in answers} == {"none"}
    for answer in answers:
        gateway.score(answer)
    eventually(lambda: gateway.day()["scored"] == {"large": 12})
    assert gateway.day()["requests"] == 12 and gateway.day()["stage"] == "observe"
    assert gateway.day()["measured"] is None
    assert gateway.day()["expected"]["basis"] == "estimates of the policy itself"

    decision_id = answers[0].headers["x-router-decision-id"]
    explained = gateway.client.get(f"/v1/router/decisions/{decision_id}").json()
    first_day = explained["first_day"]
    assert first_day["rule"] == "large" and first_day["decided_by"] == "rule"
    assert first_day["policy"] in ("small", "large")
    assert first_day["expected_of_policy"]["score"] > 0
    assert len(first_day["models"]) == 3

    assert "refused: the stage of 1 % waits for 18 more" in gateway.refused(
        "first-day advance"
    )
    status = gateway.command("first-day status")
    assert "stage: observe (rule: always, policy: thompson)" in status
    assert "next stage, 1 %, waits for: 18 more answers" in status

    gateway.serve_until_passed()
    for stage, loss in (("1 %", 0.5), ("10 %", 0.05)):
        assert f"stage: {stage}" in gateway.command("first-day advance")
        assert "refused: " in gateway.refused("first-day advance")
        served = gateway.serve_until_passed()
        measured = gateway.day()["measured"]
        print(f"{stage}: {served} requests, {measured}")
        assert measured["rewards"] >= 3 and measured["lower"] > -loss
        assert "measured change of utility per request" in gateway.command(
            "first-day status"
        )
    assert "stage: 100 %" in gateway.command("first-day advance")
    roles = gateway.client.get("/v1/router/state").json()["rollout"]["roles"]
    assert roles["champion"]["policy"] == "thompson"
    assert roles["champion"]["share"] == 0.8
    assert "ends by itself" in gateway.refused("first-day advance")
    gateway.command(
        "versions rollback --role challenger --reason", "it has been enough"
    )
    assert gateway.day()["stage"] == "done"
    gateway.serve(400)
    models = gateway.client.get("/v1/router/state").json()["models"]
    assert models["small"]["share"] > 0.5

    # back to the rule, which has no role any more
    gateway.command("versions rollback --reason", "it is Friday")
    # once the ingress's snapshot is a new one
    eventually(lambda: gateway.version() == "always-v0")
    assert {gateway.version() for _ in range(5)} == {"always-v0"}
    assert (
        gateway.day()["held"] == "rolled back from done: by an operator: it is Friday"
    )
    assert "no stage begins by itself: rolled back" in gateway.command(
        "first-day status"
    )


def test_an_operator_may_begin_a_stage_without_proof(gateway: Operated) -> None:
    """With a reason, which the history keeps; a rollback returns to the rule at once."""
    gateway.command("first-day advance --override-gate --reason", "a drill")
    state = gateway.client.get("/v1/router/rollout").json()
    assert state["first_day"]["stage"] == "1 %"
    assert "overriding the gate: a drill" in state["history"][-1]["reason"]
    assert state["roles"]["challenger"]["share"] == 0.01
    rolled_back = data_of(gateway.client, "versions rollback --reason over")
    assert rolled_back["first_day"]["stage"] == "observe"
    assert rolled_back["roles"].keys() == {"champion", "shadow"}
    assert invoke(gateway.client, "first-day advance --override-gate").exit_code == 2


def test_the_rule_decides_while_the_router_is_away(gateway: Operated) -> None:
    """The ingress's snapshot has the rule, so no client gets a model that only the policy would choose."""
    gateway.router.broken = True
    answers = [gateway.chat() for _ in range(5)]
    gateway.router.broken = False
    assert {a.headers["x-router-model"] for a in answers} == {"large"}
    assert {a.headers["x-router-fallback"] for a in answers} == {"router"}
    eventually(lambda: gateway.client.get("/v1/router/state").json()["decisions"] == 5)
    assert gateway.day()["requests"] == 0


def test_without_a_first_day_there_is_no_stage_to_begin(tmp_path: Path) -> None:
    """The state and the explanations are as they were, and `advance` says how a first day begins."""
    made = Operated(tmp_path)
    with made.client:
        answer = made.chat()
        decision_id = answer.headers["x-router-decision-id"]
        explained = made.client.get(f"/v1/router/decisions/{decision_id}").json()
        assert "first_day" not in explained
        state = made.client.get("/v1/router/state").json()
        assert "first_day" not in state["rollout"]
        assert "start: observe" in made.refused("first-day advance")
        assert "champion" in made.command("first-day status")
