"""A key that scores the opposite of all others is quarantined and its votes withdrawn; an honest key is not."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from deployments.access import api_keys
from deployments.access.rate_limits import RateLimiter
from deployments.journal.journal import Journal
from deployments.router.learner import Learner
from deployments.settings import KeySettings
from policies.base import State
from policies.events import ANY_OWNER, ArmEstimate, Decision, Feedback, Outcome
from policies.feedback.decision_records import DecisionRecords
from policies.feedback.reputation import KeyReputation, likelihood_ratio
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective
from tests.deployments.access.test_api_keys import Locked
from tests.support.poisoning import play
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"))
QUALITY = {("small", 0): 0.95, ("large", 0): 0.9, ("small", 1): 0.1, ("large", 1): 0.9}
PROFILES = (
    make_profile("Copy this word: pear"),
    make_profile("Prove that 347 * 586 is even."),
)
Judge = Callable[[float, np.random.Generator], float]
JUDGES: dict[str, Judge] = {
    "honest": lambda chance, rng: float(rng.random() < chance),
    "hostile": lambda chance, rng: float(rng.random() > chance),
    "strict": lambda chance, rng: 0.6 * (rng.random() < chance),
    "hard to please": lambda chance, rng: float(rng.random() < 0.75 * chance),
    "graded": lambda chance, _: chance,
    "pleased": lambda _, __: 1.0,
}


def votes(
    judges: list[str], count: int, seed: int = 0, broken: int = 10**9
) -> Iterator[tuple[Decision, Feedback]]:
    """Decisions of numbered keys and a judge, with their scores; from `broken` on, `large` fails for all."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        who = int(rng.integers(len(judges)))
        kind = int(rng.integers(2))
        arm = ARMS[int(rng.random() < 0.8)].name
        chance = 0.02 if i >= broken and arm == "large" else QUALITY[arm, kind]
        estimates = tuple(
            ArmEstimate(a.name, quality=QUALITY[a.name, kind]) for a in ARMS
        )
        owner = f"{who} {judges[who]}"
        decision = Decision(
            f"d{i}",
            arm,
            i,
            "thompson-v1",
            PROFILES[kind],
            Objective(),
            estimates,
            owner=owner,
        )
        yield (
            decision,
            Feedback(
                decision.id, JUDGES[judges[who]](chance, rng), "user", float(i), owner
            ),
        )


def fold(
    given: Iterator[tuple[Decision, Feedback]], without: tuple[str, ...] = ()
) -> tuple[DecisionRecords, KeyReputation, State]:
    policy = Thompson(ARMS)
    reputation = KeyReputation()
    decision_records = DecisionRecords(reputation=reputation)
    for decision, score in given:
        decision_records.apply(decision, policy)
        if decision.owner not in without:
            decision_records.apply(score, policy)
    policy.advance(10_000)
    return decision_records, reputation, policy.state()


@pytest.fixture(autouse=True)
def no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy without the drift test: that is sequential, so withdrawn votes do not restore what it discounted."""
    monkeypatch.setattr("policies.thompson.drift.THRESHOLD", 1e9)


def same(one: State, other: State) -> bool:
    """Whether two policies have learned the same about quality."""
    return all(
        np.allclose(one[n], other[n], rtol=1e-9, atol=1e-9)
        for n in one
        if n.startswith("quality.")
    )


def test_an_inverted_score_speaks_against_a_key_and_the_expected_one_for_it() -> None:
    """A 0 is evidence where a good answer is expected, and no evidence where the expected score is 1/2."""
    assert likelihood_ratio(0.0, 0.95) > 0.5 > 0 > likelihood_ratio(0.9, 0.95)
    assert likelihood_ratio(1.0, 0.05) > 0.5 > 0 > likelihood_ratio(0.1, 0.05)
    assert likelihood_ratio(0.0, 0.5) == likelihood_ratio(1.0, 0.5) == 0
    assert likelihood_ratio(0.95 * 0.75, 0.95) < 0  # a strict judge's mean


@pytest.mark.parametrize("seed", range(5))
def test_a_hostile_key_is_quarantined_and_its_votes_are_withdrawn(seed: int) -> None:
    """It takes about 30 of its votes; then the policy is as if the key had never scored."""
    judges = ["honest"] * 8 + ["hostile"]
    _, reputation, learned = fold(votes(judges, 400, seed))
    assert list(reputation.quarantined) == ["8 hostile"]
    assert int(reputation.quarantined["8 hostile"]["decision_id"][1:]) < 9 * 30
    evidence = reputation.quarantined["8 hostile"]
    assert (
        evidence["scores"] > 1
        and evidence["mean_of_others"] > evidence["mean_score"] + 0.3
    )
    assert same(learned, fold(votes(judges, 400, seed), without=("8 hostile",))[2])


@pytest.mark.parametrize("seed", range(3))
def test_the_last_score_of_a_key_decides_its_standing(seed: int) -> None:
    """A key that corrects honest scores to the opposite is quarantined; a key that corrects to honest ones is not."""

    def corrected() -> Iterator[tuple[Decision, Feedback]]:
        for decision, score in votes(["honest"] * 8 + ["hostile", "honest"], 600, seed):
            if decision.owner in ("8 hostile", "9 honest"):
                yield (
                    decision,
                    replace(score, score=1.0 - score.score, time_s=score.time_s - 0.5),
                )
            yield decision, score

    _, reputation, learned = fold(corrected())
    assert list(reputation.quarantined) == ["8 hostile"] == list(reputation.silenced)
    assert same(learned, fold(corrected(), without=("8 hostile",))[2])


@pytest.mark.parametrize("seed", range(5))
def test_honest_keys_are_never_quarantined(seed: int) -> None:
    """Strict and lenient keys and keys with few scores are among them, and an arm fails for all in the middle."""
    judges = ["honest", "strict", "hard to please", "graded", "pleased"] * 3
    assert not fold(votes(judges, 4_000, seed))[1].quarantined
    assert not fold(votes(judges, 4_000, seed, broken=2_000))[1].quarantined


def test_votes_of_a_suspended_key_count_again_once_it_is_cleared() -> None:
    """A key with four opposite scores that then scores like the others ends as if it had never been suspended."""
    given = list(votes(["honest"] * 9, 900))
    unlucky = 0
    doubted = []
    policy = Thompson(ARMS)
    reputation = KeyReputation()
    undoubting = Thompson(ARMS)
    decision_records = DecisionRecords(reputation=reputation)
    open_to_all = DecisionRecords()
    for decision, score in given:
        if decision.owner == "8 honest" and unlucky < 4:
            score = replace(score, score=1.0 - score.score)
            unlucky = unlucky + 1
        for event in (decision, score):
            decision_records.apply(event, policy)
            open_to_all.apply(event, undoubting)
        if "8 honest" in reputation.silenced:
            doubted.append(decision.id)
            record = decision_records.get(decision.id)
            assert record is not None and bool(record.explicit_scores()) == (
                decision.owner not in reputation.silenced
            )
            copy = KeyReputation()
            copy.restore(reputation.state())
            assert copy.silenced == {"8 honest"} and not copy.quarantined
    assert len(doubted) > 9 and not reputation.silenced and not reputation.quarantined
    for one in (policy, undoubting):
        one.advance(10_000)
    assert same(policy.state(), undoubting.state())


def test_one_key_that_scores_much_more_is_no_majority() -> None:
    """A key whose false scores are nine of ten scores is quarantined, and the other keys are not."""
    judges = ["honest"] * 6 + ["hostile"]
    given = [
        pair
        for pair in votes(judges, 4_000)
        if "hostile" in pair[0].owner or int(pair[0].id[1:]) % 9 == 0
    ]
    assert list(fold(iter(given))[1].quarantined) == ["6 hostile"]


@pytest.mark.parametrize(
    "judges", [["hostile"], ["honest", "hostile"], ["honest", "hostile", "honest"]]
)
def test_without_enough_other_keys_no_key_is_quarantined(judges: list[str]) -> None:
    """One, two or three keys are too few to suspect one of them; without keys there is no suspect."""
    assert not fold(votes(judges, 500))[1].quarantined
    many = [
        (d, replace(s, owner=ANY_OWNER))
        for d, s in votes(["honest"] * 8 + ["hostile"], 500)
    ]
    assert not fold(iter(many))[1].quarantined
    without_keys = [
        (structs.replace(d, owner=""), replace(s, owner=""))
        for d, s in votes(["honest"] * 8 + ["hostile"], 500)
    ]
    assert not fold(iter(without_keys))[1].quarantined


def test_an_operators_voucher_restores_a_keys_votes() -> None:
    """The votes count from the key's next score on; without a voucher, a quarantined key's scores are only recorded."""
    given = list(votes(["honest"] * 8 + ["hostile"], 400))
    decision_records, reputation, _ = fold(iter(given))
    hostile_votes = [(d, s) for d, s in given if d.owner == "8 hostile"]
    record = decision_records.get(hostile_votes[-1][0].id)
    assert record is not None and record.scores and not record.explicit_scores()
    vouched = [(d, replace(s, trusted=d is hostile_votes[-1][0])) for d, s in given]
    _, reputation, learned = fold(iter(vouched))
    assert not reputation.quarantined
    everything = [(d, replace(s, trusted=True)) for d, s in given]
    _, reputation, wanted = fold(iter(everything))
    assert not reputation.quarantined and same(learned, wanted)


def test_a_voucher_restores_also_the_votes_of_a_long_quarantine() -> None:
    """A key that gave several hundred scores while they did not count gets all of them back."""
    given = list(votes(["honest"] * 8 + ["hostile"], 3600))
    hostile = [decision for decision, _ in given if decision.owner == "8 hostile"]
    assert len(hostile) > 350
    vouched = [(d, replace(s, trusted=d is hostile[-1])) for d, s in given]
    _, reputation, learned = fold(iter(vouched))
    assert not reputation.quarantined
    assert len(reputation.recent("8 hostile")) == 200
    everything = [(d, replace(s, trusted=True)) for d, s in given]
    assert same(learned, fold(iter(everything))[2])


async def test_a_restart_and_a_replay_find_the_same_quarantines(
    url: str,
) -> None:
    """The quarantined keys, the evidence and the learned state are the same after both."""

    def make() -> Learner:
        return Learner(Journal(url), lambda: Thompson(ARMS))

    memory = make()
    now = 1e9
    given = [
        (structs.replace(d, id=memory.ids.new_id(now)), s)
        for d, s in votes(["honest"] * 8 + ["hostile"], 400)
    ]
    for i, (decision, score) in enumerate(given):
        if i in (60, 250):  # before and after it is found; `save` leaves a snapshot
            await memory.save()
            memory = make()
        await memory.observe(
            [(decision, Outcome(decision.id, "ok", 0.1, 0.5, 20, 9))], now
        )
        await memory.feedback([replace(score, decision_id=decision.id)], now)
    again = make()
    with memory.journal.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM snapshots")
    whole = make()
    assert list(memory.quarantined) == ["8 hostile"]
    assert memory.quarantined == again.quarantined
    assert whole.quarantined.keys() == memory.quarantined.keys()
    assert whole.quarantined["8 hostile"] == pytest.approx(
        memory.quarantined["8 hostile"]
    )
    for other in (again, whole):
        for one in (memory, other):
            one.policy.advance(10_000)
        assert same(memory.policy.state(), other.policy.state())


def test_hostile_keys_are_quarantined_in_a_simulation_of_many_tasks() -> None:
    """Two of twenty keys: the regret of the rest ends up below that of a router without a defence."""
    defended, open_to_all = (
        play(1, 2_500, 20, 2, defended=defended) for defended in (True, False)
    )
    assert set(defended.found) == {"key0", "key1"} and not defended.wronged
    assert np.nanmean(defended.regret[1_500:]) < 0.8 * np.nanmean(
        open_to_all.regret[1_500:]
    )


def test_an_operator_vouches_by_the_keys_file_and_can_turn_the_check_off(
    tmp_path: Path,
) -> None:
    """`router keys trust NAME`, `router keys distrust NAME`, and `cross_check: false`."""
    file = tmp_path / "keys.json"
    api_keys.add(file, "ann", ("infer", "feedback"))
    limits = RateLimiter(KeySettings())

    def trusted() -> list[bool]:
        return [limits.trusts(key) for key in api_keys.read(file).values()]

    assert trusted() == [False]
    api_keys.set_trust(file, "ann", True)
    assert trusted() == [True]
    api_keys.set_trust(file, "ann", False)
    assert trusted() == [False]
    limits = RateLimiter(KeySettings(cross_check=False))
    assert trusted() == [True]
    assert json.loads(file.read_text())["keys"][0]["trusted"] is False


def test_the_state_shows_who_is_quarantined(tmp_path: Path) -> None:
    """The state lists the quarantined keys by name, with the evidence."""
    gateway = Locked(tmp_path)
    with gateway.client:
        quarantined = gateway.router.thing._learner.quarantined
        assert gateway.call("op", "GET", "/v1/router/state").json()["quarantined"] == {}
        quarantined["ben"] = {"scores": 12}
        assert gateway.call("op", "GET", "/v1/router/state").json()["quarantined"] == {
            "ben": {"scores": 12}
        }
