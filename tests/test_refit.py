"""The profiler's forecasts: refitted from the journal, versioned with the policy, swapped in without a restart."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments import profiler, refit
from deployments.journal import Journal
from deployments.refit import Refitter
from deployments.router import Router
from deployments.snapshot import Snapshot
from deployments.versions import load_policy, save_policy
from policies.thompson import Thompson
from policies.types import Arm, Decision, Feedback, Objective, Outcome
from tests.gateway import Gateway, eventually
from tests.helpers import make_profile

ARMS = (Arm("small"), Arm("large"))
CHATS = 60


def happen(journal: Journal, first: int, count: int, good: str, owner: str = "") -> None:
    """So many finished requests of a key, answered in turn; only one arm's answers are any good."""
    for n in range(first, first + count):
        arm = ARMS[n % 2].name
        journal.put(Decision(f"d{n}", arm, n, "", make_profile(f"What is {n} plus {n * 7}?"), Objective(), owner=owner))
        journal.put(Outcome(f"d{n}", output_tokens=5))
        journal.put(Feedback(f"d{n}", float(arm == good), owner=owner))
    asyncio.run(journal.flush())


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(f"sqlite:///{tmp_path}/journal.db")


def chances(refitter: Refitter) -> Any:
    return refitter.forecaster.complete([make_profile()])[0].sufficiency


def test_it_is_refitted_when_enough_has_happened(journal: Journal) -> None:
    """Not before, and then not again until there is more."""
    refitter = Refitter(ARMS, journal)
    happen(journal, 0, 150, "large")
    assert not asyncio.run(refitter.turn()) and refitter.forecaster.version == 0
    happen(journal, 150, 50, "large")
    assert asyncio.run(refitter.turn()) and refitter.forecaster.version == 1
    assert chances(refitter)["large"] > 0.9 and chances(refitter)["small"] < 0.1
    assert not asyncio.run(refitter.turn())
    happen(journal, 200, 1400, "small")
    assert asyncio.run(refitter.turn()) and refitter.forecaster.version == 2
    assert chances(refitter)["small"] > chances(refitter)["large"]


def test_in_a_rush_it_rests_between_two_fits(journal: Journal) -> None:
    refitter = Refitter(ARMS, journal, rest=1e6)
    for start in (0, 200):
        happen(journal, start, 200, "large")
        assert asyncio.run(refitter.turn()) is (start == 0)


def test_a_corrected_score_counts_once(journal: Journal) -> None:
    """In its last version, though decision and correction were read at different times."""
    refitter = Refitter(ARMS, journal)
    happen(journal, 0, 300, "large")
    assert asyncio.run(refitter.turn())
    for n in range(300):
        journal.put(Feedback(f"d{n}", 1.0))
    happen(journal, 300, 200, "none")
    for n in range(300, 500):
        journal.put(Feedback(f"d{n}", 1.0))
    asyncio.run(journal.flush())
    assert asyncio.run(refitter.turn())
    assert min(chances(refitter).values()) > 0.9
    assert refitter.forecaster.reliability()["scored"] == 450  # nine of ten blocks of 500


def test_scores_that_do_not_count_for_the_policy_do_not_count_here(journal: Journal) -> None:
    """Of a key in doubt or in quarantine, for as long as it is: as if it had given none."""
    refitter = Refitter(ARMS, journal)
    happen(journal, 0, 200, "large", "ann")
    happen(journal, 200, 200, "small", "liar")
    assert asyncio.run(refitter.turn({"liar"}))
    assert chances(refitter)["large"] > 0.9 and chances(refitter)["small"] < 0.1
    assert refitter.forecaster.reliability()["scored"] == 180  # nine of ten blocks
    happen(journal, 400, 200, "large", "ann")
    assert asyncio.run(refitter.turn())
    assert refitter.forecaster.reliability()["scored"] == 540


def test_a_restart_learns_the_same_from_the_journal(journal: Journal) -> None:
    """To the last bit, without a snapshot."""
    one = Refitter(ARMS, journal)
    happen(journal, 0, 200, "large")
    asyncio.run(one.turn())
    other = Refitter(ARMS, Journal(str(journal.engine.url)))
    asyncio.run(other.turn())
    assert all(np.array_equal(value, other.state()[name]) for name, value in one.state().items())


def test_a_published_version_brings_its_forecasts(journal: Journal, tmp_path: Path) -> None:
    """Through policy.json and posterior.npz; other arms keep what is known of them, and broken arrays are left."""
    taught = Refitter(ARMS, journal)
    happen(journal, 0, 200, "large")
    asyncio.run(taught.turn())
    snapshot = Snapshot("thompson", ("small", "large"), 200, 0, Thompson(ARMS).state() | taught.state())
    loaded = load_policy(tmp_path, 3, save_policy(snapshot, tmp_path))
    fresh = Refitter((Arm("large"), Arm("new")), Journal("sqlite://"))
    fresh.take(loaded.state, loaded.arms)
    assert fresh.forecaster.version == 1 and set(chances(fresh)) == {"large", "new"}
    assert chances(fresh)["large"] == chances(taught)["large"]
    before = fresh.forecaster
    fresh.take(loaded.state | {"profile.platt": np.full((2, 2), np.nan)}, loaded.arms)
    assert fresh.forecaster is before


def ask(gateway: Gateway) -> dict[str, Any]:
    """The explanation of a new request's decision."""
    decision_id = gateway.chat(router={"models": ["small", "large"]}).headers["x-router-decision-id"]
    found: dict[str, Any] = gateway.client.get(f"/v1/router/decisions/{decision_id}").json()
    return found


def within_seconds(check: Callable[[], bool]) -> None:
    """The router looks every other second whether a refit is due, and the ingress for a new snapshot."""
    eventually(check)


def test_new_forecasts_are_swapped_in_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same profiler says them, with their version; they outlive the router, its restart, and the profiler."""
    monkeypatch.setattr(refit, "REFIT_EVERY", 3 * CHATS)
    monkeypatch.setattr(profiler, "REFRESH_S", 0.1)
    made = Gateway(tmp_path)
    with made.client:
        made.tune(profile_here_chars=0)  # or no text would be long enough for the profiler
        first = ask(made)
        assert first["profile"]["profiler_version"] == 0
        assert first["profile"]["sufficiency"] == pytest.approx({"small": 0.45, "large": 0.55})  # by the price
        for n in range(CHATS):
            arm = ("small", "large")[n % 2]
            decision_id = made.chat(model=arm).headers["x-router-decision-id"]
            made.client.post("/v1/feedback", json={"decision_id": decision_id, "score": float(arm == "large")})
        eventually(lambda: not made.ingress.decider._reporting)
        within_seconds(lambda: made.profiler.thing._forecaster.version == 1)
        found = ask(made)
        assert found["profile"]["profiler_version"] == 1
        assert found["profile"]["sufficiency"]["large"] > 0.7 > 0.3 > found["profile"]["sufficiency"]["small"]
        assert found["profile"]["expected_output_tokens"] < 6 < found["profile"]["output_tokens"]
        assert "chance that an answer suffices: small 0." in found["summary"]
        state = made.client.get("/v1/router/state").json()["profiler"]
        assert state["version"] == 1 and state["scored"] >= 50 and state["brier"] < state["brier_by_arm"] + 0.01

        made.router.broken = True  # the last forecasts go on
        assert made.chat().status_code == 200 and made.profiler.thing._forecaster.version == 1
        made.router.broken = False
        within_seconds(lambda: made.ingress.decider._forecaster.version == 1)
        made.profiler.broken = True  # the ingress says them itself
        assert ask(made)["profile"]["profiler_version"] == 1
    again = Router(made.settings, lambda _: made.replicas)
    assert asyncio.run(again.forecaster(0)).version == 1  # type: ignore[union-attr]
    assert asyncio.run(again.forecaster(1)) is None


def test_what_policies_go_by_does_not_move_with_the_forecasts() -> None:
    """What an arm has learned beyond the usual length stays right when the expected length is refitted."""
    from policies.forecast import Forecaster
    from policies.thompson import Thompson
    from policies.types import Request

    policy, rng = Thompson(ARMS), np.random.default_rng(0)
    (before,) = policy.decide([Request("r", make_profile(), Objective())], {}, rng, 0)
    longer = Forecaster.prior(ARMS)
    longer.lengths[0] = 2.0
    (profile,) = longer.complete([make_profile()])
    assert profile.expected_output_tokens > 5 * make_profile().output_tokens
    (after,) = policy.decide([Request("r", profile, Objective())], {}, rng, 0)
    assert [e.output_tokens for e in after.estimates] == [e.output_tokens for e in before.estimates]
