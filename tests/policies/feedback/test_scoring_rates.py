"""Scoring rates: the share of its answers that a key scores is learned from the events."""

import pytest
from msgspec import structs

from policies.events import ANY_OWNER, JUDGE, Decision, Event, Feedback, Outcome, Record
from policies.feedback.decision_records import DecisionRecords
from policies.feedback.scoring_rates import MAX_KEYS, ScoringRates
from policies.types import Objective
from tests.support.requests import make_profile


def decision(number: int, owner: str) -> Decision:
    """A decision about a request of this key."""
    return Decision(
        f"d{number}", "small", number, "v", make_profile(), Objective(), owner=owner
    )


def rates(events: list[Event]) -> dict[str, float]:
    """The rates after these events."""
    found = ScoringRates()
    records = DecisionRecords(projection=found)
    for event in events:
        records.apply(event, None)
    return found.rates()


def test_a_new_key_is_taken_to_score_until_it_shows_that_it_does_not() -> None:
    """A key that never scores comes near 0, and one that scores everything stays at 1."""
    events: list[Event] = []
    for n in range(400):
        owner = "silent" if n % 2 else "eager"
        events += [decision(n, owner), Outcome(f"d{n}")]
        if owner == "eager":
            events.append(Feedback(f"d{n}", 1.0, owner=owner))
    found = rates(events)
    assert found["eager"] == 1.0 and found["silent"] == pytest.approx(10 / 210)
    assert rates([decision(0, "new")]) == {}


def test_each_answer_counts_once_and_a_judge_does_not_count() -> None:
    """Corrections, several sources and scores that come before the outcome change nothing."""
    events: list[Event] = []
    for n in range(100):
        events += [
            decision(n, "team"),
            Feedback(f"d{n}", 0.5, JUDGE, owner=ANY_OWNER),
        ]
        if n % 4 == 0:
            events += [
                Feedback(f"d{n}", 1.0, "thumb", 1.0, owner="team"),
                Feedback(f"d{n}", 0.0, "thumb", 2.0, owner="team"),
                Feedback(f"d{n}", 0.0, "form", 3.0, owner="team"),
            ]
        events.append(Outcome(f"d{n}"))
    assert rates(events) == {"team": pytest.approx((25 + 10) / 110)}


def test_scores_of_programs_and_without_keys_count() -> None:
    """Who may score all decisions scores for the key that asked; without keys all requests have one rate."""
    events: list[Event] = []
    for n in range(200):
        owner = "team" if n % 2 else ""
        events += [decision(n, owner), Outcome(f"d{n}")]
        if owner == "" or n % 4 == 1:
            events.append(
                Feedback(f"d{n}", 1.0, "program", owner=ANY_OWNER, given_by="tests")
            )
    found = rates(events)
    assert found[""] == 1.0 and found["team"] == pytest.approx((50 + 10) / 110)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_a_judge_of_the_clients_counts(share: float) -> None:
    """It may have the name of the router's own judge, which grades only answers that were announced."""
    found = ScoringRates()
    records = DecisionRecords(projection=found)
    for n in range(400):
        chance = found.rates().get("", 1.0)
        made = structs.replace(decision(n, ""), score_chance=chance)
        events: list[Event] = [made, Outcome(f"d{n}")]
        if n % 10 < 10 * share:
            events.append(Feedback(f"d{n}", 1.0, JUDGE, owner=ANY_OWNER))
        for event in events:
            records.apply(event, None)
    assert found.rates()[""] == pytest.approx(share, abs=0.05)


def test_failures_are_no_answers_to_score() -> None:
    """They leave the rate where it was."""
    events: list[Event] = []
    for n in range(50):
        events += [decision(n, "team"), Outcome(f"d{n}", "error")]
    assert rates(events) == {}


def test_the_rate_follows_a_change_and_the_memory_is_bounded() -> None:
    """A key that stops to score is found out; the keys that were silent for longest are forgotten."""
    found = ScoringRates()
    record = Record(decision(0, "team"))
    for n in range(6000):
        found.record(Outcome("d0"), record)
        if n < 3000:
            record.owners = {"user": "team"}
            found.record(Feedback("d0", 1.0, owner="team"), record)
    assert found.rates()["team"] < 0.1
    for n in range(MAX_KEYS):
        found.record(Outcome("d0"), Record(decision(0, f"key {n}")))
    assert len(found.rates()) == MAX_KEYS and "team" not in found.rates()
    other = ScoringRates()
    other.restore(found.state())
    assert other.rates() == found.rates()
