"""Tests of operators' work with policy versions: HTTP routes, commands and the gate, with a real MLflow store."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from deployments.errors import ApiError, UnknownVersionError
from deployments.gateway.version_routes import result_of
from deployments.tracking.model_registry import MODEL, PolicyRegistry
from deployments.tracking.promotion import RefusedError
from deployments.tracking.tracker import Tracker
from policies.events import Feedback, Outcome
from policies.types import Objective, Request
from tests.support.commands import data_of, invoke, refusal_of
from tests.support.fakes import Remote
from tests.support.gateway import Gateway
from tests.support.requests import make_profile


class Operated(Gateway):
    """A gateway with a tracker and the operator's command line."""

    def __init__(self, folder: Path, uri: str, **options: Any):
        super().__init__(
            folder, mlflow_uri=uri, experiment="test", publish_interval_s=1e6, **options
        )
        self.tracker = Remote(Tracker(self.settings, self.router, 0.0))
        self.registry = PolicyRegistry(uri, "test")

    def command(self, line: str, *more: str) -> Any:
        """The output of `router versions`, as data."""
        self.ingress.tracker = self.tracker
        return data_of(self.client, f"versions {line}", *more)

    def refused(self, line: str, *more: str) -> str:
        self.ingress.tracker = self.tracker
        return refusal_of(self.client, f"versions {line}", *more)

    def serve(self, count: int) -> None:
        """Serve requests without HTTP; `large` answers them well and `small` does not."""
        assert self.client.portal is not None
        self.client.portal.call(self._serve, count)

    async def _serve(self, count: int) -> None:
        router = self.router.thing
        for _ in range(count // 10):
            now = time.time()
            ids = [router._learner.ids.new_id(now) for _ in range(10)]
            made = await router.decide(
                [Request(i, make_profile(), Objective()) for i in ids], "test", {}
            )
            await router.observe(
                [(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9)) for d in made], "test", {}
            )
            await router.feedback(
                [
                    Feedback(d.id, 0.9 if d.arm == "large" else 0.2, time_s=now)
                    for d in made
                ]
            )
            await asyncio.sleep(0)


@pytest.fixture
def operated(tmp_path: Path, mlflow_uri: str) -> Iterator[Operated]:
    """A gateway with the uniform policy, whose log can evaluate every other policy."""
    made = Operated(tmp_path, mlflow_uri, policy="uniform")
    with made.client:
        yield made


def test_a_version_is_registered_evaluated_promoted_and_rolled_back(
    operated: Operated,
) -> None:
    """The registry shows every step, from the registration to the rollback."""
    operated.serve(200)
    assert operated.command("register")["version"] == 1
    options = json.dumps({"exploration": 0.3})
    assert (
        operated.command("register --policy thompson --options", options)["version"]
        == 2
    )
    assert "refused: " in operated.refused("promote 2")  # there are no decisions since
    operated.serve(600)

    report = operated.command("evaluate 2")
    assert (
        report["promote"] and report["lower"] > 0.2 and report["champion_version"] == 1
    )
    # the version chooses `large`: 0.9 instead of 0.55
    assert report["difference"]["value"] == pytest.approx(0.35, abs=0.06)
    assert operated.command("show 2")["evaluation"] == report

    state = operated.command("promote 2")
    assert state["roles"]["champion"] == {
        "version": 2,
        "policy": "thompson",
        "options": {"exploration": 0.3},
    } | {"share": 0.8}
    # version 3 is the successor of version 1
    assert operated.registry.aliases() == {"champion": 2, "challenger": 3}
    assert operated.registry.show(3)["tags"]["parent"] == "1"
    assert operated.chat().headers["x-router-policy-version"] in (
        "thompson-v2",
        "uniform-v3",
    )
    operated.serve(100)
    assert (
        operated.client.get("/v1/router/state").json()["rollout"]["watch"]["rewards"]
        > 50
    )

    state = operated.command("rollback --reason", "it is Friday")
    assert state["roles"] == {
        "champion": {"version": 3, "policy": "uniform", "options": {}, "share": 1.0}
    }
    assert operated.chat().headers["x-router-policy-version"] == "uniform-v3"
    operated.command("promote 1 --to shadow")
    assert operated.registry.aliases() == {"champion": 3, "shadow": 1}
    assert "it is Friday" in operated.registry.show(2)["tags"]["rolled_back"]
    listed = operated.command("list")["versions"]
    assert [each["version"] for each in listed] == [3, 2, 1]
    assert listed[2]["aliases"] == ["shadow"]


def test_a_worse_challenger_is_refused_unless_the_gate_is_overridden(
    operated: Operated,
) -> None:
    """The refusal states the bound; the version records the override and its reason."""
    operated.command("register")
    operated.command("register --policy always --options", '{"arm": "small"}')
    operated.serve(600)
    why = operated.refused("promote 2")
    assert "all below 0" in why and "override_gate" in why
    assert operated.registry.aliases() == {"champion": 1}
    assert operated.registry.show(2)["tags"]["evaluation.promote"] == "False"
    state = operated.command("promote 2 --override-gate --reason", "a drill")
    assert (
        state["roles"]["champion"]["policy"] == "always"
        and not state["evaluation"]["promote"]
    )
    assert operated.registry.show(2)["tags"]["override_reason"] == "a drill"
    rounds = 0
    while (
        operated.client.get("/v1/router/state").json()["rollout"]["watch"] is not None
        and rounds < 100
    ):
        operated.serve(10)
        rounds += 1
    print(f"rolled back by itself after {10 * rounds} requests")
    assert (
        operated.client.get("/v1/router/state").json()["policy"] == "uniform"
        and rounds < 60
    )


def test_an_earlier_state_of_the_champion_is_not_compared_with_itself(
    operated: Operated,
) -> None:
    """The refusal says so; the two sides of a report would be the same to the last digit."""
    for _ in range(2):
        operated.serve(50)
        operated.command("register")
    assert operated.registry.aliases() == {"champion": 2}
    operated.serve(50)
    for line in ("evaluate 1", "promote 1"):
        why = operated.refused(line)
        assert "version 1 is an earlier state of the champion, version 2" in why
    assert "evaluation.promote" not in operated.registry.show(1)["tags"]


def test_a_challenger_gets_its_share_and_a_shadow_none(operated: Operated) -> None:
    """Neither role needs the gate, because they provide the evidence for it."""
    operated.command("register")
    operated.command("register --policy always --options", '{"arm": "small"}')
    operated.command("register --policy always --options", '{"arm": "large"}')
    operated.command("promote 2 --to challenger --share 0.3")
    operated.command("promote 3 --to shadow")
    operated.serve(500)
    rollout = operated.client.get("/v1/router/state").json()["rollout"]
    assert (
        rollout["shadow"]["choices"] == {"large": 500}
        and 100 < rollout["shadow"]["agreed"] < 250
    )
    records = [
        r.decision for r in operated.router.thing._learner.records._records.values()
    ]
    assert {round(d.estimate("large").propensity, 6) for d in records} == {0.35}
    assert sum(d.policy_version == "always-v2" for d in records) == pytest.approx(
        150, abs=40
    )
    assert operated.command("rollback --role challenger")["roles"].keys() == {
        "champion",
        "shadow",
    }
    difference = operated.command("diff 2 3")
    assert (
        difference["decide_otherwise"] == 1.0
        and difference["shares"][0]["small"] == 1.0
    )


def test_deleted_versions_block_nothing(operated: Operated) -> None:
    """Neither the aliases after a rollback nor a promotion with an overridden gate needs the deleted versions."""
    operated.command("register")
    operated.command("register --policy always --options", '{"arm": "small"}')
    operated.serve(100)
    operated.command("promote 2 --override-gate --reason", "a drill")
    operated.command("rollback --reason", "over")
    operated.registry.client.delete_model_version(MODEL, "2")
    tracker = operated.tracker.thing
    tracker._promotions._tagged.clear()  # as after a restart
    operated.command("register")
    operated.command("register --policy always --options", '{"arm": "large"}')
    number = max(version["version"] for version in operated.registry.list())
    # the version of the champion
    operated.registry.client.delete_model_version(MODEL, str(number - 1))
    assert (
        operated.command(f"promote {number} --override-gate --reason", "x")["roles"][
            "champion"
        ]["version"]
        == number
    )


def test_a_damaged_version_does_not_block_the_tracker(operated: Operated) -> None:
    """The tracker does not offer it to the router; metrics and commands keep working."""
    operated.command("register")
    operated.registry.tag(1, {"sha256": "another"})
    operated.tracker = Remote(Tracker(operated.settings, operated.router, 0.0))
    assert operated.command("list")["versions"][0]["aliases"] == ["champion"]
    assert operated.command("register")["version"] == 2


def test_the_first_day_publishes_the_policy_and_promotes_no_version(
    tmp_path: Path, mlflow_uri: str
) -> None:
    """The registry gets the policy that is tried, with the alias of its role; a version gets no role before the end."""
    rule = {"policy": "always", "options": {"arm": "small"}}
    made = Operated(
        tmp_path,
        mlflow_uri,
        rollout={"start": "observe", "rule": rule, "first_scores": 50},
    )
    with made.client:
        made.serve(100)
        assert made.command("register")["version"] == 1
        assert made.registry.load(1).policy == "thompson"
        assert made.registry.aliases() == {"shadow": 1}
        assert "the first day is not over" in made.refused("promote 1 --to challenger")
        assert "the first day is not over" in made.refused("promote 1")
        assert "`status` compares" in made.refused("evaluate 1")
        assert "`status` compares" in made.refused("diff 1")
        data_of(made.client, "first-day advance --override-gate --reason", "a drill")
        assert made.command("register")["version"] == 2
        assert made.registry.aliases() == {"challenger": 2}
        made.command("rollback --reason", "over")
        made.command("register")
        assert made.registry.aliases() == {"shadow": 3}
        assert "over" in made.registry.show(2)["tags"]["rolled_back"]


def test_two_changes_of_the_aliases_do_not_overlap(operated: Operated) -> None:
    """The tracker's cycle and a command change them at once, and MLflow refuses the second insert of an alias."""
    assert operated.command("register")["version"] == 1
    promotions = operated.tracker.thing._promotions
    registry = promotions._registry
    set_aliases, running, overlaps = registry.set_aliases, [], []

    def slow(aliases: Any) -> None:
        overlaps.extend(running)
        running.append(aliases)
        time.sleep(0.05)
        set_aliases(aliases)
        running.remove(aliases)

    async def both() -> None:
        await asyncio.gather(promotions.sync_aliases(), promotions.sync_aliases())

    registry.set_aliases = slow
    assert operated.client.portal is not None
    operated.client.portal.call(both)
    assert not overlaps and operated.registry.aliases() == {"champion": 1}


def test_a_refused_operation_explains_itself(
    operated: Operated, tmp_path: Path
) -> None:
    """The status is right, too. Without MLflow there are no versions, but rollback still responds."""
    assert "no version of the champion is registered" in operated.refused("evaluate 1")
    operated.command("register")
    assert (
        operated.refused("show 7").strip()
        == "there is no version 7 of router-policy; `list` shows those there are"
    )
    assert operated.client.get("/v1/router/versions/7").status_code == 404
    assert "version 1 is the champion" in operated.refused("promote 1")
    assert "unknown policy 'oracle'" in operated.refused("register --policy oracle")
    assert "no promotion is being watched" in operated.refused("rollback")
    assert (
        operated.client.post(
            "/v1/router/versions/1/promote", json={"to": "chief"}
        ).status_code
        == 400
    )
    bare = Gateway(tmp_path / "bare")
    with bare.client:
        for tracker in (None, Remote(Tracker(bare.settings, bare.router, 0.0))):
            bare.ingress.tracker = tracker
            answer = bare.client.get("/v1/router/versions")
            assert answer.status_code == 409
            assert "set mlflow_uri" in answer.json()["error"]["message"]
        assert (
            bare.client.post("/v1/router/versions/rollback", json={}).json()["error"][
                "code"
            ]
            == "refused"
        )
    for line in ("versions promote 2 --override-gate", "versions evaluate"):
        assert invoke(operated.client, line).exit_code == 2


async def test_an_error_raised_by_an_actor_keeps_its_status_and_message() -> None:
    """Ray wraps an actor's exception with a traceback in its text, which must not reach the client."""
    cases = (
        (UnknownVersionError("no such version"), 404),
        (RefusedError("not yet"), 409),
        (OSError("down"), 503),
    )
    for raised, status in cases:

        async def call(error: Exception = raised) -> None:
            raise RayTaskError(
                "promote", "Traceback of 40 lines", error
            ).as_instanceof_cause()

        with pytest.raises(ApiError) as answer:
            await result_of(call())
        assert answer.value.status == status and "Traceback" not in answer.value.message
        if status != 503:
            assert answer.value.message == str(raised)
