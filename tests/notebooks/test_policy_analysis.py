"""The notebook runs from top to bottom, on the bundled log and on a journal; what its numbers say is right."""

import lzma
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from mlflow import MlflowClient

from deployments.journal.journal import Journal
from notebooks import analysis, figures, report
from notebooks.decision_log import BUNDLED, DecisionLog, load, log_of
from policies.events import (
    FORCED,
    ArmEstimate,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
)
from policies.types import Arm, Objective
from tests.policies.feedback import test_reputation
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"))


def answered(
    name: str, arm: str, sequence: int, score: float, fallback: str = ""
) -> list[Event]:
    """A decision, its outcome and its score."""
    estimates = tuple(ArmEstimate(a.name, propensity=0.5, quality=0.5) for a in ARMS)
    decision = Decision(
        name,
        arm,
        sequence,
        "thompson-v1",
        make_profile(),
        Objective(),
        estimates,
        fallback,
    )
    return [decision, Outcome(name, "ok", 0.1, 0.3, 20, 9), Feedback(name, score)]


@pytest.fixture(scope="module")
def log() -> DecisionLog:
    return load()


def test_the_notebook_runs_and_its_report_reaches_mlflow(tmp_path: Path) -> None:
    """A figure for every call, in one HTML file without any link to another; MLflow has it."""
    notebook = report.execute()
    page = report.to_html(notebook)
    assert page.count("data:image/png;base64,") == len(figures.ALL)
    assert "the bundled log of `make demo` with seed 1" in page
    assert "2026-11-23" in page and "thompson-v0" in page
    assert "750 of 750 routed decisions" in page and "..." not in page
    assert (
        page.count("How to read it") == len(figures.ALL)
        and "Traceback" not in page
        and 'src="http' not in page
    )
    (tmp_path / "report.html").write_text(page)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_experiment("a product", artifact_location=str(tmp_path / "art"))
    run = report.log_to_mlflow(
        client.tracking_uri, "a product", [tmp_path / "report.html"]
    )
    assert [file.path for file in client.list_artifacts(run)] == ["report.html"]


def test_the_bundled_log_is_small_and_has_no_text(log: DecisionLog) -> None:
    """No prompt, answer, hash or id of a request; features only."""
    assert BUNDLED.stat().st_size < 500_000
    assert b"dec-" not in lzma.decompress(BUNDLED.read_bytes())
    for record in log.records:
        assert (
            record.decision.prompt == record.decision.prompt_hash == ""
            and record.decision.fallback != FORCED
        )
        assert record.outcome is not None and record.outcome.answer == ""


def test_the_log_is_the_demo_that_was_measured(log: DecisionLog) -> None:
    """Arm by arm and task by task, and the scores are the checks of the answers."""
    assert log.truth is not None
    auto = log.truth[log.truth.strategy == "auto"]
    frame = analysis.decisions(log)
    assert (frame.arm.to_numpy() == auto.model.to_numpy()).all()
    assert frame.score.to_numpy() == pytest.approx(auto.right.to_numpy())
    assert frame.utility.mean() == pytest.approx(
        auto.utility.mean(), abs=0.02
    )  # the client's clock, and the router's


async def test_a_journal_of_other_models_is_a_log_of_these(
    log: DecisionLog, tmp_path: Path
) -> None:
    """The arms are those of its own decisions, without the one that only embeds; prices by the file that is named."""
    renamed = {"nano": "qwen3-4b", "small": "elsewhere", "large": "qwen3-14b"}
    url = f"sqlite:///{tmp_path}/journal.db"
    journal = Journal(url)
    for record in log.records[:40]:
        decision = record.decision
        seen = tuple(
            e._replace(arm=renamed[e.arm])
            for e in decision.estimates
            if e.arm in renamed
        )
        seen += (ArmEstimate("qwen3-embedding", removed_by="it cannot do chat"),)
        journal.put(
            msgspec.structs.replace(decision, arm=renamed[decision.arm], estimates=seen)
        )
    await journal.flush()
    found = load(url, "serve_config.gpu.yaml")
    assert len(found.records) == 40 and found.names == list(renamed.values())
    assert [arm.output_price_usd for arm in found.arms] == pytest.approx(
        [0.12e-6, 0.0, 0.4e-6]
    )


def test_the_figures_by_kind_are_those_of_all_answers(log: DecisionLog) -> None:
    """Counted from the records by hand, for every arm and kind; a cell without a score has no point in the figure."""
    table = analysis.kinds(log)
    assert table.decisions.sum() == len(log.records)
    frame = analysis.decisions(log)
    for row in table.itertuples():
        part = frame[(frame.kind == row.kind) & (frame.arm == row.arm)]
        assert row.decisions == len(part) and row.scored == part.scored.sum()
        assert row.latency_p95_s == pytest.approx(part.latency_s.quantile(0.95))
        assert row.score_low <= row.score <= row.score_high or row.votes == 0
        votes = [log.records[n].vote for n in part.n if log.records[n].vote is not None]
        assert row.votes == len(votes)
        assert np.isnan(row.score) if not votes else row.score == np.mean(votes)
    assert table.votes.max() > 40 and table.score.nunique() > 5


def test_the_window_of_the_figures_by_kind_includes_forced_decisions() -> None:
    """A forced answer shows as much of its model as any other; figures without a score or an answer are drawn, too."""
    events = [
        event
        for n in range(30)
        for event in answered(f"{n}", "small", n, 0.5, FORCED if n < 20 else "")
    ]
    events += answered("new", "large", 30, 0.0)[:1]
    log = log_of(events, ARMS)
    table = analysis.kinds(log).set_index("arm")
    assert table.answers["small"] == 30 and table.routed["small"] == 10
    assert table.answers["large"] == 0 and np.isnan(table.availability["large"])
    small = analysis.kinds(log, size=11).set_index("arm").answers["small"]
    assert small == 10
    axes = figures.kinds(log).axes
    assert [len(axis.collections) > 0 for axis in axes] == [True] * 3


def test_the_first_day_is_shown_by_kind(log: DecisionLog) -> None:
    """Rows for each kind and for all, with the number of requests; a log without a first day gives no row."""
    estimates = (
        ArmEstimate("small", 0.6, 0.2, 1e-6, 0.5),
        ArmEstimate("large", 0.7, 0.5, 5e-6, 0.4),
    )
    records = []
    for n, (kind, shadow) in enumerate(
        [("chat", "small"), ("chat", "large"), ("code", "small"), ("code", "small")]
    ):
        made = Decision(
            f"d{n}",
            "large",
            n,
            "always-v0",
            replace(make_profile(), kind=kind),
            Objective(),
            shadow=shadow,
            rule="large",
            shadow_estimates=estimates,
        )
        records.append(Record(made))
    table = analysis.first_day(DecisionLog(ARMS, [], records))
    assert table["requests"].to_dict() == {"chat": 2, "code": 2, "all": 4}
    assert table["agreement"].to_dict() == {"chat": 0.5, "code": 0.0, "all": 0.25}
    assert table.loc["code", "expected_score"] == pytest.approx(-0.1)
    assert table.loc["chat", "expected_latency_s"] == pytest.approx(-0.15)
    assert analysis.first_day(log).empty


def test_off_policy_intervals_cover_what_was_measured(log: DecisionLog) -> None:
    """Where chance decided, every fixed arm and the static rules; the log of the learner refuses to guess."""
    found = analysis.evaluations(log, explored=True).dropna(subset=["measured"])
    assert len(found) == len(log.names) + 1 and (found.refused == "").all()
    assert ((found.dr_low < found.measured) & (found.measured < found.dr_high)).all()
    assert (
        (found.sequence_low < found.measured) & (found.measured < found.sequence_high)
    ).all()
    itself = analysis.evaluations(log).set_index("target")
    assert "hardly ever tried" in itself.refused["nano"]


def test_regret_against_the_best_of_each_task_only_grows(log: DecisionLog) -> None:
    """That is, of every fixed size; and it grows least for `auto`, which has learned, in the last third."""
    regret = analysis.measured_regret(log)
    assert (
        regret is not None and (regret[log.names].diff().dropna() >= -1e-9).all().all()
    )
    last = regret.iloc[-1] - regret.iloc[2 * len(regret) // 3]
    assert last.idxmin() == "auto"


def test_an_arm_has_the_same_colour_everywhere(log: DecisionLog) -> None:
    """And no two have the same."""
    colour = figures.colours(log)
    drawn = {
        line.get_label(): line.get_color()
        for line in figures.shares(log).axes[0].get_lines()
    }
    assert drawn == {arm: colour[arm] for arm in log.names}
    assert (
        len({colour[name] for name in [*log.names, "auto", "static rules"]})
        == len(log.names) + 2
    )


def test_figures_show_utilities_below_0(log: DecisionLog) -> None:
    """Where answers are dear or slow, every estimate, measured value and bar is still within its axis, and so is 0."""
    assert log.truth is not None
    poor = replace(log, truth=log.truth.assign(utility=log.truth.utility - 1.2))
    found = analysis.evaluations(poor, explored=True)
    shown = found[
        ["measured", "ips_low", "dr_low", "sequence_low", "ips_high", "sequence_high"]
    ].to_numpy()
    strategies = analysis.strategies(poor).utility
    assert np.nanmax(shown[:, 0]) < 0 and strategies.max() < 0
    for axis, values in (
        (figures.evaluation(poor).axes[1], shown),
        (figures.evaluation(log).axes[0], analysis.evaluations(log).sequence_high),
        (figures.frontier(poor).axes[2], strategies),
        (figures.frontier(log).axes[2], analysis.strategies(log).utility),
    ):
        low, high = axis.get_xlim()
        assert low < min(0, np.nanmin(values)) and max(0, np.nanmax(values)) < high


def test_a_policy_learned_anew_from_the_log_expects_what_was_seen(
    log: DecisionLog,
) -> None:
    """Within three standard deviations of its own belief, for every arm and kind with enough scores."""
    frame = analysis.posterior(log)
    seen = frame[frame.answers >= 40]
    assert len(seen) >= 4
    assert (np.abs(seen["mean"] - seen.seen) < 3 * seen.sd).all()


def test_what_was_learned_from_the_first_decisions_knows_nothing_of_later_ones() -> (
    None
):
    """Neither what clients forced later nor how long ago it all is; what they forced before does count."""
    first = [
        event
        for n in range(99)
        for event in answered(f"{n}", "small", n, 0.5, FORCED if n % 2 else "")
    ]
    later = [
        e
        for n in range(99, 900)
        for e in answered(f"{n}", "large", n, 0.1, "" if n % 2 else FORCED)
    ]
    log = log_of(first + later, ARMS)
    alone = log_of(first, ARMS)
    then = log.learned(upto=50).state()
    wanted = alone.learned().state()
    assert len(alone.records) == 50 and then.keys() == wanted.keys()
    assert all(np.array_equal(then[key], wanted[key]) for key in wanted)
    assert log.learned(upto=0).quality.total_scores.sum() == 0  # type: ignore[attr-defined]


def test_what_came_first_goes_by_the_order_of_the_log() -> None:
    """Two ingresses count for themselves, and an outcome may be written down before its decision."""
    order = [("a", 5), ("b", 0), ("c", 6), ("d", 0), ("e", 1)]
    first, second, *rest = [
        answered(name, "small", sequence, 0.5) for name, sequence in order
    ]
    events = [event for made in (first, second[::-1], *rest) for event in made]
    log = log_of(events, ARMS)
    assert [record.decision.id for record in log.records] == list("abcde")
    assert all(record.outcome and record.scores for record in log.records)
    then = log.learned(upto=2).state()
    wanted = log_of(events[:6], ARMS).learned().state()
    assert all(np.array_equal(then[key], wanted[key]) for key in wanted)
    assert log.learned(upto=2).quality.total_scores.sum() == pytest.approx(
        4.0, abs=0.02
    )  # type: ignore[attr-defined]


def test_the_votes_of_keys_that_the_router_silenced_do_not_count_here_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In no record, and in nothing that is learned anew: as if such a key had never scored."""
    monkeypatch.setattr(
        "policies.thompson.drift.THRESHOLD", 1e9
    )  # it goes by the order: what it cut is not given back
    given = list(test_reputation.votes(["honest"] * 8 + ["hostile"], 400))
    _, trust, learned = test_reputation.fold(iter(given))
    assert list(trust.silenced) == ["8 hostile"]
    log = log_of([event for both in given for event in both], ARMS)
    assert [r.decision.id for r in log.records if not r.explicit_scores()] == [
        d.id for d, _ in given if d.owner in trust.silenced
    ]
    policy = log.learned()
    policy.advance(10_000)
    assert test_reputation.same(policy.state(), learned)
