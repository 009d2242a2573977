"""Policy versions in MLflow's registry: data only, and checked before they are believed."""

from pathlib import Path

import numpy as np
import pytest

from deployments.journal import Snapshot
from deployments.versions import Registry, load_policy, save_policy
from policies.thompson import Thompson
from policies.types import Arm


def make_snapshot() -> Snapshot:
    policy = Thompson([Arm("small"), Arm("large")])
    policy.quality.add(0, np.ones(policy.quality.mean.shape[1]), 0.7, 0)
    return Snapshot("thompson", ("small", "large"), 41, 0, policy.state())


def test_a_saved_policy_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    """As numbers, without a pickle."""
    snapshot = make_snapshot()
    loaded = load_policy(tmp_path, 3, save_policy(snapshot, tmp_path))
    assert (loaded.policy, loaded.arms, loaded.sequence, loaded.version) == ("thompson", ("small", "large"), 41, 3)
    assert all(np.array_equal(loaded.state[name], value) for name, value in snapshot.state.items())


def test_a_changed_or_pickled_artefact_is_refused(tmp_path: Path) -> None:
    """Another byte fails the hash; an array of objects fails even with the right hash."""
    snapshot = make_snapshot()
    digest = save_policy(snapshot, tmp_path)
    with pytest.raises(ValueError, match="not those that were registered"):
        load_policy(tmp_path, 3, "0" * 64)
    np.savez(tmp_path / "posterior.npz", evil=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="not those that were registered"):
        load_policy(tmp_path, 3, digest)
    from deployments.versions import _digest

    with pytest.raises(ValueError, match="allow_pickle"):
        load_policy(tmp_path, 3, _digest(tmp_path))


def test_versions_are_registered_and_the_newest_comes_back(tmp_path: Path) -> None:
    """Against a real MLflow store on disk."""
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db", "test")
    registry.client.create_experiment("test", artifact_location=str(tmp_path / "art"))
    assert registry.latest() is None
    run = registry.start_run("a run", {"kind": "test"})
    registry.log(run, {"reward": 0.5}, step=3)
    snapshot = make_snapshot()
    assert [registry.publish(snapshot, run) for _ in range(2)] == [1, 2]
    newest = registry.latest()
    assert newest is not None and newest.version == 2
    assert np.array_equal(newest.state["quality.moment"], snapshot.state["quality.moment"])
    assert registry.client.get_run(run).data.metrics["reward"] == 0.5
