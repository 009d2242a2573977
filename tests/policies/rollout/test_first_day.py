"""The stages of the first day: what is counted, and what the gate asks for before each stage."""

from dataclasses import asdict, replace
from itertools import count

import numpy as np
import pytest
from msgspec import convert, structs, to_builtins

from policies.baselines import Always, Static
from policies.events import ArmEstimate, Decision, Feedback, Outcome, Record
from policies.explain import explain
from policies.rollout.first_day import (
    FirstDay,
    FirstDayState,
    GateSettings,
    Stage,
)
from policies.rollout.observation import BLOCK, Observation, leaves_choice
from policies.rollout.roles import CHALLENGER, CHAMPION, SHADOW, Roles
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective
from tests.support.requests import make_profile, make_request

SETTINGS = GateSettings(
    scores=20,
    margin=0.02,
    rewards=30,
    level=0.95,
    repeated=False,
    watch_margin=0.02,
    watch_alpha=0.05,
)
IDS = count()
PROFILE = make_profile()
ARMS = tuple(Arm(name, prior_quality=0.5) for name in ("small", "large"))


def decision(
    shadow: str = "small",
    rule: str = "large",
    tried: bool = False,
    utility: float = 0.1,
    time_s: float = 10.0,
    fallback: str = "",
) -> Decision:
    """A decision of the rule, or of the policy; the policy expects `utility` more of `small` than of `large`."""
    estimates = (
        ArmEstimate("small", 0.6, 0.2, 1e-6),
        ArmEstimate("large", 0.7, 0.5, 5e-6),
    )
    return Decision(
        f"d{next(IDS)}",
        shadow if tried else rule,
        0,
        "",
        PROFILE,
        Objective(latency_weight=(utility + 0.1) / 0.3),
        estimates if tried else (),
        fallback,
        time_s,
        shadow=shadow,
        rule=rule,
        shadow_estimates=() if tried else estimates,
    )


def serve(
    day: FirstDay, made: Decision, score: float | None, flaw: bool = False
) -> str:
    """Play the events of one request to a first day; the last answer of `record`."""
    record = Record(made)
    day.record(made, record)
    record.outcome = Outcome(made.id, "error" if flaw else "ok", 0.1, 0.2)
    answer = day.record(record.outcome, record)
    if score is not None:
        record.scores["user"] = score
        answer = day.record(Feedback(made.id, score), record)
    return answer


def trial(stage: Stage, settings: GateSettings = SETTINGS) -> FirstDay:
    day = FirstDay(settings, 0.0)
    day.enter(stage, 1.0)
    return day


def randomise(
    day: FirstDay, requests: int, rule: float, policy: float, seed: int = 0
) -> str:
    """Requests that a fair coin gives to rule or policy, which answer well with these probabilities."""
    rng = np.random.default_rng(seed)
    for _ in range(requests):
        tried = bool(rng.random() < 0.5)
        right = rng.random() < (policy if tried else rule)
        if reason := serve(day, decision(tried=tried), float(right)):
            return reason
    return ""


# --- observing --------------------------------------------------------------------------------------------------


def test_the_first_stage_waits_for_scores() -> None:
    """Its gate counts answers with a score, whatever model the client or the rule chose."""
    day = FirstDay(SETTINGS, 0.0)
    for _ in range(12):
        serve(day, decision(), 1.0)
    for _ in range(7):
        serve(day, decision(fallback="forced"), 0.0)
    serve(day, decision(), None)
    verdict = day.verdict()
    assert not verdict.passed
    assert verdict.reason == "1 more answers with a score (19 of 20)"
    serve(day, decision(), 1.0)
    assert day.verdict().passed
    assert day.observation.scored == {"large": 20}


def test_a_policy_that_expects_a_loss_gets_no_traffic() -> None:
    """However many scores there are; the reason states the expectation and the number of requests behind it."""
    day = FirstDay(SETTINGS, 0.0)
    for _ in range(30):
        serve(day, decision(utility=-0.05), 1.0)
    verdict = day.verdict()
    assert not verdict.passed
    assert "-0.0500 a request (30 requests)" in verdict.reason
    day.settings = replace(SETTINGS, margin=0.06)  # as a policy that explores
    assert day.verdict().passed


def test_expectations_are_those_of_the_latest_requests() -> None:
    """What the policy expected before it had learned anything is dropped; the number of requests is exact."""
    seen = Observation()
    assert seen.agreement is None
    assert asdict(seen.expected()) == {
        "requests": 0,
        "score": None,
        "latency_s": None,
        "cost_usd": None,
        "utility": None,
    }
    for _ in range(BLOCK):
        seen.add(decision(utility=-1.0))
    for _ in range(2 * BLOCK):
        seen.add(decision(utility=0.2))
    for _ in range(BLOCK):
        seen.add(decision(shadow="large", utility=0.2))
    expected = seen.expected()
    assert expected.requests == 2 * BLOCK
    assert expected.utility == pytest.approx(0.1)
    assert expected.score == pytest.approx(-0.05)
    assert expected.latency_s == pytest.approx(-0.15)
    assert expected.cost_usd == pytest.approx(-2e-6)
    assert seen.agreement == 0.25 and seen.requests == 4 * BLOCK
    assert seen.chosen == {"small": 3 * BLOCK, "large": BLOCK}


def test_requests_without_a_choice_do_not_count_as_agreement() -> None:
    """Neither a request that only one arm can serve, nor one that the client or a fallback decided."""
    day = FirstDay(SETTINGS, 0.0)
    only = decision(shadow="large")
    removed = only.shadow_estimates[0]._replace(removed_by="its line is full")
    only = structs.replace(only, shadow_estimates=(removed, only.shadow_estimates[1]))
    serve(day, only, 1.0)
    serve(day, decision(fallback="forced"), 1.0)
    serve(day, decision(fallback="router"), 1.0)
    serve(day, structs.replace(decision(), rule=""), 1.0)
    assert day.observation.requests == 0 and day.observation.agreement is None
    assert day.observation.scores == 4


def test_a_corrected_score_counts_once() -> None:
    """A score that arrives before the outcome counts once, too."""
    day = trial(Stage.ONE)
    made = decision(tried=True)
    record = Record(made)
    day.record(made, record)
    record.scores["user"] = 1.0
    day.record(Feedback(made.id, 1.0), record)
    record.outcome = Outcome(made.id)
    day.record(record.outcome, record)
    for score in (0.0, 0.5):
        record.scores["user"] = score
        day.record(Feedback(made.id, score), record)
    assert day.observation.scores == 1 and day.measured().rewards == 1


# --- randomised stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.ONE, Stage.TEN])
def test_a_randomised_stage_waits_for_rewards(stage: Stage) -> None:
    """The policy and the rule need enough rewards, on requests that they decide differently."""
    day = trial(stage)
    for _ in range(100):
        serve(day, decision(tried=False), 1.0)
        serve(day, decision(shadow="large", tried=True), 1.0)
    assert day.verdict().reason.startswith(
        "30 more rewards where policy and rule differ"
    )
    for _ in range(29):
        serve(day, decision(tried=True), 1.0)
    assert day.verdict().reason.startswith("1 more rewards")
    serve(day, decision(tried=True), 1.0)
    assert not day.verdict().reason.startswith("1 more rewards")


def test_a_stage_allows_the_policy_the_larger_loss_the_smaller_its_next_share() -> None:
    """The margin is a loss over all traffic: an equal policy passes to 10 % with few rewards, to 100 % with many."""
    for requests, passed in ((400, (True, False)), (20_000, (True, True))):
        for stage, expected in zip((Stage.ONE, Stage.TEN), passed):
            day = trial(stage)
            assert randomise(day, requests, 0.8, 0.8) == ""
            verdict = day.verdict()
            assert verdict.passed is expected, (stage, requests, verdict.reason)
    assert "may be 0.02 lower" in verdict.reason


@pytest.mark.parametrize("seed", range(8))
def test_a_policy_that_is_worse_by_more_than_the_margin_does_not_pass(
    seed: int,
) -> None:
    """0.06 worse: it never gets all traffic, whether the regression test has rolled it back or not."""
    day = trial(Stage.TEN)
    randomise(day, 3000, 0.8, 0.74, seed)
    assert not day.verdict().passed


def test_a_better_policy_passes() -> None:
    """0.1 better: 1,000 requests suffice for all traffic."""
    day = trial(Stage.TEN)
    assert randomise(day, 1000, 0.7, 0.8) == ""
    verdict = day.verdict()
    assert verdict.passed and day.measured().lower > -0.02


def test_choices_that_hardly_ever_differ_need_no_rewards() -> None:
    """A policy that decides as the rule does cannot lose more than the margin, once enough requests have shown it."""
    for stage, requests in ((Stage.ONE, 3000), (Stage.TEN, 301)):
        day = trial(stage)
        for _ in range(requests - 2):
            serve(day, decision(shadow="large"), None)
        assert not day.verdict().passed
        for _ in range(2):
            serve(day, decision(shadow="large"), None)
        assert day.verdict().passed and "hardly differ" in day.verdict().reason
    for _ in range(6):  # of 307 requests: the loss may be above 0.02
        serve(day, decision(), None)
    assert not day.verdict().passed


def test_a_stage_counts_its_own_requests_only() -> None:
    """Scores that come late, for requests of the stage before, change nothing: the shares were others."""
    day = trial(Stage.ONE)
    before = [decision(tried=True, time_s=1.5) for _ in range(5)]
    records = [Record(made) for made in before]
    for made, record in zip(before, records):
        day.record(made, record)
        record.outcome = Outcome(made.id)
        day.record(record.outcome, record)
    day.enter(Stage.TEN, 2.0)
    for record in records:
        record.scores["user"] = 0.0
        day.record(Feedback(record.decision.id, 0.0), record)
    assert day.measured().requests == 0 and day.measured().rewards == 0
    assert day.observation.scores == 5


def test_a_policy_that_earns_much_less_is_taken_back() -> None:
    """The regression test says why, within some hundred requests; flaws out of the sample do not count for it."""
    day = trial(Stage.TEN)
    reason = randomise(day, 1000, 0.9, 0.4)
    assert reason.startswith("rolled back: ") and "to 1 rolls back" in reason
    day = trial(Stage.TEN)
    for _ in range(200):
        made = decision(tried=True)
        record = Record(made, Outcome(made.id, "error"))
        day.record(made, record)
        assert day.record(record.outcome, record, flaw_sampled=False) == ""  # type: ignore[arg-type]
        assert serve(day, decision(), 1.0) == ""
    assert day.measured().rewards == 200


def test_the_better_policy_is_hardly_ever_taken_back() -> None:
    """At most 5 % false alarms over the whole stage, in 40 runs of 1,500 requests with an equal policy."""
    alarms = sum(
        randomise(trial(Stage.TEN), 1500, 0.8, 0.8, seed) != "" for seed in range(40)
    )
    print(f"{alarms} of 40 runs")
    assert alarms <= 2


def test_repeated_looks_widen_the_interval() -> None:
    """Stages that begin by themselves look every few seconds, so they need the wider interval."""
    once = trial(Stage.TEN)
    often = trial(Stage.TEN, replace(SETTINGS, repeated=True))
    for day in (once, often):
        randomise(day, 1000, 0.8, 0.8)
    width = once.measured().upper - once.measured().lower
    assert 1.3 < (often.measured().upper - often.measured().lower) / width < 2.0


def test_the_last_stages_wait_for_the_watch_and_for_nothing() -> None:
    """The regression watch ends the stage of 100 %, and after it there is no stage."""
    assert trial(Stage.ALL).verdict().reason == "the end of the regression watch"
    summary = trial(Stage.DONE).summary("always", "thompson")
    assert (summary.next_stage, summary.passed, summary.measured) == ("", False, None)


def test_metrics_leave_out_what_is_unknown() -> None:
    """An unknown figure is no 0."""
    day = trial(Stage.ONE)
    metrics = day.summary("always", "thompson").metrics()
    assert metrics["first_day/requests"] == 0.0
    assert "first_day/agreement" not in metrics
    assert "first_day/expected/score" not in metrics
    assert "first_day/measured/utility" not in metrics
    randomise(day, 100, 0.8, 0.8)
    metrics = day.summary("always", "thompson").metrics()
    assert metrics["first_day/agreement"] == 0.0
    assert metrics["first_day/expected/score"] == pytest.approx(-0.1)
    assert metrics["first_day/scores"] == 100.0


def test_a_first_day_is_restored_in_each_stage() -> None:
    """Its plain state, as a snapshot stores it, gives the same summary and the same regression test."""
    for stage in Stage:
        day = trial(stage)
        randomise(day, 200, 0.8, 0.7)
        again = FirstDay(SETTINGS, 0.0)
        again.restore(convert(to_builtins(day.state()), FirstDayState))
        assert again.summary("a", "b") == day.summary("a", "b")
        assert to_builtins(again.state()) == to_builtins(day.state())
        for copy in (day, again):
            randomise(copy, 200, 0.8, 0.6, seed=3)
        assert again.summary("a", "b") == day.summary("a", "b")
        assert again.state().guard == day.state().guard


# --- roles and explanations -------------------------------------------------------------------------------------


def test_decisions_record_what_rule_and_policy_chose() -> None:
    """In every stage; and who decided has no influence on what is recorded."""
    for stage in (Stage.OBSERVE, Stage.TEN, Stage.ALL):
        pair = stage.roles
        assert pair is not None
        members = dict(zip(pair, (Always(ARMS, "large"), Thompson(ARMS))))
        roles = Roles({CHAMPION: members[CHAMPION], **members}, share=0.4)
        roles.compared = pair
        made = roles.decide(
            [make_request(f"What is {i}?") for i in range(400)],
            {},
            np.random.default_rng(1),
            0,
        )
        assert all(leaves_choice(d) for d in made)
        assert {d.rule for d in made} == {"large"}
        assert {d.shadow for d in made} == {"small", "large"}
        by_policy = [d for d in made if not d.shadow_estimates]
        expected = {Stage.OBSERVE: 0.0, Stage.TEN: 0.4, Stage.ALL: 0.6}[stage]
        assert len(by_policy) / 400 == pytest.approx(expected, abs=0.07)
        assert all(d.arm == d.shadow for d in by_policy)
        assert all(d.arm == d.rule for d in made if d.shadow_estimates)
        expectations = [d.tried_estimate("small").latency_s for d in made]
        assert min(expectations) > 0


def test_a_rule_alone_records_nothing_of_a_policy() -> None:
    """Without a policy that is tried, a decision and its explanation are as they always were."""
    roles = Roles({CHAMPION: Static(ARMS), SHADOW: Thompson(ARMS)})
    (made,) = roles.decide([make_request()], {}, np.random.default_rng(1), 0)
    assert made.shadow and not made.rule and not made.shadow_estimates
    assert "first_day" not in explain(Record(made))
    assert CHALLENGER not in roles.members


def test_an_explanation_says_what_the_policy_would_have_done() -> None:
    """With its expectations of both choices; an expectation that it does not have is None, not 0."""
    plain = explain(Record(decision()))
    first_day = plain["first_day"]
    assert (first_day["rule"], first_day["policy"]) == ("large", "small")
    assert first_day["decided_by"] == "rule"
    assert first_day["basis"] == "estimates of the policy itself"
    assert first_day["expected_of_policy"]["score"] == 0.6
    assert first_day["expected_of_rule"]["latency_s"] == 0.5
    assert "The rule chooses large, the policy small" in plain["summary"]
    assert "0.20 s instead of 0.50 s" in plain["summary"]
    unknown = structs.replace(decision(), shadow_estimates=(ArmEstimate("small"),))
    assert explain(Record(unknown))["first_day"]["expected_of_rule"]["score"] is None
    assert explain(Record(decision(tried=True)))["first_day"]["decided_by"] == "policy"
