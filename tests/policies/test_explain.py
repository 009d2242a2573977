"""Explanations of every kind of decision: a story of at most ten lines, and numbers that agree with it."""

import json
import re
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from policies.evaluation.kind_figures import Figures
from policies.events import (
    CALIBRATION,
    FORCED,
    PAIR,
    ArmEstimate,
    Decision,
    Outcome,
    Record,
)
from policies.explain import explain
from policies.profiling.features import NAMES, D, names_of
from policies.registry import make_policy
from policies.story import ENDINGS, FALLBACKS, FLAWS, LINES, story
from policies.types import Arm, ModelState, Objective, Request
from policies.worth import dollars, in_words, probability, rounded
from tests.support.requests import make_profile, make_request

ARMS = (
    Arm("nano", output_price_usd=1e-7),
    Arm("small", output_price_usd=3e-7),
    Arm("large", output_price_usd=1e-6),
    Arm("minilm", tasks=("embed",)),
)
OBJECTIVE = Objective(latency_weight=0.4, cost_weight=1500.0)
DONE = Outcome(
    "r", "ok", 0.12345678901234567, 0.75234567890123456, 20, 14, 5.6123456789e-05
)


def decided(name: str = "thompson", **changed: Any) -> Decision:
    """A decision of a real policy, with some of its fields changed."""
    options = {"arm": "large"} if name == "always" else {}
    policy = make_policy(name, ARMS, options)
    states = {"large": ModelState(in_flight=57.0)}
    (made,) = policy.decide(
        [make_request(objective=OBJECTIVE)], states, np.random.default_rng(3), 12
    )
    return structs.replace(made, time_s=1_764_471_912.25, **changed)


def text(record: Record, *given: Any) -> str:
    """The summary, which is the story."""
    lines = story(record, *given)
    assert 2 <= len(lines) <= LINES and all(
        line.endswith((".", ".)")) for line in lines
    )
    summary = explain(record, *given)["summary"]
    assert summary == "\n".join(lines)
    assert explain(record, *given)["story"] == lines
    return str(summary)


def test_a_decision_reads_as_a_story() -> None:
    """What was seen, who was eligible, the worth of each arm, the chance of the choice, and what came of it."""
    made = decided()
    told = text(Record(made, DONE, {"user": 1.0}), {made.arm: Figures(votes=12)})
    order = [
        "Seen at 2025-11-30T03:05:12.250Z: a chat request of 20 tokens: kind 'arithmetic'",
        "Here a second costs 0.4 score points and a dollar 1500.",
        "Eligible: nano, small, large. Not considered: minilm (does not do the task 'chat').",
        f"{made.arm}: worth ",
        "(n = 12 scored answers of this kind by now)",
        f"{made.arm} was chosen with probability ",
        "Came of it: an answer after 0.75 s (the first token after 0.12 s); 14 tokens, $0.000056; score 1.00 by user, "
        "so it was worth 0.615.",
    ]
    places = [told.index(part) for part in order]
    assert places == sorted(places)
    assert "with 57 in flight" in told
    for arm in {"nano", "small", "large"} - {made.arm}:
        assert f"\n{arm}: worth " in told and "(n = 0)" in told


def test_worth_is_quality_less_time_less_money_less_scarcity() -> None:
    """In the table and in the story, for the numbers that are shown; and it is the utility that decided."""
    for seed in range(20):
        policy = make_policy("thompson", ARMS)
        rng = np.random.default_rng(seed)
        objective = Objective(*rng.uniform((0.0, 0.0), (2.0, 6000.0)))
        states = {"large": ModelState(price=float(rng.choice([0.0, 0.1])))}
        (made,) = policy.decide([make_request(objective=objective)], states, rng, 0)
        table = explain(Record(made))["models"]
        for row, estimate in zip(table, made.estimates, strict=True):
            if row["worth"] is None:
                assert row["arm"] == "minilm"
                continue
            parts = row["quality"] - row["time"] - row["money"] - row["scarcity"]
            assert row["worth"] == pytest.approx(parts, abs=1e-9)
            assert row["worth"] == pytest.approx(estimate.utility, abs=2e-3)
            assert row["drawn"] == pytest.approx(estimate.sampled_utility, abs=3e-3)
        for line in story(Record(made)):
            found = re.match(
                r"(\w+): worth (\S+) = quality (\S+) - time (\S+) \([^)]*\) - money (\S+) \([^)]*\)"
                r"(?: - scarcity (\S+) )?",
                line,
            )
            if found:
                arm, *numbers = found.groups(default="0")
                worth, quality, time, money, scarcity = map(float, numbers)
                parts = quality - time - money - scarcity
                assert worth == pytest.approx(parts, abs=1e-9)
                assert (scarcity > 0) == (states.get(arm, ModelState()).price > 0)


def test_a_model_of_another_task_gets_no_invented_numbers() -> None:
    """Of an embedder nothing is said for a chat; for embeddings there is no quality, but a latency."""
    chat = explain(Record(decided()), {})["models"][-1]
    assert chat["arm"] == "minilm"
    invented = ("worth", "quality", "time", "money", "scarcity", "drawn")
    invented = (*invented, "scored_answers")
    assert [chat[name] for name in (*invented, "latency_s", "availability")] == [
        None
    ] * 9
    request = Request("r", make_profile(task="embed"), Objective(models=("minilm",)))
    (made,) = make_policy("thompson", ARMS).decide(
        [request], {}, np.random.default_rng(0), 0
    )
    made = structs.replace(made, fallback=FORCED)
    own = explain(Record(made, DONE), {})["models"][-1]
    assert own["quality"] is own["worth"] is own["scored_answers"] is None
    assert own["latency_s"] > 0 and own["removed_by"] == ""
    told = text(Record(made, DONE), {})
    assert told.startswith("The client named the model minilm, or sent `auto` a text")
    assert "quality" not in told and "complexity" not in told


def test_a_forced_request_begins_with_it_and_shows_no_choice() -> None:
    """Nothing of eligibility, worth or chance, but what the kind shows, and what came of it."""
    made = decided(fallback=FORCED, arm="large")
    told = text(
        Record(made, DONE),
        {"large": Figures(3, votes=2, score=0.5, score_low=0.1, score_high=0.9)},
    )
    assert told.startswith("The client named the model large; the router did not")
    for absent in ("Eligible", "worth", "probability", "score points", "drawn"):
        assert absent not in told
    assert "The latest answers of the kind 'arithmetic' show: large" in told
    assert told.endswith("$0.000056; no score yet.")


def test_a_calibration_says_that_no_client_asked() -> None:
    """And shows no choice."""
    told = text(Record(decided(fallback=CALIBRATION, arm="small"), DONE))
    assert told.startswith("No client asked: small answered a calibration prompt")
    assert "probability" not in told and "worth" not in told


@pytest.mark.parametrize("fallback", FALLBACKS)
def test_a_fallback_comes_first(fallback: str) -> None:
    """Before what was seen; a second try names the first decision. The choice is explained as always."""
    made = decided(fallback=fallback, retry_of="dec-first", pair="dec-other")
    told = text(Record(made))
    assert told.startswith(FALLBACKS[fallback])
    assert "The first try was the decision dec-first." in told
    assert "\nSeen" in told and "was chosen with probability" in told


def test_both_answers_of_a_pair_name_the_other() -> None:
    """The first was served without exploration; no client got the second. Without a second answer the first says so."""
    first = Record(decided(pair="dec-2", arm="large"), DONE)
    second = Record(decided(pair="dec-1", fallback=PAIR, arm="small"), DONE)
    assert (
        "because small gave a second answer in the background, with the decision dec-2"
        in text(first, None, second)
    )
    assert "so far there is no second answer" in text(first)
    assert "the first answer by large, of the decision dec-1" in text(
        second, None, first
    )


def test_the_first_day_says_what_rule_and_policy_would_have_done() -> None:
    """The numbers are the policy's, and the choice is the rule's; or the other way round."""
    tried = decided().estimates
    by_rule = decided("always", rule="large", shadow="small", shadow_estimates=tried)
    told = text(Record(by_rule))
    assert "large was chosen by the rule 'always'." in told
    assert "As the policy beside the rule sees it, large: worth" in told
    assert "The rule chooses large, the policy small: by its own estimates" in told
    agreed = structs.replace(by_rule, shadow="large")
    assert "rule and policy both choose large" in text(Record(agreed))
    none = structs.replace(by_rule, shadow="")
    assert "the policy would have chosen no model" in text(Record(none))
    blind = structs.replace(by_rule, shadow_estimates=(ArmEstimate("small"),))
    assert "it made no estimate of both" in text(Record(blind))
    by_policy = decided(rule="large", shadow="small", arm="small")
    assert "This decision was that of the policy. The rule" in text(Record(by_policy))


def test_a_static_rule_makes_no_estimates() -> None:
    """Unknown numbers are null, and the story has no worth."""
    made = decided("static")
    table = explain(Record(made))["models"]
    assert {row["worth"] for row in table} == {row["latency_s"] for row in table}
    assert {row["worth"] for row in table} == {None}
    told = text(Record(made))
    assert "was chosen by the rule 'static'" in told and "worth" not in told


def test_the_draw_is_explained_where_it_differs_from_the_mean() -> None:
    """Without exploration nothing is drawn, and the story says so; a choice that others beat was by chance."""
    assert "`drawn` is one sample of what the worth may be" in text(Record(decided()))
    rare = decided(score_chance=0.03)
    told = text(Record(rare))
    assert "an answer is scored with probability 0.03" in told
    assert explain(Record(rare))["score_chance"] == 0.03
    made = decided()
    means = tuple(
        e._replace(sampled_utility=e.utility if not e.removed_by else 0.0)
        for e in made.estimates
    )
    best = max(means[:3], key=lambda e: e.utility).arm
    greedy = structs.replace(made, estimates=means, arm=best)
    told = text(Record(greedy))
    assert "drawn" not in told
    assert "the largest mean; no draw differs" in told
    worst = min(made.estimates[:3], key=lambda e: e.sampled_utility).arm
    chance = structs.replace(made, arm=worst, explore=0.2)
    told = text(Record(chance))
    assert "tried by chance (least_propensity)" in told
    assert "of the requests that will be graded, 20% go to a model by chance" in told
    alone = structs.replace(made, estimates=made.estimates[2:], arm="large")
    assert "there was no other model" in text(Record(alone))


def test_the_profilers_forecast_has_one_phrase() -> None:
    """It is said that it decides nothing; before it has learned anything it is left out."""
    profile = make_profile()
    known = structs.replace(
        decided(arm="large"),
        profile=type(profile)(
            profile.features,
            "chat",
            "arithmetic",
            20,
            expected_output_tokens=16.4,
            sufficiency={"large": 0.553},
            profiler_version=2,
        ),
    )
    told = text(Record(known))
    assert told.count("forecast") == 1
    assert "which decides nothing: 16 tokens instead of" in told
    assert "a chance of 0.55 of a score of at least 0.5" in told
    assert "forecast" not in text(Record(decided()))


def test_many_models_fit_into_ten_lines() -> None:
    """With nine arms, a rule, a pair and a fallback; the arms that have no line of their own share one."""
    arms = tuple(Arm(f"m{n}", output_price_usd=1e-7 * 3**n) for n in range(9))
    (made,) = make_policy("thompson", arms).decide(
        [make_request(objective=OBJECTIVE)], {}, np.random.default_rng(0), 0
    )
    made = structs.replace(made, rule="m1", shadow="m2", pair="x", fallback="router")
    told = text(Record(made, DONE), {})
    assert len(told.splitlines()) == LINES
    (others,) = re.findall(r"Worth of the others: (.*)\.", told)
    in_full = re.findall(r"^(m\d): worth", told, re.M)
    named = re.findall(r"(m\d) -?\d", others)
    assert in_full[0] == made.arm
    assert sorted([*in_full, *named]) == [arm.name for arm in arms]


@pytest.mark.parametrize("status", ENDINGS)
@pytest.mark.parametrize("flaw", ["", *FLAWS])
def test_what_came_of_it_names_ending_and_flaw(status: str, flaw: str) -> None:
    """A flaw is named for complete answers only, and a score that does not count is not shown."""
    finish = "length" if flaw == "cut_off" else "stop"
    outcome = structs.replace(
        DONE,
        status=status,
        flaw="" if flaw == "cut_off" else flaw,
        finish_reason=finish,
        waited_s=0.3,
    )
    record = Record(decided(), outcome, {"user": 0.0}, owners={"user": "bob"})
    told = text(record)
    assert ENDINGS[status].format("0.75 s") in told and "0.30 s of it in the" in told
    assert (FLAWS.get(flaw, "?") in told) == (status == "ok" and flaw != "")
    assert "score 0.00 by user" in told
    record.silenced = {"bob"}
    assert "its scores do not count" in text(record)
    assert "score 0.00" not in text(record)
    record.outcome = None
    assert text(record).endswith("The answer is not complete yet.")


def test_a_trace_without_figures_counts_the_scores_that_the_policy_knew() -> None:
    """The traces in MLflow are made without the figures of the kind."""
    made = decided(known=41)
    assert "(n = 41 scores of all kinds)" in text(Record(made))
    assert "n = " not in text(Record(structs.replace(made, known=-1)))


def test_numbers_are_rounded_and_features_have_names() -> None:
    """No number has more than 9 digits but times since the epoch; features of 0 are left out."""
    figures = Figures(3, 2, 1 / 3, 3, 2 / 3, 1, 1, 1, 1 / 3, 0.1, 0.9, latest_s=1e9 / 7)
    record = Record(decided(paced_weight=300.123456), DONE, {"user": 0.5})
    plain = explain(record, {"large": figures})
    numbers = re.findall(r"-?\d+\.\d+(?:e-?\d+)?", json.dumps(plain))
    mantissas = [re.sub(r"e.*|[-.]", "", number).strip("0") for number in numbers]
    longest = max(mantissas, key=len)
    assert len(numbers) > 50 and len(longest) <= 12, longest
    times = {round(1e9 / 7, 3), plain["time_s"]}
    assert {float(n) for n, m in zip(numbers, mantissas) if len(m) > 7} <= times
    assert plain["time"] == "2025-11-30T03:05:12.250Z"
    assert plain["figures_of_kind"]["large"]["latest"] == "1974-07-12T10:32:22.857Z"
    assert plain["objective"]["cost_weight_of_budget"] == 300.123
    features = plain["profile"]["features"]
    assert features["constant"] == 1.0 and features["kind arithmetic"] == 0.5
    assert set(features) <= set(NAMES) and 0.0 not in features.values()
    assert len(NAMES) == D == len(set(NAMES))
    assert names_of(3) == ("feature 1", "feature 2", "feature 3")


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (in_words(0.0), "0"),
        (in_words(0.000064), "0.000064"),
        (in_words(1234.5), "1234"),
        (in_words(-0.5), "-0.50"),
        (dollars(1e-12), "under $0.000000001"),
        (dollars(0.0), "$0"),
        (probability(1.0), "1.00"),
        (probability(0.9999), "over 0.99"),
        (probability(0.004), "0.004"),
        (probability(1e-18), "under 0.0001"),
        (probability(0.0), "0.00"),
        (rounded(1764471912.123456), 1764471912.123),
        (rounded(0.123456789), 0.123457),
    ],
)
def test_numbers_in_words(made: object, wanted: object) -> None:
    """Decimal notation without an exponent; what is too small is said to be so."""
    assert made == wanted
