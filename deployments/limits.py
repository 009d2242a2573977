"""How much one key may do: token buckets for its requests and its scores, and a count of what runs at once."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from deployments.errors import ApiError
from deployments.keys import Key
from deployments.settings import KeySettings


class Bucket:
    """Holds a minute's worth of tokens and gets them back evenly (a token bucket, ITU-T I.371).

    `per_minute` may change while it is in use: what was taken stays taken.

    Args:
        per_minute: tokens.
        clock: seconds, never going back.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute, self._clock = per_minute, clock
        self._taken, self._then = 0.0, clock()

    @property
    def left(self) -> int:
        """Whole tokens that are there now."""
        now = self._clock()
        self._taken = max(0.0, self._taken - (now - self._then) * self.per_minute / 60)
        self._then = now
        return max(0, int(self.per_minute - self._taken + 1e-9))

    @property
    def full_in_s(self) -> float:
        """Seconds until it is full."""
        return self._taken * 60 / self.per_minute

    def take(self) -> float:
        """Take one; returns 0, or if there is none the seconds until there is."""
        if self.left >= 1:
            self._taken += 1
            return 0.0
        return (1 + self._taken - self.per_minute) * 60 / self.per_minute


@dataclass
class _Account:
    requests: Bucket
    scores: Bucket
    running: int = 0


class Limits:
    """The accounts of all keys at this ingress replica.

    A key's influence on what is learned is bounded by its scores: each weighs 1, one counts per decision and source,
    a decision takes few sources (policies/ledger.py), and no more than `scores_per_minute` are taken.
    """

    def __init__(self, settings: KeySettings, clock: Callable[[], float] = time.monotonic):
        self._settings, self._clock = settings, clock
        self._accounts: dict[str, _Account] = {}

    def _account(self, key: Key) -> _Account:
        """By name: a second key of the same owner is no second ration. Each key is held to its own limits, and what
        was taken with one counts for all.
        """
        settings, account = self._settings, self._accounts.get(key.name)
        requests = key.requests_per_minute or settings.requests_per_minute
        scores = key.scores_per_minute or settings.scores_per_minute
        if account is None:
            buckets = Bucket(requests, self._clock), Bucket(scores, self._clock)
            account = self._accounts[key.name] = _Account(*buckets)
        account.requests.per_minute, account.scores.per_minute = requests, scores
        return account

    def enter(self, key: Key) -> None:
        """Begin a request; `leave` ends it.

        Raises:
            ApiError: 429, with the time after which to come back.
        """
        account = self._account(key)
        if account.running >= (key.concurrency or self._settings.concurrency):
            raise _refused(f"this key has {account.running} requests under way, its limit; wait for one to end", 1.0)
        if wait_s := account.requests.take():
            raise _refused(f"this key may make {account.requests.per_minute} requests a minute", wait_s)
        account.running += 1

    def leave(self, key: Key) -> None:
        """End a request."""
        self._account(key).running -= 1

    def score(self, key: Key) -> None:
        """Count one score.

        Raises:
            ApiError: 429; a later score is as good, so nothing is lost.
        """
        account = self._account(key)
        if wait_s := account.scores.take():
            raise _refused(
                f"this key may give {account.scores.per_minute} scores a minute; send this one later", wait_s
            )

    def trusts(self, key: Key) -> bool:
        """Whether its scores count even if they contradict all others' (policies/trust.py)."""
        return key.trusted or not self._settings.cross_check

    def headers(self, key: Key) -> dict[str, str]:
        """As OpenAI names them: the limit, what is left of it, and when it is whole again."""
        bucket = self._account(key).requests
        return {
            "x-ratelimit-limit-requests": str(bucket.per_minute),
            "x-ratelimit-remaining-requests": str(bucket.left),
            "x-ratelimit-reset-requests": f"{bucket.full_in_s:.3g}s",
        }


def _refused(message: str, wait_s: float) -> ApiError:
    return ApiError.later(429, message, wait_s, code="rate_limit_exceeded")
