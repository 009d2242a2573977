"""Tests of the policy versions in MLflow's registry: pure data, validated when loaded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deployments.errors import UnknownVersionError
from deployments.journal.snapshot import Snapshot
from deployments.tracking.model_registry import MODEL, PolicyRegistry, code_digest
from deployments.tracking.version_files import files_digest, load_policy, save_policy
from policies.thompson.policy import Thompson
from policies.types import Arm


def make_snapshot() -> Snapshot:
    policy = Thompson([Arm("small"), Arm("large")])
    policy.quality.add(0, np.ones(policy.quality.mean.shape[1]), 0.7, 0)
    return Snapshot("thompson", ("small", "large"), 41, 0, policy.state())


def test_a_saved_policy_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    """The state is saved as arrays, without pickle."""
    snapshot = make_snapshot()
    loaded = load_policy(tmp_path, 3, save_policy(snapshot, tmp_path))
    assert (loaded.policy, loaded.arms, loaded.sequence, loaded.version) == (
        "thompson",
        ("small", "large"),
        41,
        3,
    )
    assert all(
        np.array_equal(loaded.state[name], value)
        for name, value in snapshot.state.items()
    )


def test_a_changed_or_pickled_artefact_is_refused(tmp_path: Path) -> None:
    """A changed byte fails the hash; an array of objects is refused even with the right hash."""
    snapshot = make_snapshot()
    digest = save_policy(snapshot, tmp_path)
    with pytest.raises(ValueError, match="not those that were registered"):
        load_policy(tmp_path, 3, "0" * 64)
    np.savez(tmp_path / "posterior.npz", evil=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="not those that were registered"):
        load_policy(tmp_path, 3, digest)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_policy(tmp_path, 3, files_digest(tmp_path))


def test_a_state_that_does_not_fit_the_policy_is_refused(tmp_path: Path) -> None:
    """The hash is right, but a number is not finite, a matrix is not symmetric, or arms or names are wrong."""
    good = make_snapshot()
    crooked = good.state["quality.precision"].copy()
    crooked[0, 0, 1] = 3.0
    endless = {**good.state, "profile.anything": np.array([np.inf])}
    for bad, why in (
        (
            replace(good, state={**good.state, "quality.precision": crooked}),
            "policy version 3: .*not symmetric",
        ),
        (
            replace(good, state=endless),
            "'profile.anything' holds numbers that are not finite",
        ),
        (replace(good, arms=("small", "large", "huge")), "must have shape"),
        (replace(good, arms=("small", "small")), "an arm is named twice"),
        (replace(good, policy="oracle"), "unknown policy 'oracle'"),
        (replace(good, options={"explore": 1}), "does not take these options"),
    ):
        with pytest.raises(ValueError, match=why):
            load_policy(tmp_path, 3, save_policy(bad, tmp_path))


def test_a_version_of_an_earlier_release_can_be_loaded(tmp_path: Path) -> None:
    """Its policy.json has fewer fields."""
    snapshot = make_snapshot()
    save_policy(snapshot, tmp_path)
    head = {"policy": "thompson", "arms": ["small", "large"], "sequence": 41}
    (tmp_path / "policy.json").write_text(json.dumps(head))
    loaded = load_policy(tmp_path, 3, files_digest(tmp_path))
    assert (loaded.sequence, loaded.row, loaded.journal, loaded.options) == (
        41,
        0,
        "",
        {},
    )


def test_versions_are_registered_with_their_lineage(mlflow_uri: str) -> None:
    """Each version has tags for parent, code and data; `latest` is the champion or the newest (real MLflow store)."""
    registry = PolicyRegistry(mlflow_uri, "test")
    assert registry.latest() == 0 and registry.aliases() == {} and registry.list() == []
    run = registry.start_run("a run", {"kind": "test"})
    registry.log(run, {"reward": 0.5}, step=3)
    snapshot = replace(
        make_snapshot(), row=120, journal="ab12", options={"exploration": 0.3}
    )
    assert registry.publish(snapshot, run) == 1
    assert (
        registry.publish(replace(snapshot, version=1, row=240), run, {"by": "anna"})
        == 2
    )
    assert registry.publish(replace(snapshot, version=2, row=360), run) == 3
    newest = registry.load(registry.latest())
    assert newest is not None and (newest.version, newest.row, newest.options) == (
        3,
        360,
        {"exploration": 0.3},
    )
    assert np.array_equal(
        newest.state["quality.moment"], snapshot.state["quality.moment"]
    )
    tags = registry.show(2)["tags"]
    assert (tags["parent"], tags["by"], tags["code"]) == ("1", "anna", code_digest())
    assert tags["data"] == "journal ab12, rows 1 to 240" and json.loads(
        tags["options"]
    ) == {"exploration": 0.3}
    assert [registry.ancestor(3, row) for row in (400, 360, 300, 239, 5)] == [
        3,
        3,
        2,
        1,
        1,
    ]
    registry.client.delete_model_version(MODEL, "2")  # an operator deletes a version
    assert [registry.ancestor(3, row) for row in (400, 300, 5)] == [3, 3, 3]
    assert registry.client.get_run(run).data.metrics["reward"] == 0.5
    with pytest.raises(UnknownVersionError, match="there is no version 9"):
        registry.load(9)


def test_aliases_follow_and_reports_are_attached(mlflow_uri: str) -> None:
    """The aliases of the three roles are set; other aliases of an operator are not changed."""
    registry = PolicyRegistry(mlflow_uri, "test")
    run = registry.start_run("a run", {})
    for _ in range(3):
        registry.publish(make_snapshot(), run)
    registry.client.set_registered_model_alias(MODEL, "before-friday", "1")
    registry.set_aliases({"champion": 1, "shadow": 3})
    # version 77 does not exist
    registry.set_aliases({"champion": 2, "challenger": 1, "shadow": 77})
    assert registry.aliases() == {"champion": 2, "challenger": 1, "before-friday": 1}
    assert [version["aliases"] for version in registry.list()] == [
        [],
        ["champion"],
        ["before-friday", "challenger"],
    ]
    latest = registry.load(registry.latest())
    assert latest is not None and latest.version == 2
    report = {
        "promote": False,
        "reason": "refused: too early",
        "lower": -0.1,
        "difference": {"value": 0.2},
    }
    registry.attach_report(3, report)
    shown = registry.show(3)
    assert (
        shown["evaluation"] == report
        and shown["tags"]["evaluation.reason"] == "refused: too early"
    )
