"""The promotion gate, and the regression test after a promotion."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.statistics.offpolicy import WORLDS
from benchmarks.statistics.regression import watch_once
from benchmarks.statistics.worlds import BETTER, CHAMPION, WORSE, collect
from policies.evaluation.overlap import LoggedDecisions
from policies.rollout.promotion_gate import may_promote
from policies.rollout.regression_watch import RegressionTest


@pytest.fixture(scope="module")
def logs() -> list[tuple[LoggedDecisions, np.ndarray]]:
    """40 logs of Thompson sampling."""
    return list(collect(WORLDS["clear"], 40, 3000, seed=21))


def test_a_worse_challenger_is_refused_and_a_better_one_promoted(
    logs: list[tuple[LoggedDecisions, np.ndarray]],
) -> None:
    """On logs that neither of them collected."""
    worse = [may_promote(data, CHAMPION[kinds], WORSE[kinds]) for data, kinds in logs]
    better = [may_promote(data, CHAMPION[kinds], BETTER[kinds]) for data, kinds in logs]
    assert not any(report["promote"] for report in worse)
    assert sum(bool(report["promote"]) for report in better) >= 30


def test_the_report_is_plain_data_and_says_why(
    logs: list[tuple[LoggedDecisions, np.ndarray]],
) -> None:
    """It goes through JSON unchanged, with the verdict in words."""
    data, kinds = logs[0]
    report = may_promote(data, CHAMPION[kinds], BETTER[kinds])
    assert json.loads(json.dumps(report)) == report
    assert str(report["reason"]).startswith("promoted: the challenger's reward is +0.")
    assert report["lower"] < report["difference"]["value"] < report["upper"]  # type: ignore[index,operator]
    assert report["challenger"]["ess"] > 100  # type: ignore[index]


def test_an_insufficient_log_promotes_no_policy(
    logs: list[tuple[LoggedDecisions, np.ndarray]],
) -> None:
    """The reason is the log's, and names the policy that it cannot judge."""
    data, kinds = logs[0]
    certain = replace(data, propensities=np.eye(3)[data.chosen])
    report = may_promote(certain, certain.propensities, BETTER[kinds])
    assert not report[
        "promote"
    ] and "challenger: the log is made without chance" in str(report["reason"])
    assert json.loads(json.dumps(report)) == report


def test_a_challenger_that_decides_alike_is_not_promoted(
    logs: list[tuple[LoggedDecisions, np.ndarray]],
) -> None:
    """There is nothing to gain."""
    data, kinds = logs[0]
    report = may_promote(data, BETTER[kinds], BETTER[kinds])
    assert (
        report["reason"] == "refused: champion and challenger decide alike"
        and not report["promote"]
    )


@given(st.integers(0, 39), st.floats(0, 0.2), st.floats(0, 0.2))
@settings(max_examples=15, deadline=None)
def test_a_larger_margin_never_helps(
    logs: list[tuple[LoggedDecisions, np.ndarray]],
    which: int,
    margin: float,
    further: float,
) -> None:
    """Who beats the champion by more beats it by less."""
    data, kinds = logs[which]
    reports = [
        may_promote(data, CHAMPION[kinds], BETTER[kinds], m)
        for m in (margin, margin + further)
    ]
    assert reports[0]["promote"] or not reports[1]["promote"]


def test_repeated_looks_ask_for_more(
    logs: list[tuple[LoggedDecisions, np.ndarray]],
) -> None:
    """The confidence sequence is wider than the interval of one look, and around the same value."""
    for data, kinds in logs[:5]:
        once, often = (
            may_promote(data, CHAMPION[kinds], BETTER[kinds], repeated=r)
            for r in (False, True)
        )
        assert often["lower"] < once["lower"] < once["upper"] < often["upper"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("reference", "share", "within"), [(0.7, 0.0, 400), (None, 0.2, 2500)]
)
@pytest.mark.parametrize("change", [0, 1000])
def test_a_regression_is_rolled_back(
    reference: float | None, share: float, within: int, change: int
) -> None:
    """A level of 0.7 that falls to 0.5, at once or later, is noticed, by a reference and by a predecessor."""
    ends = [
        watch_once(
            RegressionTest(reference),
            np.random.default_rng(seed),
            change,
            0.2,
            share,
            change + within,
        )
        for seed in range(15)
    ]
    assert sum(end > change for end in ends) >= 13


@pytest.mark.parametrize(("reference", "share"), [(0.7, 0.0), (None, 0.2)])
def test_false_alarms_are_rare_however_long_one_looks(
    reference: float | None, share: float
) -> None:
    """A policy exactly as good as before is rolled back in at most 5 % of all cases."""
    ends = [
        watch_once(
            RegressionTest(reference), np.random.default_rng(seed), 0, 0.0, share, 1500
        )
        for seed in range(60)
    ]
    assert sum(end > 0 for end in ends) <= 3


def test_a_bad_day_of_both_is_no_regression() -> None:
    """Beside its predecessor, a policy is not blamed for requests that get harder for both."""
    alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        watch = RegressionTest()
        for n in range(2000):
            # the predecessor's answers get feedback half as often, which does not matter either
            old = bool(rng.random() < 0.2)
            reward = float(rng.random() < (0.8 if n < 1000 else 0.4))
            watch.observe(
                float("nan") if old and rng.random() < 0.5 else reward, predecessor=old
            )
        alarms += watch.roll_back
    assert alarms <= 1


@given(
    st.lists(st.one_of(st.just(float("nan")), st.floats(0, 1)), max_size=200),
    st.integers(0, 200),
)
@settings(max_examples=25, deadline=None)
def test_a_regression_test_continues_from_its_state(
    rewards: list[float], cut: int
) -> None:
    """Through JSON and back in the middle, the verdict and the evidence are the same."""
    whole = RegressionTest(0.6)
    first = RegressionTest(0.6)
    second = RegressionTest(0.6)
    for i, reward in enumerate(rewards):
        whole.observe(reward)
        if i < cut:
            first.observe(reward)
    second.restore(json.loads(json.dumps(first.state())))
    for reward in rewards[cut:]:
        second.observe(reward)
    assert second.report() == whole.report()


def test_once_rolled_back_it_stays_so() -> None:
    """Better rewards afterwards do not bring a policy back; the report says what was seen."""
    watch = RegressionTest(0.9)
    while not watch.observe(0.0):
        assert watch.observations < 100
    for _ in range(500):
        watch.observe(1.0)
    report = watch.report()
    assert (
        watch.roll_back
        and report["roll_back"]
        and str(report["reason"]).startswith("rolled back")
    )
    assert json.loads(json.dumps(report)) == report


def test_a_margin_tolerates_what_it_says() -> None:
    """A policy that is worse by less than the margin stays; without a margin it goes."""
    rng = np.random.default_rng(4)
    strict = RegressionTest(0.7)
    lenient = RegressionTest(0.7, margin=0.15)
    for reward in (rng.random(2000) < 0.57).astype(float):
        strict.observe(float(reward)), lenient.observe(float(reward))
    assert strict.roll_back and not lenient.roll_back


def test_memory_is_bounded() -> None:
    """However long it watches, it keeps a fixed number of starts."""
    watch = RegressionTest(0.5)
    for i in range(8000):
        watch.observe(float(i % 2 or i % 3 == 0))
    assert len(json.dumps(watch.state())) < 50_000 and not watch.roll_back


def test_invalid_arguments_of_a_regression_test_are_errors() -> None:
    """Each error names the wrong argument."""
    for options, message in (
        ({"alpha": 0.0}, "alpha"),
        ({"margin": -1.0}, "margin"),
        ({"reference": 3.0}, "reference"),
    ):
        with pytest.raises(ValueError, match=message):
            RegressionTest(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of the bounds"):
        RegressionTest(0.5).observe(2.0)
    with pytest.raises(ValueError, match="needs"):
        RegressionTest(0.5).restore({})
