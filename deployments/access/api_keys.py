"""API keys, their scopes and the file that stores them; `router keys` changes it.

A key is `rk-ID-SECRET` with 256 random bits in the secret. The file holds only the SHA-256 of the secret. For so many
random bits it is as good as a slow password hash (OWASP Password Storage: slow hashes are for passwords that people
choose). The running gateway reads a changed file within seconds.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

PRIORITY = "priority"  # the scope that `priority: high` needs
SCOPES = ("infer", "feedback", "operate", PRIORITY)
LIMITS = ("requests_per_minute", "concurrency", "scores_per_minute")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
CHECK_EVERY_S = 2.0
FILE = Path("var/keys.json")
# an unknown key is compared with this digest, so that it takes as long as a known one
NO_DIGEST = "0" * 64
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """One key, as it is stored.

    name: of the key's owner; the journal keeps it with each decision.
    id: the public part of the key. sha256: of the secret part, hexadecimal.
    scopes: some of SCOPES.
    requests_per_minute, concurrency, scores_per_minute: override the settings; None for the settings' own.
    trusted: the key's scores count even if they contradict those of other keys; the next score ends a quarantine of the
        key (policies/feedback/reputation.py).
    created_s: in seconds since the epoch; None for a key of an earlier release.
    """

    name: str
    id: str
    sha256: str
    scopes: tuple[str, ...]
    requests_per_minute: int | None = None
    concurrency: int | None = None
    scores_per_minute: int | None = None
    trusted: bool = False
    created_s: float | None = None


class ApiKeyStore:
    """The keys of a file; the file is read again when it changes.

    Raises:
        ValueError: when the store is made, the file is missing, holds no key, or was not written by `write`.
    """

    def __init__(self, path: Path):
        self._path = path
        self._stamp = self._stat()
        self._checked_s = time.monotonic()
        self._keys = read(path)
        if not self._keys:
            raise ValueError(
                f"there is no API key in {path}; make one: {creation_hint(path)}"
            )

    def find(self, presented: str) -> Key | None:
        """The key that was presented, or None; a wrong secret takes as long as a right one."""
        self._reload_if_changed()
        _, _, rest = presented.partition("rk-")
        key_id, _, secret = rest.partition("-")
        key = self._keys.get(key_id)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        same = hmac.compare_digest(digest, key.sha256 if key else NO_DIGEST)
        return key if same else None

    def _stat(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0
        return found.st_mtime_ns, found.st_ino

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if now - self._checked_s < CHECK_EVERY_S:
            return
        self._checked_s = now
        if (stamp := self._stat()) == self._stamp:
            return
        try:
            self._keys = read(self._path)
            self._stamp = stamp
        except ValueError as error:
            log.error("keeping the API keys as they were: %s", error)


def read(path: Path) -> dict[str, Key]:
    """The keys in a file, by id; none if there is no file.

    Raises:
        ValueError: the file was not written by `write`.
    """
    try:
        keys = [_parse(entry) for entry in json.loads(path.read_text())["keys"]]
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no file of API keys ({type(error).__name__}: {error})"
        ) from None
    return {key.id: key for key in keys}


def _parse(entry: Mapping[str, Any]) -> Key:
    key = Key(**{**entry, "scopes": tuple(entry["scopes"])})
    if (
        not NAME.fullmatch(key.name)
        or not re.fullmatch("[0-9a-f]{64}", key.sha256)
        or not key.scopes
    ):
        raise ValueError("a key has a bad name, hash or scope")
    if set(key.scopes) - set(SCOPES):
        raise ValueError(f"unknown scope; choose from: {', '.join(SCOPES)}")
    limits = [getattr(key, name) for name in LIMITS]
    if any(limit is not None and limit < 1 for limit in limits):
        raise ValueError(
            "limits begin at 1; for a key that may not ask or score at all, leave the scope out"
        )
    return key


def write(path: Path, keys: Mapping[str, Key]) -> None:
    """Replace the file atomically; only its owner may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"keys": [asdict(key) for key in keys.values()]}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def add(path: Path, name: str, scopes: tuple[str, ...], **limits: int | None) -> str:
    """Make a key and add it to the file; the returned text is the only copy of the secret.

    Raises:
        ValueError: the name, a scope or a limit is not allowed, or the file is broken.
    """
    keys = read(path)
    key_id = secrets.token_hex(4)
    secret = secrets.token_urlsafe(32)
    sha256 = hashlib.sha256(secret.encode()).hexdigest()
    entry = {"name": name, "id": key_id, "sha256": sha256, "scopes": scopes}
    key = _parse({**entry, **limits, "created_s": time.time()})
    write(path, {**keys, key_id: key})
    return f"rk-{key_id}-{secret}"


def remove(path: Path, name: str) -> int:
    """Remove all keys of this name from the file; returns their number.

    Raises:
        ValueError: there is no such key, or the file is broken.
    """
    keys = read(path)
    ids = _of_name(path, keys, name)
    write(path, {key_id: key for key_id, key in keys.items() if key_id not in ids})
    return len(ids)


def set_trust(path: Path, name: str, trusted: bool) -> int:
    """Trust all keys of this name, or end that; returns their number.

    Raises:
        ValueError: there is no such key, or the file is broken.
    """
    keys = read(path)
    ids = _of_name(path, keys, name)
    changed = {key_id: replace(keys[key_id], trusted=trusted) for key_id in ids}
    write(path, {**keys, **changed})
    return len(ids)


def _of_name(path: Path, keys: Mapping[str, Key], name: str) -> list[str]:
    """Ids of the keys of this name."""
    ids = [key_id for key_id, key in keys.items() if key.name == name]
    if not ids:
        raise ValueError(
            f"there is no key of the name '{name}' in {path}; `router keys list` shows the names"
        )
    return ids


def creation_hint(path: Path) -> str:
    """The command that makes a key, for error messages."""
    return f"router keys add NAME --scopes infer,feedback --file {path}"
