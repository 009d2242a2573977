"""The answers of a calibration teach a policy, and are no traffic for what counts traffic."""

import random
from itertools import product

import numpy as np
import pytest
from msgspec import structs

from assets.prompts import reserved_tasks
from assets.tasks import make_task
from policies.coverage import FeedbackCoverage
from policies.evaluation.recent_metrics import Window
from policies.events import (
    ANY_OWNER,
    CALIBRATION,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
)
from policies.feedback.decision_records import DecisionRecords
from policies.feedback.scoring_rates import ScoringRates
from policies.profiling.forecast import length_data, sufficiency_data
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"))


def made(name: str, fallback: str = CALIBRATION, arm: str = "small") -> Decision:
    return Decision(
        name, arm, 0, "v", make_profile(), Objective(), fallback=fallback, scored=0
    )


def finished(
    decision: Decision, score: float | None = 1.0, status: str = "ok"
) -> list[Event]:
    """A decision with its outcome, and its score unless that is None."""
    outcome = Outcome(decision.id, status, 0.0, 0.5, 20, 8, cost_usd=0.5)
    given: list[Event] = [decision, outcome]
    if score is not None:
        source = CALIBRATION if decision.fallback == CALIBRATION else "user"
        owner = ANY_OWNER if source == CALIBRATION else ""
        given.append(Feedback(decision.id, score, source, owner=owner))
    return given


def test_its_scores_teach_without_ticking_the_clock_of_scores() -> None:
    """A score of traffic ticks it once; what was learned before a calibration does not fade by it."""
    policy = Thompson(ARMS)
    records = DecisionRecords()
    for event in finished(made("traffic", "")):
        records.apply(event, policy)
    assert records.scored == 1
    for i in range(500):
        decision = structs.replace(made(f"c{i}", arm="large"), scored=records.scored)
        for event in finished(decision):
            records.apply(event, policy)
    assert records.scored == 1
    policy.advance(501, records.scored)
    # the clock ticked once between the two
    assert policy.state()["quality.count"].tolist() == pytest.approx([1, 500], rel=1e-3)
    record = records.get("c3")
    assert record is not None and record.vote == 1.0 and record.decision.scored == 1


def test_a_correction_of_its_score_does_not_tick_the_clock_either() -> None:
    """Nor does a score that another source adds."""
    records = DecisionRecords()
    for event in finished(made("c")):
        records.apply(event, None)
    for later in (
        Feedback("c", 0.0, CALIBRATION, 9.0, ANY_OWNER),
        Feedback("c", 0.5, "user", 9.0, ""),
    ):
        records.apply(later, None)
    assert records.scored == 0


class Given:
    """Gives each event with its record to a projection, as the router does."""

    def __init__(self, *projections: object):
        self._projections = projections
        self.records = DecisionRecords(projection=self)

    def record(self, event: Event, record: Record) -> None:
        for projection in self._projections:
            getattr(projection, "add", getattr(projection, "record", None))(  # type: ignore[misc]
                event, record
            )


def test_the_metrics_of_traffic_leave_it_out() -> None:
    """No metric of a policy version changes by it, and the scoring rate of the keys does not fall by it."""
    window = Window()
    rates = ScoringRates()
    given = Given(window, rates)
    for event in finished(made("traffic", "")):
        given.records.apply(event, None)
    before = window.figures()
    known = rates.rates()
    for i in range(50):
        for event in finished(made(f"c{i}"), score=0.0):
            given.records.apply(event, None)
    after = window.figures()
    assert after == before
    assert after == before and window.sequence == 0
    assert rates.rates() == known == {"": 1.0}


def test_the_rate_of_feedback_leaves_it_out() -> None:
    """One of two answers to clients has a score. A calibration's answers are always scored: its flaws count fully."""
    given = Given()
    events = [
        *finished(made("scored", "")),
        *finished(made("unscored", ""), None),
        *[e for i in range(40) for e in finished(made(f"c{i}"))],
        *finished(made("flawed"), None, "error"),
    ]
    for event in events:
        given.records.apply(event, None)
    names = ["scored", "unscored", *(f"c{i}" for i in range(40)), "flawed"]
    records = [record for name in names if (record := given.records.get(name))]
    coverage = FeedbackCoverage.of(records)
    assert 0.4 < coverage.rate(records[0]) < 0.6
    assert coverage.rate(records[5]) == 1.0
    labels = sufficiency_data(records, ARMS)
    assert len(labels) == 42 and labels.weight[-1] == 1.0 and labels.y[-1] == 0.0
    assert len(length_data(records).weight) == 42


# share of right answers of nano, small and large (docs/benchmarks/models-and-demo.md)
ACCURACY = {
    "add": (1.0, 1.0, 1.0),
    "compare": (0.98, 1.0, 1.0),
    "copy": (0.96, 1.0, 1.0),
    "initial": (1.0, 1.0, 0.98),
    "count": (0.22, 1.0, 0.82),
    "reverse": (0.9, 1.0, 0.94),
    "sort": (1.0, 1.0, 0.94),
    "sum": (0.56, 1.0, 1.0),
    "chain": (0.0, 0.0, 1.0),
    "multiply": (0.0, 0.02, 1.0),
    "story": (0.0, 0.0, 1.0),
}
SIZES = ("nano", "small", "large")


@pytest.mark.parametrize("seed", range(4))
def test_the_bundled_prompts_teach_which_size_a_kind_needs(seed: int) -> None:
    """Without a false alarm of the drift detector, although nothing was known before."""
    rng = np.random.default_rng(seed)
    policy = Thompson([Arm(name) for name in SIZES])
    records = DecisionRecords()
    tasks = [task for task in reserved_tasks() if task.kind in ACCURACY]
    random.Random(seed).shuffle(tasks)
    ingress = Thompson(policy.arms)
    for number, (task, k) in enumerate(product(tasks, range(3))):
        if number % 30 == 0:
            # the ingress decides on snapshots, which are up to a second old
            ingress.restore(policy.state())
        only = Objective(models=(SIZES[k],))
        request = Request(f"c{number}", make_profile(task.question), only)
        (decided,) = ingress.decide([request], {}, rng, number)
        decision = structs.replace(decided, fallback=CALIBRATION)
        right = float(rng.random() < ACCURACY[task.kind][k])
        for event in finished(decision, right):
            records.apply(event, policy)
    # an alarm would count from 0 again
    assert policy.drift.known == [len(tasks)] * 3 and records.scored == 0
    rows = random.Random(seed)
    expected = {}
    for kind in ("initial", "copy", "chain", "multiply", "story"):
        asked = [make_task(rows, kind, wishes=False).question for _ in range(20)]
        requests = [Request("r", make_profile(text), Objective()) for text in asked]
        decided = policy.decide(requests, {}, rng, 450)
        expected[kind] = np.mean(
            [[d.estimate(name).quality for name in SIZES] for d in decided], axis=0
        )
    for kind in ("chain", "multiply", "story"):
        assert expected[kind][2] > expected[kind][:2].max() + 0.3, expected
    for kind in ("initial", "copy"):
        assert expected[kind].min() > 0.6, expected
