"""Tests of the export of the journal to MLflow: metrics, traces and restarts, with a real MLflow store."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.tracing.client import TracingClient
from msgspec import structs

from deployments.journal.codec import encode
from deployments.journal.journal import Journal
from deployments.router.learner import Learner
from deployments.tracking.exporter import (
    ALL,
    ARM_PREFIX,
    PAGE,
    PAGES,
    Batch,
    Exporter,
    MetricsAggregator,
    Point,
)
from deployments.tracking.mlflow_runs import MlflowRuns
from deployments.tracking.traces import trace_id
from deployments.tracking.tracker import Tracker
from policies.constraints import Exclusion
from policies.evaluation.kind_figures import RecentFigures, regret
from policies.evaluation.recent_metrics import Window
from policies.events import FORCED, Feedback, Outcome
from policies.registry import make_policy
from policies.types import Arm, Objective
from tests.support.fakes import Remote
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_request

ARMS = (Arm("small", output_price_usd=1e-6), Arm("large", output_price_usd=1e-5))
ASK = make_request(objective=Objective(0.1, 100.0))


class Source:
    """A router without Ray that decides, observes and scores, with a clock of its own."""

    def __init__(self, folder: Path):
        self.journal = Journal(f"sqlite:///{folder}/journal.db")
        self.memory = Learner(self.journal, lambda: make_policy("thompson", ARMS))
        self.rng = np.random.default_rng(3)
        self.ids: list[str] = []
        self.time_s = 1_800_000_000.0

    async def rows(self, after: int, most: int) -> list[Any]:
        return await asyncio.to_thread(self.journal.rows, after, most)

    async def serve(
        self,
        count: int,
        version: str = "thompson-v0",
        scored: float = 1.0,
        at: float = 0.1,
        fallback: str = "",
    ) -> None:
        """Serve `count` requests, one every `at` seconds of the source's clock, and write all of them at once."""
        flush = self.journal.flush
        self.journal.flush = nothing  # type: ignore[method-assign]
        for _ in range(count):
            self.time_s += at
            request = replace(ASK, id=self.memory.ids.new_id(self.time_s))
            (decision,) = self.memory.policy.decide(
                [request], {}, self.rng, self.memory.sequence
            )
            decision = structs.replace(
                decision,
                policy_version=version,
                time_s=self.time_s,
                fallback=fallback,
            )
            self.memory.record_decisions([decision])
            outcome = Outcome(
                decision.id,
                ttft_s=0.05,
                latency_s=0.2,
                prompt_tokens=9,
                output_tokens=20,
                cost_usd=2e-5,
            )
            await self.memory.observe([(decision, outcome)], self.time_s)
            if self.rng.random() < scored:
                score = float(decision.arm == "large")
                await self.memory.feedback(
                    [Feedback(decision.id, score, "user", self.time_s)], self.time_s
                )
            self.ids.append(decision.id)
        self.journal.flush = flush  # type: ignore[method-assign]
        await flush()


async def nothing() -> None:
    """Replaces the write of each row."""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    made = Source(tmp_path)
    monkeypatch.setattr("deployments.journal.journal.time.time", lambda: made.time_s)
    return made


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """An MLflow store with all tables, shared by the module because creating them takes seconds."""
    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


def open_runs(client: MlflowClient, name: str, start: float = 1.0) -> MlflowRuns:
    found = client.get_experiment_by_name(name)
    return MlflowRuns(
        client,
        found.experiment_id if found else client.create_experiment(name),
        "a journal",
        start,
        {},
    )


def run_of(client: MlflowClient, name: str, version: str, start: float = 1.0) -> Any:
    wanted = f"tags.policy_version = '{version}' and tags.start = '{start:.3f}'"
    (run,) = client.search_runs(
        [client.get_experiment_by_name(name).experiment_id], wanted
    )
    return run


def of_all(batch: Batch | None) -> Point:
    """The only point of all decisions in a batch."""
    assert batch is not None
    (point,) = [point for point in batch.points if point.version == ALL]
    return point


async def test_the_metrics_describe_the_latest_decisions(source: Source) -> None:
    """Reward, shares, coverage, quantiles and totals are computed from the rows alone."""
    await source.serve(120, scored=0.5)
    aggregator = MetricsAggregator(5.0, 0.0)
    points = aggregator.aggregate(source.journal.rows(0, 10_000)).points
    # 12 s have two whole intervals, each with a point of ALL and of the version
    assert sum(not point.version.startswith(ARM_PREFIX) for point in points) == 4
    last = of_all(aggregator.finish(source.time_s + 60))
    assert last.step == 120
    scored = last.figures["feedback_coverage"]
    assert (
        scored == pytest.approx(last.figures["feedback_total"] / 120)
        and 0.3 < scored < 0.7
    )
    assert last.figures["share/small"] + last.figures["share/large"] == pytest.approx(
        1.0
    )
    assert last.figures["reward"] == pytest.approx(
        last.figures["score"] - 0.1 * 0.2 - 100.0 * 2e-5
    )
    assert last.figures["cost_usd_total"] == pytest.approx(120 * 2e-5)
    assert last.figures["ttft_p95_s/large"] == pytest.approx(0.05)
    assert last.figures["fallback_rate"] == 0 == last.figures["error_rate"]


def test_regret_is_the_utility_that_the_policy_itself_gave_up() -> None:
    """Regret is the expected utility of the best eligible arm less that of the choice; removed arms do not count."""
    policy = make_policy("thompson", ARMS)
    (decision,) = policy.decide([make_request()], {}, np.random.default_rng(0), 0)
    worse, best = sorted(decision.estimates, key=lambda e: e.utility)
    best = best._replace(utility=worse.utility + 0.25)
    wrong = structs.replace(decision, arm=worse.arm, estimates=(worse, best))
    assert regret(wrong) == pytest.approx(0.25)
    assert regret(structs.replace(wrong, arm=best.arm)) == 0
    assert (
        regret(
            structs.replace(
                wrong,
                estimates=(
                    worse,
                    best._replace(removed_by=Exclusion.NO_REPLICA.sentence()),
                ),
            )
        )
        == 0
    )


def test_all_decisions_have_a_run_and_each_version_has_a_child_run(
    source: Source, client: MlflowClient
) -> None:
    """Runs of versions are children of the start's run; steps count decisions, times are those of the journal."""

    async def story() -> None:
        await source.serve(60, "thompson-v0")
        await source.serve(60, "thompson-v1")
        await Exporter(
            Remote(source), open_runs(client, "versions"), 2.0, 0.0
        ).run_once(source.time_s + 60)

    asyncio.run(story())
    whole, first, second = (
        run_of(client, "versions", v) for v in (ALL, "thompson-v0", "thompson-v1")
    )
    assert {r.data.tags["mlflow.parentRunId"] for r in (first, second)} == {
        whole.info.run_id
    }
    history = client.get_metric_history(whole.info.run_id, "reward")
    assert [m.step for m in history] == sorted(m.step for m in history) and history[
        -1
    ].step == 120
    assert (
        1_800_000_000_000
        < history[0].timestamp
        <= history[-1].timestamp
        <= (source.time_s + 2) * 1000
    )
    assert client.get_metric_history(first.info.run_id, "reward")[-1].step == 60


def test_rows_that_are_exported_again_after_a_restart_count_once(
    source: Source, client: MlflowClient
) -> None:
    """An exporter restarted twice, once before it wrote its progress, writes the points of one without restart."""

    async def lives(name: str, cuts: list[int]) -> None:
        for cut in cuts:
            runs = open_runs(client, name)
            exporter = Exporter(Remote(Cut(source, cut)), runs, 2.0, 0.0)
            # at 0 no interval has ended yet
            await exporter.run_once(0.0 if cut < 10_000 else source.time_s + 60)

    asyncio.run(source.serve(400))
    assert source.journal.last_row > 3 * PAGE
    asyncio.run(lives("one life", [10_000]))
    asyncio.run(lives("three lives", [333, 801, 10_000]))
    one, three = (
        run_of(client, name, ALL).info.run_id for name in ("one life", "three lives")
    )
    for metric in (
        "reward",
        "regret_total",
        "cost_usd_total",
        "share/large",
        "ttft_p95_s/small",
    ):
        points = [
            sorted(
                (m.timestamp, m.step, round(m.value, 9))
                for m in client.get_metric_history(run, metric)
            )
            for run in (one, three)
        ]
        assert points[0] == points[1], metric
        assert len(points[0]) >= 20


class Cut:
    """A router whose journal ends at a given row."""

    def __init__(self, source: Source, last: int):
        self.source = source
        self.last = last

    async def rows(self, after: int, most: int) -> list[Any]:
        return [
            row for row in await self.source.rows(after, most) if row[0] <= self.last
        ]


def test_a_new_start_has_a_new_run_and_continues_in_the_journal(
    source: Source, client: MlflowClient
) -> None:
    """Totals continue, no row is exported twice, and the run of the previous start is finished."""

    async def story(start: float) -> None:
        await source.serve(60)
        await Exporter(
            Remote(source), open_runs(client, "starts", start), 2.0, 0.0
        ).run_once(source.time_s + 60)

    asyncio.run(story(1.0))
    asyncio.run(story(2.0))
    before, after = (run_of(client, "starts", ALL, start) for start in (1.0, 2.0))
    assert before.info.status == "FINISHED" and after.info.status == "RUNNING"
    steps = [m.step for m in client.get_metric_history(after.info.run_id, "reward")]
    assert min(steps) > 60 and max(steps) == 120
    assert after.data.metrics["cost_usd_total"] == pytest.approx(120 * 2e-5)


async def test_feedback_reaches_the_trace_of_its_decision(
    source: Source, client: MlflowClient
) -> None:
    """A late score arrives, a correction replaces it, and a second source gets a second assessment."""
    name = "traces"

    await source.serve(3, scored=0.0)
    runs = open_runs(client, name)
    await Exporter(Remote(source), runs, 2.0, 1.0).run_once(source.time_s + 60)
    first = source.ids[0]
    for score, by in ((0.2, "user"), (0.9, "judge"), (0.7, "user")):
        source.time_s += 10
        await source.memory.feedback(
            [Feedback(first, score, by, source.time_s)], source.time_s
        )
        # each score is exported after a restart
        exporter = Exporter(Remote(source), runs, 2.0, 1.0)
        await exporter.run_once(source.time_s + 60)
    traces = TracingClient(client.tracking_uri)
    info = traces.get_trace_info(trace_id(source.ids[0]))
    assert {a.source.source_id: a.feedback.value for a in info.assessments} == {
        "user": 0.7,
        "judge": 0.9,
    }
    assert {a.source.source_type for a in info.assessments} == {"HUMAN", "LLM_JUDGE"}
    assert info.client_request_id == source.ids[0]
    assert traces.get_trace_info(trace_id(source.ids[1])).assessments == []
    spans = traces.get_trace(trace_id(source.ids[0])).data.spans
    assert {span.name for span in spans} == {
        "request",
        "decide",
        "answer",
        "first token",
    }
    assert next(s for s in spans if s.name == "answer").end_time_ns - spans[
        0
    ].start_time_ns == pytest.approx(2e8, 1e3)


def test_a_version_is_billed_for_the_requests_that_it_routed(
    source: Source, client: MlflowClient
) -> None:
    """Requests that name a model carry the champion's version; they have metrics of their own in the live run."""

    async def story() -> None:
        await source.serve(40, "thompson-v1")
        await source.serve(90, "thompson-v1", fallback=FORCED)
        await source.serve(10, "thompson-v2", fallback=FORCED)
        await Exporter(Remote(source), open_runs(client, "bills"), 2.0, 0.0).run_once(
            source.time_s + 60
        )

    asyncio.run(story())
    whole, version = (run_of(client, "bills", v) for v in (ALL, "thompson-v1"))
    assert version.data.metrics["cost_usd_total"] == pytest.approx(40 * 2e-5)
    assert version.data.metrics["decisions_total"] == 40
    assert not any(name.startswith("forced/") for name in version.data.metrics)
    live = whole.data.metrics
    assert live["cost_usd_total"] == pytest.approx(40 * 2e-5)
    assert live["forced/cost_usd_total"] == pytest.approx(100 * 2e-5)
    assert live["forced/decisions_total"] == 100
    experiment = client.get_experiment_by_name("bills").experiment_id
    # version 2 has routed nothing, so it has no run
    (only,) = client.search_runs([experiment], "tags.kind = 'version'")
    assert only.info.run_id == version.info.run_id


async def test_the_figures_by_kind_are_logged_once_a_minute(source: Source) -> None:
    """In the run of all versions, at the first interval of each minute and before a pause; so MLflow stays small."""
    await source.serve(400, at=0.5)
    aggregator = MetricsAggregator(5.0, 0.0)
    points = aggregator.aggregate(source.journal.rows(0, 10_000)).points
    last = aggregator.finish(source.time_s + 60)
    assert last is not None and len(points) > 70
    with_kinds = [
        point
        for point in points + last.points
        if any(name.startswith("kind/") for name in point.figures)
    ]
    assert {point.version for point in with_kinds} == {ALL}
    # 200 s have three whole minutes and parts of two, and the pause at the end has one more
    assert len(with_kinds) in (4, 5) and with_kinds[-1] is of_all(last)
    newest = with_kinds[-1].figures
    kind = ASK.profile.kind
    assert sum(newest[f"kind/{kind}/{arm.name}/answers"] for arm in ARMS) == 400
    assert newest[f"kind/{kind}/large/score"] == 1.0
    # an arm that is wrong every time has a line
    assert newest[f"kind/{kind}/small/score"] == 0.0


async def test_an_arm_that_has_left_the_window_of_a_kind_has_no_answers(
    source: Source,
) -> None:
    """Its last mean stays in MLflow at its own time, with a later point that says that nothing supports it now."""
    await source.serve(300, at=1.0)
    aggregator = MetricsAggregator(5.0, 0.0)
    aggregator._kinds = RecentFigures(5)
    points = aggregator.aggregate(source.journal.rows(0, 10_000)).points
    name = f"kind/{ASK.profile.kind}/small/answers"
    counts = [point.figures[name] for point in points if name in point.figures]
    # `small` is wrong every time, so it is hardly asked in the end
    assert counts[0] > 0 and counts[-1] == 0


async def test_a_window_keeps_a_bounded_number_of_decisions(source: Source) -> None:
    """A window of 50 has 50 records after 80 decisions; its totals count all."""
    await source.serve(80)
    window = Window(size=50)
    aggregator = MetricsAggregator(5.0, 0.0)
    aggregator._windows[ALL] = window
    aggregator.aggregate(source.journal.rows(0, 10_000))
    assert len(window._routed) == 50 and window.totals["feedback_total"] == 80


def test_the_tracker_exports_the_requests_of_a_gateway(
    tmp_path: Path, client: MlflowClient
) -> None:
    """Answers and scores reach the run to which versions belong; a restarted tracker uses the same run."""
    gateway = Gateway(
        tmp_path,
        mlflow_uri=client.tracking_uri,
        experiment="a gateway",
        trace_sample_rate=1.0,
    )
    client.create_experiment("a gateway", artifact_location=str(tmp_path / "art"))
    with gateway.client:
        ids = [gateway.chat().headers["x-router-decision-id"] for _ in range(5)]
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        gateway.client.post("/v1/feedback", json={"decision_id": ids[0], "score": 0.25})
        runs = []
        for _ in range(2):
            tracker = Tracker(gateway.settings, gateway.router, 7.0)
            asyncio.run(tracker._track())
            asyncio.run(tracker._exporter.run_once(time.time() + 60))
            runs.append(tracker._run_id)
    assert runs[0] == runs[1] == run_of(client, "a gateway", ALL, 7.0).info.run_id
    metrics = client.get_run(runs[0]).data.metrics
    assert metrics["feedback_total"] == 1 and metrics[
        "feedback_coverage"
    ] == pytest.approx(0.2)
    # one vote is too few for a reward
    assert metrics["in_flight/small"] == 0 and metrics["votes"] == 1
    assert "reward" not in metrics and metrics["decisions_total"] == 5
    (assessment,) = (
        TracingClient(client.tracking_uri).get_trace_info(trace_id(ids[0])).assessments
    )
    assert assessment.feedback.value == 0.25


def test_an_export_run_ends_even_if_rows_arrive_faster_than_they_are_exported() -> None:
    """Otherwise the tracker would never reach its other work."""
    body = encode(Outcome("d0"))

    class Nowhere:
        def connect(self) -> tuple[int, dict[str, Any]]:
            return 0, {}

        def send(self, _: Batch) -> None:
            pass

    async def endless(after: int, most: int) -> list[tuple[int, float, str, bytes]]:
        return [(after + 1 + i, 0.0, "outcome", body) for i in range(most)]

    exporter = Exporter(Remote(SimpleNamespace(rows=endless)), Nowhere(), 5.0, 0.0)
    assert [asyncio.run(exporter.run_once(0.0)) for _ in range(2)] == [PAGES * PAGE] * 2
    assert exporter.row == 2 * PAGES * PAGE


def test_versions_are_published_even_if_the_export_fails(
    tmp_path: Path, mlflow_uri: str
) -> None:
    """The tracker publishes a version while MLflow rejects the metrics."""
    gateway = Gateway(
        tmp_path, mlflow_uri=mlflow_uri, experiment="test", publish_interval_s=1e-3
    )

    async def stuck(*_: Any) -> int:
        raise OSError("a figure that MLflow does not take")

    async def play(tracker: Tracker) -> list[Any]:
        registry = await tracker._connect()
        tracker._exporter.run_once = stuck  # type: ignore[method-assign]
        with pytest.raises(OSError, match="does not take"):
            await tracker._track()
        return registry.list()

    with gateway.client:
        gateway.chat()
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        assert (
            len(asyncio.run(play(Tracker(gateway.settings, gateway.router, 7.0)))) == 1
        )


async def test_scores_of_suspended_keys_leave_the_metrics(source: Source) -> None:
    """Scores already in the window are removed, too, because a key is suspended only after it has scored."""
    await source.serve(20)
    aggregator = MetricsAggregator(5.0, 0.0)
    aggregator.aggregate(source.journal.rows(0, 10_000))
    assert "score" in aggregator._windows[ALL].figures()
    aggregator.silenced.add("")  # the key of all these scores
    assert "score" not in aggregator._windows[ALL].figures()
