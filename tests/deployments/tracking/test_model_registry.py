"""Tests of the policy versions in MLflow's registry: pure data, validated when loaded."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deployments.errors import UnknownVersionError
from deployments.journal.ids import IdFactory
from deployments.journal.snapshot import Snapshot
from deployments.tracking.descriptions import code_digest
from deployments.tracking.model_registry import MODEL, PolicyRegistry
from deployments.tracking.version_files import (
    MAX_BYTES,
    check_files,
    files_digest,
    load_policy,
    save_policy,
)
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


def bomb(path: Path, members: Mapping[str, bytes], compress: bool) -> None:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def array(shape: tuple[int, ...], content: bytes, kind: str = "<f8") -> bytes:
    """A file of numpy's format that declares this shape."""
    buffer = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + content


@pytest.mark.parametrize(
    ("members", "compress", "why"),
    [
        ({"a.npy": array((2**20,), bytes(2**23))}, True, "is compressed"),
        ({"a.npy": array((2**40,), b"")}, False, "an array of another size"),
        ({"a.npy": array((2,), bytes(24))}, False, "an array of another size"),
        ({"a.npy": array((1,), bytes(8), "|O")}, False, "allow_pickle"),
        ({"a.npy": b"\x93NUMPY\x03\x00"}, False, "another format"),
        ({"../a.npy": array((1,), bytes(8))}, False, "no array"),
        ({"/a.npy": array((1,), bytes(8))}, False, "no array"),
        ({"a.pkl": b"x"}, False, "no array"),
        ({f"{i}.npy": array((1,), bytes(8)) for i in range(1_001)}, False, "too many"),
    ],
)
def test_arrays_are_checked_before_they_are_unpacked(
    tmp_path: Path, members: dict[str, bytes], compress: bool, why: str
) -> None:
    """A file of a megabyte could unpack to gigabytes, or declare them. The hash is right, as an attacker's would be."""
    save_policy(make_snapshot(), tmp_path)
    bomb(tmp_path / "posterior.npz", members, compress)
    with pytest.raises(ValueError, match=f"policy version 3: posterior.npz .*{why}"):
        load_policy(tmp_path, 3, files_digest(tmp_path))


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    save_policy(make_snapshot(), tmp_path)
    (tmp_path / "posterior.npz").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is no archive of arrays"):
        load_policy(tmp_path, 3, files_digest(tmp_path))


@pytest.mark.parametrize("name", MAX_BYTES)
def test_large_and_foreign_files_are_refused_by_their_size(name: str) -> None:
    """Before they are downloaded."""
    check_files(3, dict(MAX_BYTES))
    with pytest.raises(ValueError, match=f"policy version 3: {name} has .* more than"):
        check_files(3, {**MAX_BYTES, name: MAX_BYTES[name] + 1})
    with pytest.raises(ValueError, match=r"a file 'model\.pkl', which no version has"):
        check_files(3, {name: 1, "model.pkl": 1})


def test_a_version_that_this_journal_has_not_signed_is_refused(
    mlflow_uri: str,
) -> None:
    """Write access to MLflow suffices to change the files and their hash, but not the signature."""
    own = IdFactory(b"a" * 32).signature
    registry = PolicyRegistry(mlflow_uri, "test", own)
    run = registry.start_run("a run", {})
    registry.publish(make_snapshot(), run)
    assert registry.load(1).version == 1
    another = PolicyRegistry(mlflow_uri, "test", IdFactory(b"b" * 32).signature)
    another.publish(make_snapshot(), run)
    PolicyRegistry(mlflow_uri, "test").publish(make_snapshot(), run)  # without a tag
    # an attacker's version: other files, their hash, and the signature of version 1
    forged = replace(make_snapshot(), sequence=7)
    tags = {"signature": registry.show(1)["tags"]["signature"]}  # type: ignore[index]
    another.publish(forged, run, tags)
    registry.client.set_model_version_tag(MODEL, "4", "signature", tags["signature"])
    for version in (2, 3, 4):
        with pytest.raises(ValueError, match="was not registered by this journal"):
            registry.load(version)
    trusting = PolicyRegistry(mlflow_uri, "test", own, require_signature=False)
    assert [trusting.load(version).sequence for version in (2, 3, 4)] == [41, 41, 7]


def test_large_files_are_not_downloaded(
    mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow says how large they are."""
    registry = PolicyRegistry(mlflow_uri, "test")
    registry.publish(make_snapshot(), registry.start_run("a run", {}))
    monkeypatch.setitem(MAX_BYTES, "posterior.npz", 100)

    def fail(**_: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fail)
    with pytest.raises(ValueError, match="more than 100"):
        registry.load(1)


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
