"""Model revisions: a new revision of an arm inherits a discounted part of what was learned about the old one."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.journal.journal import Journal
from deployments.router.learner import Learner
from deployments.router.model_revisions import ModelRevisions, RevisionChange, digest_of
from deployments.router.replay import JournalView, catch_up
from deployments.router.replicas import ReplicaCounter
from policies.capabilities import Capability
from policies.rollout.roles import CHAMPION, SHADOW, Roles
from policies.thompson.policy import Thompson, ThompsonSettings
from policies.types import Arm, Objective, Request
from tests.deployments.router.test_learner import decide, same
from tests.support.requests import make_profile

SMALL = Arm("small")
LARGE = Arm("large", inherit=20.0)
CONFIG = {
    "model_loading_config": {"model_id": "large", "model_source": "hub/large"},
    "engine_kwargs": {"dtype": "f"},
}


def make(url: str, *arms: Arm) -> Learner:
    return Learner(Journal(url), lambda: Thompson(arms or (SMALL, LARGE)))


def posterior(policy: Any, arm: str) -> tuple[float, float]:
    """Posterior mean and variance of the arm's score."""
    thompson = policy.members[CHAMPION] if isinstance(policy, Roles) else policy
    mean, variance = thompson.quality.predict(make_profile("What is 3?").features[None])
    k = [each.name for each in thompson.arms].index(arm)
    return float(mean[0, k]), float(variance[0, k])


def count(policy: Any, arm: str) -> float:
    """Number of scores of an arm, with the weights that they have at the latest scored decision."""
    k = [each.name for each in policy.arms].index(arm)
    state = policy.state()
    latest = float(state["quality.latest"][0] - state["quality.reference"][0])
    forgetting = ThompsonSettings().forgetting
    return float(state["quality.count"][k]) * forgetting**latest


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/journal.db"


def test_the_digest_depends_on_weights_and_engine_arguments() -> None:
    """The digest does not depend on the number of replicas or on log settings."""
    for changed in (
        {"model_loading_config": {"model_id": "large", "model_source": "hub/large-2"}},
        {"engine_kwargs": {"dtype": "f", "quantization": "fp8"}},
        {"lora_config": {"dynamic_lora_loading_path": "s3://there"}},
    ):
        assert digest_of({**CONFIG, **changed}) != digest_of(CONFIG)
    assert digest_of(
        {**CONFIG, "deployment_config": {"num_replicas": 9}, "log_engine_metrics": True}
    ) == digest_of(CONFIG)


def test_a_new_revision_is_discounted(url: str) -> None:
    """A new revision keeps nearly the same mean and gets a larger variance; the other arm does not change."""
    learner = make(url)
    asyncio.run(learner.update_revisions({"small": "s1", "large": "l1"}))
    decide(learner, 400)
    learner.policy.advance(
        learner.sequence, learner.records.scored
    )  # a new event now has the weight one
    (mean, variance), before = (
        posterior(learner.policy, "large"),
        count(learner.policy, "large"),
    )
    other = count(learner.policy, "small")
    asyncio.run(learner.update_revisions({"small": "s1", "large": "l1"}))
    assert count(learner.policy, "large") == before
    asyncio.run(learner.update_revisions({"small": "s1", "large": "l2"}))
    after = posterior(learner.policy, "large")
    assert (
        before > 50
        and count(learner.policy, "large") == pytest.approx(20, abs=0.1)
        and after[1] > 1.5 * variance
    )
    assert abs(after[0] - mean) < 0.1 and count(learner.policy, "small") == other


@pytest.mark.parametrize("saved", [True, False])
def test_a_replay_applies_revision_changes_at_their_rows(url: str, saved: bool) -> None:
    """A replay from a snapshot, from the first row, and of an older version all restore the same state."""
    learner = make(url)
    asyncio.run(learner.update_revisions({"small": "s1", "large": "l1"}))
    decide(learner, 100)
    version = replace(
        learner.snapshot(),
        version=1,
        row=learner.journal.last_row,
        journal=learner.journal.id,
    )
    decide(learner, 100)
    asyncio.run(learner.update_revisions({"large": "l2"}))
    decide(learner, 60)
    if saved:
        asyncio.run(learner.save())
    assert learner.revisions.changes == [RevisionChange(600, "large", 20.0)]
    again = make(url)
    journal = learner.journal
    assert same(learner, again) and again.revisions.state() == learner.revisions.state()
    whole = Learner(JournalView(journal, 0, None), lambda: Thompson((SMALL, LARGE)))  # type: ignore[arg-type]
    assert same(learner, whole)
    caught_up = catch_up(
        journal, version, lambda: Thompson((SMALL, LARGE)), journal.last_row
    ).policy
    whole.policy = caught_up
    assert same(learner, whole)


def test_a_new_arm_starts_from_its_parent(url: str) -> None:
    """A new arm inherits from its parent, even if the parent is removed; without a parent it starts empty."""
    learner = make(url)
    decide(learner, 300)
    learner.policy.advance(learner.sequence, learner.records.scored)
    mean = posterior(learner.policy, "large")[0]
    child = Arm("large-2", parent="large", inherit=30.0)
    asyncio.run(
        learner.replace_policy(lambda: Thompson((SMALL, child, Arm("stranger"))))
    )
    assert (
        count(learner.policy, "large-2") == pytest.approx(30, abs=0.1)
        and count(learner.policy, "stranger") == 0
    )
    assert posterior(learner.policy, "large-2")[0] == pytest.approx(mean, abs=0.1)
    asyncio.run(learner.save())
    again = make(url, SMALL, child, Arm("stranger"))
    assert count(again.policy, "large-2") == pytest.approx(30, abs=0.1) and same(
        learner, again
    )


def test_a_removed_arm_stays_in_the_journal(url: str) -> None:
    """The rows of a removed arm stay, and a replay over the old arms learns from them."""
    learner = make(url)
    decide(learner, 100)
    learned = count(learner.policy, "large")
    asyncio.run(learner.replace_policy(lambda: Thompson((SMALL,))))
    decide(learner, 50)
    whole = Learner(
        JournalView(learner.journal, 0, None), lambda: Thompson((SMALL, LARGE))
    )  # type: ignore[arg-type]
    assert learned > 10 and count(whole.policy, "large") == pytest.approx(
        learned, rel=0.1
    )


def test_a_new_revision_is_discounted_in_every_role(url: str) -> None:
    """Champion and shadow discount a new revision alike."""
    arms = (SMALL, LARGE)
    learner = Learner(
        Journal(url), lambda: Roles({CHAMPION: Thompson(arms), SHADOW: Thompson(arms)})
    )
    asyncio.run(learner.update_revisions({"large": "l1"}))
    decide(learner, 200)
    learner.policy.advance(learner.sequence, learner.records.scored)
    asyncio.run(learner.update_revisions({"large": "l2"}))
    for policy in learner.policy.members.values():  # type: ignore[attr-defined]
        assert count(policy, "large") == pytest.approx(20, abs=0.1)


def test_the_revision_setting_marks_new_weights_at_the_same_source() -> None:
    """A changed `revision` of an arm counts as a new revision even if the digest is the same."""
    revisions = ModelRevisions()
    assert revisions.update([LARGE], {"large": "l1"}, 5) == []
    assert revisions.update([replace(LARGE, revision="2")], {"large": "l1"}, 7) == [
        RevisionChange(7, "large", 20.0)
    ]
    assert (
        revisions.update([LARGE], {}, 9) == []
        and ModelRevisions(revisions.state()).changes == revisions.changes
    )


def test_replica_counter_computes_digests_of_deployed_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve reports the arguments of each application; an application without arguments has no digest."""

    class Client:
        def get_serve_details(self) -> dict[str, Any]:
            replicas = [{"state": "RUNNING"}]
            deployment = {"replicas": replicas, "target_num_replicas": 1}
            app = {"deployments": {"Model:large": deployment}}
            return {
                "applications": {
                    "large": app | {"deployed_app_config": {"args": CONFIG}},
                    "small": app,
                }
            }

    monkeypatch.setattr("ray.serve.context._get_global_client", lambda **_: Client())
    watch = ReplicaCounter()
    assert watch(("small", "large", "gone")) == {"small": 1, "large": 1, "gone": 0}
    assert watch.digests == {"large": digest_of(CONFIG)}


def test_replica_counter_knows_what_models_can_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads the engine arguments that are deployed; of an application without arguments it knows nothing."""
    parsing = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    engines = {"with": parsing, "without": {"max_model_len": 512}}

    class Client:
        def get_serve_details(self) -> dict[str, Any]:
            served = {
                name: {
                    "deployments": {},
                    "deployed_app_config": {"args": {"engine_kwargs": engine}},
                }
                for name, engine in engines.items()
            }
            return {"applications": {**served, "unknown": {"deployments": {}}}}

    monkeypatch.setattr("ray.serve.context._get_global_client", lambda **_: Client())
    watch = ReplicaCounter()
    watch(("with", "without", "unknown", "gone"))
    tools = {
        name: known.get(Capability.TOOLS) for name, known in watch.capabilities.items()
    }
    assert tools == {"with": True, "without": False, "unknown": None}
    engines["without"] = parsing
    watch(("with", "without"))
    assert watch.capabilities["without"][Capability.TOOLS]


def test_replica_counts_survive_a_restart_of_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A restarted controller reports no applications, then RECOVERING replicas; STARTING ones do not count."""
    found: list[dict[str, Any]] = []

    class Client:
        def get_serve_details(self) -> dict[str, Any]:
            return {"applications": found.pop(0)}

    def small(*states: str) -> dict[str, Any]:
        return {
            "small": {
                "deployments": {
                    "Model:small": {
                        "replicas": [{"state": state} for state in states],
                        "target_num_replicas": 1,
                    }
                }
            }
        }

    monkeypatch.setattr("ray.serve.context._get_global_client", lambda **_: Client())
    found += [{}, small("RUNNING"), {}, small("RECOVERING"), small("STARTING")]
    watch = ReplicaCounter()
    assert [watch(["small"]).get("small") for _ in range(5)] == [None, 1, 1, 1, 0]


def test_a_new_revision_is_explored_more(url: str) -> None:
    """The larger variance of a new revision raises the smallest propensity."""
    learner = make(url)
    asyncio.run(learner.update_revisions({"large": "l1"}))
    decide(learner, 300)
    request = Request("r", make_profile("What is 3?"), Objective())
    shares = []
    for digest in ("l1", "l2"):
        asyncio.run(learner.update_revisions({"large": digest}))
        made = learner.policy.decide(
            [request], {}, np.random.default_rng(0), learner.sequence
        )[0]
        shares.append(min(estimate.propensity for estimate in made.estimates))
    assert shares[1] > shares[0]


def test_other_weights_are_a_new_revision_of_all_variants() -> None:
    """Other defaults are one of their variant alone."""
    large = Arm("large")
    direct = Arm("direct", variant_of="large", revision="d1")
    revisions = ModelRevisions()
    assert revisions.update((large, direct), {"large": "l1"}, 0) == []
    changed = revisions.update((large, direct), {"large": "l2"}, 1)
    assert [change.arm for change in changed] == ["large", "direct"]
    direct = replace(direct, revision="d2")
    changed = revisions.update((large, direct), {"large": "l2"}, 2)
    assert [change.arm for change in changed] == ["direct"]
