"""The token bucket, and limits that keys of one owner share."""

import contextlib
import re
from dataclasses import replace
from typing import Any

import pytest

from deployments.access.api_keys import Key
from deployments.access.rate_limits import RateLimiter, TokenBucket
from deployments.errors import ApiError
from deployments.settings import KeySettings


def test_a_token_bucket_is_refilled_evenly() -> None:
    """60 a minute are one a second, and the bucket never holds more than 60."""
    now = 0.0
    bucket = TokenBucket(60, lambda: now)
    assert [bucket.take() for _ in range(60)] == [0.0] * 60
    assert bucket.take() == pytest.approx(1.0)
    now = 2.5
    assert [bucket.take() > 0 for _ in range(4)] == [False, False, True, True]
    now = 1000.0
    assert bucket.left == 60


def test_two_keys_of_one_owner_share_their_limits() -> None:
    """Tokens that one key took are gone for the other, also if their limits differ."""
    now = 0.0
    limits = RateLimiter(
        KeySettings(requests_per_minute=10, scores_per_minute=5), lambda: now
    )
    some = Key("ann", "1", "0" * 64, ("infer", "feedback"))
    more = replace(some, id="2", requests_per_minute=20, scores_per_minute=8)

    def passed(call: Any) -> int:
        count = 0
        for key in (some, more) * 100:
            try:
                call(key)
            except ApiError:
                continue
            count += 1
        return count

    assert (
        passed(limits.score) == 8
        and passed(lambda key: (limits.enter(key), limits.leave(key))) == 20
    )
    now = 60.0
    assert 5 <= passed(limits.score) <= 8


@pytest.mark.parametrize("per_minute", [1, 60, 600, 7_000])
def test_headers_are_as_openais_clients_read_them(per_minute: int) -> None:
    """Limit and rest are whole numbers, and the time is one of seconds without an exponent, on refusals as well."""
    time_s = [0.0]
    limiter = RateLimiter(KeySettings(file="x"), lambda: time_s[0])
    key = Key("ann", "1", "0" * 64, ("infer",), requests_per_minute=per_minute)
    for taken in range(per_minute + 1):
        with contextlib.suppress(ApiError):
            limiter.enter(key)
            limiter.leave(key)
        headers = limiter.headers(key)
        assert headers["x-ratelimit-limit-requests"] == str(per_minute)
        left = per_minute - min(taken + 1, per_minute)
        assert headers["x-ratelimit-remaining-requests"] == str(left)
        reset = headers["x-ratelimit-reset-requests"]
        assert re.fullmatch(r"\d+(\.\d{1,3})?s", reset)
        assert float(reset[:-1]) == pytest.approx(
            (per_minute - left) * 60 / per_minute, abs=1e-3
        )
    time_s[0] += 60 - 1e-5
    assert limiter.headers(key)["x-ratelimit-reset-requests"] == "0s"
