"""Models are exchanged: a successor inherits what was learned, with more doubt; what is removed is still on record."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.app import ReplicaCounter
from deployments.journal import Journal
from deployments.lineage import Lineage, Succession, digest_of
from deployments.memory import Memory
from deployments.seating import Branch, catch_up
from policies.roles import CHAMPION, SHADOW, Roles
from policies.thompson import Thompson
from policies.types import Arm, Objective, Request
from tests.helpers import make_profile
from tests.test_memory import decide, same

SMALL, LARGE = Arm("small"), Arm("large", inherit=20.0)
CONFIG = {"model_loading_config": {"model_id": "large", "model_source": "hub/large"}, "engine_kwargs": {"dtype": "f"}}


def make(url: str, *arms: Arm) -> Memory:
    return Memory(Journal(url), lambda: Thompson(arms or (SMALL, LARGE)))


def belief(policy: Any, arm: str) -> tuple[float, float]:
    """Mean and variance of the arm's expected score."""
    thompson = policy.members[CHAMPION] if isinstance(policy, Roles) else policy
    mean, variance = thompson.quality.predict(make_profile("What is 3?").features[None])
    k = [each.name for each in thompson.arms].index(arm)
    return float(mean[0, k]), float(variance[0, k])


def count(policy: Any, arm: str) -> float:
    k = [each.name for each in policy.arms].index(arm)
    return float(policy.state()["quality.count"][k])


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/journal.db"


def test_other_weights_or_engine_arguments_are_another_digest() -> None:
    """Replicas, prices and log settings are not."""
    for changed in (
        {"model_loading_config": {"model_id": "large", "model_source": "hub/large-2"}},
        {"engine_kwargs": {"dtype": "f", "quantization": "fp8"}},
        {"lora_config": {"dynamic_lora_loading_path": "s3://there"}},
    ):
        assert digest_of({**CONFIG, **changed}) != digest_of(CONFIG)
    assert digest_of({**CONFIG, "deployment_config": {"num_replicas": 9}, "log_engine_metrics": True}) == digest_of(
        CONFIG
    )


def test_a_successor_under_the_same_name_is_believed_less(url: str) -> None:
    """Nearly the same mean, a larger variance; the other arm and later events count as ever."""
    memory = make(url)
    asyncio.run(memory.serve({"small": "s1", "large": "l1"}))
    decide(memory, 400)
    memory.policy.advance(memory.sequence)  # from here on an event of now weighs one
    (mean, variance), before = belief(memory.policy, "large"), count(memory.policy, "large")
    other = count(memory.policy, "small")
    asyncio.run(memory.serve({"small": "s1", "large": "l1"}))
    assert count(memory.policy, "large") == before
    asyncio.run(memory.serve({"small": "s1", "large": "l2"}))
    after = belief(memory.policy, "large")
    assert before > 50 and count(memory.policy, "large") == pytest.approx(20, abs=0.1) and after[1] > 1.5 * variance
    assert abs(after[0] - mean) < 0.1 and count(memory.policy, "small") == other


@pytest.mark.parametrize("saved", [True, False])
def test_whoever_folds_the_journal_again_finds_the_same(url: str, saved: bool) -> None:
    """From the last snapshot or from nothing; and a version from before, that is caught up."""
    memory = make(url)
    asyncio.run(memory.serve({"small": "s1", "large": "l1"}))
    decide(memory, 100)
    version = replace(memory.snapshot(), version=1, row=memory.journal.last_row, journal=memory.journal.id)
    decide(memory, 100)
    asyncio.run(memory.serve({"large": "l2"}))
    decide(memory, 60)
    if saved:
        asyncio.run(memory.save())
    assert memory.lineage.successions == [Succession(600, "large", 20.0)]
    again, journal = make(url), memory.journal
    assert same(memory, again) and again.lineage.state() == memory.lineage.state()
    whole = Memory(Branch(journal, 0, None), lambda: Thompson((SMALL, LARGE)))  # type: ignore[arg-type]
    assert same(memory, whole)
    caught_up = catch_up(journal, version, lambda: Thompson((SMALL, LARGE)), journal.last_row).policy
    whole.policy = caught_up
    assert same(memory, whole)


def test_a_new_arm_starts_from_its_parent(url: str) -> None:
    """Also when the parent goes; without a parent it knows nothing of its own."""
    memory = make(url)
    decide(memory, 300)
    memory.policy.advance(memory.sequence)
    mean = belief(memory.policy, "large")[0]
    child = Arm("large-2", parent="large", inherit=30.0)
    asyncio.run(memory.rebuild(lambda: Thompson((SMALL, child, Arm("stranger")))))
    assert count(memory.policy, "large-2") == pytest.approx(30, abs=0.1) and count(memory.policy, "stranger") == 0
    assert belief(memory.policy, "large-2")[0] == pytest.approx(mean, abs=0.1)
    asyncio.run(memory.save())
    again = make(url, SMALL, child, Arm("stranger"))
    assert count(again.policy, "large-2") == pytest.approx(30, abs=0.1) and same(memory, again)


def test_a_removed_arm_stays_in_the_journal(url: str) -> None:
    """Its rows are there, a fold over the old arms learns from them; the router goes on without."""
    memory = make(url)
    decide(memory, 100)
    learned = count(memory.policy, "large")
    asyncio.run(memory.rebuild(lambda: Thompson((SMALL,))))
    decide(memory, 50)
    whole = Memory(Branch(memory.journal, 0, None), lambda: Thompson((SMALL, LARGE)))  # type: ignore[arg-type]
    assert learned > 10 and count(whole.policy, "large") == pytest.approx(learned, rel=0.1)


def test_every_role_inherits(url: str) -> None:
    """Champion and shadow alike."""
    arms = (SMALL, LARGE)
    memory = Memory(Journal(url), lambda: Roles({CHAMPION: Thompson(arms), SHADOW: Thompson(arms)}))
    asyncio.run(memory.serve({"large": "l1"}))
    decide(memory, 200)
    memory.policy.advance(memory.sequence)
    asyncio.run(memory.serve({"large": "l2"}))
    for policy in memory.policy.members.values():  # type: ignore[attr-defined]
        assert count(policy, "large") == pytest.approx(20, abs=0.1)


def test_a_revision_says_what_the_configuration_does_not() -> None:
    """Other weights at the same place."""
    lineage = Lineage()
    assert lineage.see([LARGE], {"large": "l1"}, 5) == []
    assert lineage.see([replace(LARGE, revision="2")], {"large": "l1"}, 7) == [Succession(7, "large", 20.0)]
    assert lineage.see([LARGE], {}, 9) == [] and Lineage(lineage.state()).successions == lineage.successions


def test_digests_come_from_what_serve_has_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every model in the configuration; an application without one says nothing."""

    class Client:
        def get_serve_details(self) -> dict[str, Any]:
            app = {"deployments": {"Model:large": {"replicas": [{"state": "RUNNING"}]}}}
            return {"applications": {"large": app | {"deployed_app_config": {"args": CONFIG}}, "small": app}}

    monkeypatch.setattr("deployments.app._get_global_client", lambda **_: Client())
    watch = ReplicaCounter()
    assert watch(("small", "large", "gone")) == {"small": 1, "large": 1, "gone": 0}
    assert watch.digests == {"large": digest_of(CONFIG)}


def test_replicas_serve_on_while_the_controller_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first it knows no application, then it finds its replicas again; one that starts does not count."""
    found: list[dict[str, Any]] = []

    class Client:
        def get_serve_details(self) -> dict[str, Any]:
            return {"applications": found.pop(0)}

    def small(*states: str) -> dict[str, Any]:
        return {"small": {"deployments": {"Model:small": {"replicas": [{"state": state} for state in states]}}}}

    monkeypatch.setattr("deployments.app._get_global_client", lambda **_: Client())
    found += [{}, small("RUNNING"), {}, small("RECOVERING"), small("STARTING")]
    watch = ReplicaCounter()
    assert [watch(["small"]).get("small") for _ in range(5)] == [None, 1, 1, 1, 0]


def test_a_request_is_decided_after_a_succession(url: str) -> None:
    """Propensities of the new belief: more doubt, more exploration of the successor."""
    memory = make(url)
    asyncio.run(memory.serve({"large": "l1"}))
    decide(memory, 300)
    request, shares = Request("r", make_profile("What is 3?"), Objective()), []
    for digest in ("l1", "l2"):
        asyncio.run(memory.serve({"large": digest}))
        made = memory.policy.decide([request], {}, np.random.default_rng(0), memory.sequence)[0]
        shares.append(min(estimate.propensity for estimate in made.estimates))
    assert shares[1] > shares[0]
