"""The files of a policy version: pure data. Their sizes and contents are checked before anything is unpacked.

A version consists of policy.json, posterior.npz and trust.json.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path

import msgspec
import numpy as np

from deployments.journal.snapshot import Snapshot
from policies.evaluation.kind_figures import Totals
from policies.registry import make_policy
from policies.types import Arm

# fields of a Snapshot that policy.json holds
FIELDS = (
    "policy",
    "options",
    "arms",
    "sequence",
    "row",
    "journal",
    "held",
    "scored",
    "scoring",
)
CLOCK = "clock.latest"  # the array with the clock of scores
CONTEXT = "context"  # further field of policy.json, which the router does not read
HEAD = "policy.json"
POSTERIOR = "posterior.npz"
# file with the reputation of every key; versions of early releases have none
REPUTATION = "trust.json"
# Maximum sizes. The arrays of 32 models have 2 MB; the head has up to 10,000 ids of 53 characters.
MAX_BYTES = {HEAD: 2**22, POSTERIOR: 2**28, REPUTATION: 2**26}
MAX_ARRAYS = 1_000
ARRAY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}\.npy")
NUMBERS = "biuf"  # kinds of dtype


def check_files(version: int, sizes: Mapping[str, int]) -> None:
    """Refuse a version that has other files, or larger ones.

    Args:
        version: its number, for the message.
        sizes: in bytes, by name of the file.

    Raises:
        ValueError: the message names the file.
    """
    for name, size in sizes.items():
        if name not in MAX_BYTES:
            raise ValueError(
                f"policy version {version}: it has a file '{name[:100]}', which no version has"
            )
        if size > MAX_BYTES[name]:
            raise ValueError(
                f"policy version {version}: {name} has {size} bytes, more than {MAX_BYTES[name]}"
            )


def _check_arrays(path: Path, version: int) -> None:
    """Refuse a file of arrays that is compressed, or whose arrays are not numbers of the declared shapes.

    A compressed file may unpack to any size, and a header may declare any shape.

    Raises:
        ValueError: the message says what is wrong.
    """
    where = f"policy version {version}: {path.name}"
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ValueError(f"{where} is no archive of arrays") from None
    with archive:
        members = archive.infolist()
        names = {member.filename for member in members}
        if len(members) > MAX_ARRAYS or len(names) < len(members):
            raise ValueError(f"{where} has too many arrays, or two of one name")
        for member in members:
            if not ARRAY_NAME.fullmatch(member.filename):
                raise ValueError(f"{where} has a member that is no array")
            stored = member.compress_type == zipfile.ZIP_STORED
            if not stored or member.file_size != member.compress_size:
                raise ValueError(f"{where} is compressed")
            with archive.open(member) as file:
                if np.lib.format.read_magic(file) != (1, 0):  # type: ignore[no-untyped-call]
                    raise ValueError(f"{where} has an array of another format")
                header = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
                shape, _, dtype = header
                if dtype.kind not in NUMBERS:
                    raise ValueError(f"{where} holds objects; allow_pickle stays off")
                if prod(shape) * dtype.itemsize != member.file_size - file.tell():
                    raise ValueError(f"{where} has an array of another size")


def save_policy(
    snapshot: Snapshot, folder: Path, context: Mapping[str, object] | None = None
) -> str:
    """Write a snapshot as policy.json, posterior.npz and trust.json; returns the SHA-256 of the three.

    Args:
        snapshot: what was learned.
        folder: where the files go.
        context: what else a reader needs to decide with it (deciding_model.py); the router has its own settings.
    """
    head = {key: getattr(snapshot, key) for key in FIELDS}
    if snapshot.totals is not None:
        head["totals"] = msgspec.to_builtins(snapshot.totals)
    if context:
        head[CONTEXT] = dict(context)
    (folder / HEAD).write_text(json.dumps(head, indent=2, sort_keys=True))
    buffer = io.BytesIO()
    np.savez(buffer, **snapshot.state)  # type: ignore[arg-type]
    (folder / POSTERIOR).write_bytes(buffer.getvalue())
    (folder / REPUTATION).write_text(json.dumps(snapshot.trust, separators=(",", ":")))
    return files_digest(folder)


def load_policy(folder: Path, version: int, digest: str) -> Snapshot:
    """Read the files that `save_policy` wrote. No code in them is executed.

    Raises:
        ValueError: the files are not those that were registered, they are too large or hold something else than
            arrays, or the state does not fit the policy.
    """
    files = [folder / name for name in MAX_BYTES]
    sizes = {file.name: file.stat().st_size for file in files if file.exists()}
    check_files(version, sizes)
    if files_digest(folder) != digest:
        raise ValueError(
            f"policy version {version}: its files are not those that were registered"
        )
    head = json.loads((folder / HEAD).read_text())
    _check_arrays(folder / POSTERIOR, version)
    with np.load(folder / POSTERIOR, allow_pickle=False) as arrays:
        state = {name: arrays[name].astype(np.float64) for name in arrays.files}
    reputation = {}
    if (folder / REPUTATION).exists():
        reputation = json.loads((folder / REPUTATION).read_text())
    clock = int(state[CLOCK][0]) if CLOCK in state else 0
    totals = head.get("totals")
    snapshot = Snapshot(
        head["policy"],
        tuple(head["arms"]),
        int(head["sequence"]),
        version,
        state,
        # versions of early releases lack some of these
        held=tuple(head.get("held", ())),
        row=head.get("row", 0),
        journal=head.get("journal", ""),
        options=head.get("options", {}),
        trust=reputation,
        scored=int(head.get("scored", clock)),
        scoring={
            key: (float(answers), float(scores))
            for key, (answers, scores) in head.get("scoring", {}).items()
        },
        totals=None if totals is None else msgspec.convert(totals, Totals),
    )
    try:
        check_snapshot(snapshot)
    except ValueError as error:
        raise ValueError(f"policy version {version}: {error}") from None
    return snapshot


def check_snapshot(snapshot: Snapshot) -> None:
    """Check that a snapshot's policy over its arms can have its state: finite, symmetric, of the right shape.

    Raises:
        ValueError: the state does not fit; the message says what is wrong.
    """
    if len(set(snapshot.arms)) != len(snapshot.arms):
        raise ValueError(f"an arm is named twice in {', '.join(snapshot.arms)}")
    for name, array in snapshot.state.items():
        if not np.isfinite(array).all():
            raise ValueError(f"'{name}' holds numbers that are not finite")
    arms = [Arm(name) for name in snapshot.arms]
    policy = make_policy(snapshot.policy, arms, snapshot.options)
    policy.restore(snapshot.state)


def files_digest(folder: Path) -> str:
    """SHA-256 of the files of a version."""
    files = [folder / HEAD, folder / POSTERIOR]
    if (folder / REPUTATION).exists():
        files.append(folder / REPUTATION)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
