"""Rate limits of API keys: token buckets for requests and scores, and a limit on concurrent requests."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from deployments.access.api_keys import Key
from deployments.errors import ApiError
from deployments.settings import KeySettings


class TokenBucket:
    """A token bucket (ITU-T I.371): it holds the tokens of one minute, and is refilled evenly.

    `per_minute` may change while the bucket is in use; tokens that were taken stay taken.

    Args:
        per_minute: tokens of one minute.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute = per_minute
        self._clock = clock
        self._taken = 0.0
        self._updated_s = clock()

    @property
    def left(self) -> int:
        """Whole tokens that can be taken now."""
        now = self._clock()
        self._taken = max(
            0.0, self._taken - (now - self._updated_s) * self.per_minute / 60
        )
        self._updated_s = now
        return max(0, int(self.per_minute - self._taken + 1e-9))

    @property
    def full_in_s(self) -> float:
        """Seconds until the bucket is full."""
        return self._taken * 60 / self.per_minute

    def take(self) -> float:
        """Take a token and return 0; if there is none, return the seconds until the next one."""
        if self.left >= 1:
            self._taken += 1
            return 0.0
        return (1 + self._taken - self.per_minute) * 60 / self.per_minute


@dataclass
class _KeyUsage:
    requests: TokenBucket
    scores: TokenBucket
    running: int = 0


class RateLimiter:
    """The rate limits of all keys at this ingress replica.

    The limits also bound a key's influence on learning. Every score has weight 1. One score counts for each decision
    and source, and a decision has few sources (policies/feedback/decision_records.py). No more than
    `scores_per_minute` are accepted.
    """

    def __init__(
        self, settings: KeySettings, clock: Callable[[], float] = time.monotonic
    ):
        self._settings = settings
        self._clock = clock
        self._usages: dict[str, _KeyUsage] = {}

    def _usage(self, key: Key) -> _KeyUsage:
        """The usage of a key's owner, with the limits of this key.

        Keys with the same owner share the usage, so a second key gives no further requests.
        """
        settings = self._settings
        usage = self._usages.get(key.name)
        requests = key.requests_per_minute or settings.requests_per_minute
        scores = key.scores_per_minute or settings.scores_per_minute
        if usage is None:
            usage = _KeyUsage(
                requests=TokenBucket(requests, self._clock),
                scores=TokenBucket(scores, self._clock),
            )
            self._usages[key.name] = usage
        usage.requests.per_minute = requests
        usage.scores.per_minute = scores
        return usage

    def enter(self, key: Key) -> None:
        """Count a request that begins; `leave` ends it.

        Raises:
            ApiError: 429, with the time after which the client may try again.
        """
        usage = self._usage(key)
        if usage.running >= (key.concurrency or self._settings.concurrency):
            raise _refused(
                f"this key has {usage.running} requests under way, its limit; wait for one to end",
                1.0,
            )
        if wait_s := usage.requests.take():
            raise _refused(
                f"this key may make {usage.requests.per_minute} requests a minute",
                wait_s,
            )
        usage.running += 1

    def leave(self, key: Key) -> None:
        """Count a request that ended."""
        self._usage(key).running -= 1

    def score(self, key: Key) -> None:
        """Count one score.

        Raises:
            ApiError: 429; the client may send the score later.
        """
        usage = self._usage(key)
        if wait_s := usage.scores.take():
            raise _refused(
                f"this key may give {usage.scores.per_minute} scores a minute; send this one later",
                wait_s,
            )

    def trusts(self, key: Key) -> bool:
        """Whether the key's scores count even if they contradict other keys' (policies/feedback/reputation.py)."""
        return key.trusted or not self._settings.cross_check

    def headers(self, key: Key) -> dict[str, str]:
        """The headers of OpenAI: the limit on requests, how many are left, and when the limit is reset."""
        bucket = self._usage(key).requests
        return {
            "x-ratelimit-limit-requests": str(bucket.per_minute),
            "x-ratelimit-remaining-requests": str(bucket.left),
            "x-ratelimit-reset-requests": f"{round(bucket.full_in_s, 3):g}s",
        }


def _refused(message: str, wait_s: float) -> ApiError:
    return ApiError.later(429, message, wait_s, code="rate_limit_exceeded")
