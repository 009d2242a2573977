"""From the journal to MLflow: figures, traces, restarts; against a real MLflow store."""

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

from deployments.codec import encode
from deployments.exporter import ALL, PAGE, PAGES, Batch, Exporter, Folder
from deployments.journal import Journal
from deployments.memory import Memory
from deployments.runs import Runs, trace_id
from deployments.tracking import Tracker
from policies.registry import make_policy
from policies.types import Arm, Feedback, Objective, Outcome
from policies.window import Window, regret
from tests.fakes import Remote
from tests.gateway import Gateway, eventually
from tests.helpers import make_request

ARMS = (Arm("small", output_price_usd=1e-6), Arm("large", output_price_usd=1e-5))
ASK = make_request(objective=Objective(0.1, 100.0))


class Source:
    """A router without Ray: it decides, observes and scores; a clock is handed in."""

    def __init__(self, folder: Path):
        self.journal = Journal(f"sqlite:///{folder}/journal.db")
        self.memory = Memory(self.journal, lambda: make_policy("thompson", ARMS))
        self.rng = np.random.default_rng(3)
        self.ids: list[str] = []
        self.time_s = 1_800_000_000.0

    async def rows(self, after: int, most: int) -> list[Any]:
        return await asyncio.to_thread(self.journal.rows, after, most)

    async def serve(self, count: int, version: str = "thompson-v0", scored: float = 1.0, at: float = 0.1) -> None:
        """So many requests, one every `at` seconds of the rows' own clock; one write for all, to be quick."""
        flush, self.journal.flush = self.journal.flush, nothing  # type: ignore[method-assign]
        for _ in range(count):
            self.time_s += at
            request = replace(ASK, id=self.memory.identity.new_id(self.time_s))
            (decision,) = self.memory.policy.decide([request], {}, self.rng, self.memory.sequence)
            decision = structs.replace(decision, policy_version=version, time_s=self.time_s)
            self.memory.decided([decision])
            outcome = Outcome(decision.id, ttft_s=0.05, latency_s=0.2, prompt_tokens=9, output_tokens=20, cost_usd=2e-5)
            await self.memory.observe([(decision, outcome)], self.time_s)
            if self.rng.random() < scored:
                score = float(decision.arm == "large")
                await self.memory.feedback([Feedback(decision.id, score, "user", self.time_s)], self.time_s)
            self.ids.append(decision.id)
        self.journal.flush = flush  # type: ignore[method-assign]
        await flush()


async def nothing() -> None:
    """In place of a write."""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    made = Source(tmp_path)
    monkeypatch.setattr("deployments.journal.time.time", lambda: made.time_s)
    return made


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """A store with all its tables; making them takes seconds."""
    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


def open_runs(client: MlflowClient, name: str, start: float = 1.0) -> Runs:
    found = client.get_experiment_by_name(name)
    return Runs(client, found.experiment_id if found else client.create_experiment(name), "a journal", start, {})


def run_of(client: MlflowClient, name: str, version: str, start: float = 1.0) -> Any:
    wanted = f"tags.policy_version = '{version}' and tags.start = '{start:.3f}'"
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id], wanted)
    return run


def test_the_figures_are_those_of_the_latest_decisions(source: Source) -> None:
    """Reward, shares, coverage, quantiles and totals, from the rows alone."""
    asyncio.run(source.serve(120, scored=0.5))
    folder = Folder(5.0, 0.0)
    points = folder.fold(source.journal.rows(0, 10_000)).points
    assert len(points) == 4  # of 12 s: two whole intervals, each of all and of the one version
    last = folder.finish(source.time_s + 60).points[0]
    assert last.version == ALL and last.step == 120
    scored = last.figures["feedback_coverage"]
    assert scored == pytest.approx(last.figures["feedback_total"] / 120) and 0.3 < scored < 0.7
    assert last.figures["share/small"] + last.figures["share/large"] == pytest.approx(1.0)
    assert last.figures["reward"] == pytest.approx(last.figures["score"] - 0.1 * 0.2 - 100.0 * 2e-5)
    assert last.figures["cost_usd_total"] == pytest.approx(120 * 2e-5)
    assert last.figures["ttft_p95_s/large"] == pytest.approx(0.05)
    assert last.figures["fallback_rate"] == 0 == last.figures["error_rate"]


def test_regret_is_what_the_policy_itself_gave_up() -> None:
    """The best eligible arm's expected utility less the choice's; an arm that was removed is no alternative."""
    policy = make_policy("thompson", ARMS)
    (decision,) = policy.decide([make_request()], {}, np.random.default_rng(0), 0)
    worse, best = sorted(decision.estimates, key=lambda e: e.utility)
    best = best._replace(utility=worse.utility + 0.25)
    wrong = structs.replace(decision, arm=worse.arm, estimates=(worse, best))
    assert regret(wrong) == pytest.approx(0.25)
    assert regret(structs.replace(wrong, arm=best.arm)) == 0
    assert regret(structs.replace(wrong, estimates=(worse, best._replace(removed_by="no healthy replica")))) == 0


def test_a_run_for_all_and_one_for_each_version(source: Source, client: MlflowClient) -> None:
    """The versions are children of the start's run; steps are decisions, times those of the journal."""

    async def story() -> None:
        await source.serve(60, "thompson-v0")
        await source.serve(60, "thompson-v1")
        await Exporter(Remote(source), open_runs(client, "versions"), 2.0, 0.0).turn(source.time_s + 60)

    asyncio.run(story())
    whole, first, second = (run_of(client, "versions", v) for v in (ALL, "thompson-v0", "thompson-v1"))
    assert {r.data.tags["mlflow.parentRunId"] for r in (first, second)} == {whole.info.run_id}
    history = client.get_metric_history(whole.info.run_id, "reward")
    assert [m.step for m in history] == sorted(m.step for m in history) and history[-1].step == 120
    assert 1_800_000_000_000 < history[0].timestamp <= history[-1].timestamp <= (source.time_s + 2) * 1000
    assert client.get_metric_history(first.info.run_id, "reward")[-1].step == 60


def test_what_a_restart_repeats_has_one_effect(source: Source, client: MlflowClient) -> None:
    """Exported in three lives, one of which dies before its last word, the points are those of one life."""

    async def lives(name: str, cuts: list[int]) -> None:
        for cut in cuts:
            runs = open_runs(client, name)
            exporter = Exporter(Remote(Cut(source, cut)), runs, 2.0, 0.0)
            await exporter.turn(0.0 if cut < 10_000 else source.time_s + 60)  # 0: nothing is over yet

    asyncio.run(source.serve(400))
    assert source.journal.last_row > 3 * PAGE
    asyncio.run(lives("one life", [10_000]))
    asyncio.run(lives("three lives", [333, 801, 10_000]))
    one, three = (run_of(client, name, ALL).info.run_id for name in ("one life", "three lives"))
    for metric in ("reward", "regret_total", "cost_usd_total", "share/large", "ttft_p95_s/small"):
        points = [
            sorted((m.timestamp, m.step, round(m.value, 9)) for m in client.get_metric_history(run, metric))
            for run in (one, three)
        ]
        assert points[0] == points[1], metric
        assert len(points[0]) >= 20


class Cut:
    """A router whose journal ends at a row."""

    def __init__(self, source: Source, last: int):
        self.source, self.last = source, last

    async def rows(self, after: int, most: int) -> list[Any]:
        return [row for row in await self.source.rows(after, most) if row[0] <= self.last]


def test_a_new_start_has_a_new_run_and_goes_on_in_the_journal(source: Source, client: MlflowClient) -> None:
    """Totals go on, nothing is told twice, and the run of the start before is finished."""

    async def story(start: float) -> None:
        await source.serve(60)
        await Exporter(Remote(source), open_runs(client, "starts", start), 2.0, 0.0).turn(source.time_s + 60)

    asyncio.run(story(1.0))
    asyncio.run(story(2.0))
    before, after = (run_of(client, "starts", ALL, start) for start in (1.0, 2.0))
    assert before.info.status == "FINISHED" and after.info.status == "RUNNING"
    steps = [m.step for m in client.get_metric_history(after.info.run_id, "reward")]
    assert min(steps) > 60 and max(steps) == 120
    assert after.data.metrics["cost_usd_total"] == pytest.approx(120 * 2e-5)


def test_feedback_reaches_the_trace_of_its_decision(source: Source, client: MlflowClient) -> None:
    """However late; a correction replaces, a second source stands beside; and no text is in it."""
    name = "traces"

    async def story() -> None:
        await source.serve(3, scored=0.0)
        runs = open_runs(client, name)
        await Exporter(Remote(source), runs, 2.0, 1.0).turn(source.time_s + 60)
        first = source.ids[0]
        for score, by in ((0.2, "user"), (0.9, "judge"), (0.7, "user")):
            source.time_s += 10
            await source.memory.feedback([Feedback(first, score, by, source.time_s)], source.time_s)
            await Exporter(Remote(source), runs, 2.0, 1.0).turn(source.time_s + 60)  # each after a restart

    asyncio.run(story())
    traces = TracingClient(client.tracking_uri)
    info = traces.get_trace_info(trace_id(source.ids[0]))
    assert {a.source.source_id: a.feedback.value for a in info.assessments} == {"user": 0.7, "judge": 0.9}
    assert {a.source.source_type for a in info.assessments} == {"HUMAN", "LLM_JUDGE"}
    assert info.client_request_id == source.ids[0]
    assert traces.get_trace_info(trace_id(source.ids[1])).assessments == []
    spans = traces.get_trace(trace_id(source.ids[0])).data.spans
    assert {span.name for span in spans} == {"request", "decide", "answer", "first token"}
    assert next(s for s in spans if s.name == "answer").end_time_ns - spans[0].start_time_ns == pytest.approx(2e8, 1e3)


def test_a_window_forgets_what_is_old(source: Source) -> None:
    """Its memory is bounded."""
    asyncio.run(source.serve(80))
    window, folder = Window(size=50), Folder(5.0, 0.0)
    folder._windows[ALL] = window
    folder.fold(source.journal.rows(0, 10_000))
    assert len(window._records) == 50 and window.totals["feedback_total"] == 80


def test_the_tracker_carries_what_a_gateway_did(tmp_path: Path, client: MlflowClient) -> None:
    """Its answers and scores, into the run that it also publishes versions from; after its death into the same one."""
    gateway = Gateway(tmp_path, mlflow_uri=client.tracking_uri, experiment="a gateway", trace_share=1.0)
    client.create_experiment("a gateway", artifact_location=str(tmp_path / "art"))
    with gateway.client:
        ids = [gateway.chat().headers["x-router-decision-id"] for _ in range(5)]
        eventually(lambda: not gateway.ingress.decider._reporting)
        gateway.client.post("/v1/feedback", json={"decision_id": ids[0], "score": 0.25})
        runs = []
        for _ in range(2):
            tracker = Tracker(gateway.settings, gateway.router, 7.0)
            asyncio.run(tracker._track())
            asyncio.run(tracker._exporter.turn(time.time() + 60))
            runs.append(tracker._run_id)
    assert runs[0] == runs[1] == run_of(client, "a gateway", ALL, 7.0).info.run_id
    metrics = client.get_run(runs[0]).data.metrics
    assert metrics["feedback_total"] == 1 and metrics["feedback_coverage"] == pytest.approx(0.2)
    assert metrics["in_flight/small"] == 0 and 0 < metrics["reward"] <= 0.25
    (assessment,) = TracingClient(client.tracking_uri).get_trace_info(trace_id(ids[0])).assessments
    assert assessment.feedback.value == 0.25


def test_a_turn_ends_though_rows_come_faster_than_they_go() -> None:
    """Or nothing else of the tracker would ever have its turn."""
    body = encode(Outcome("d0"))

    class Nowhere:
        def connect(self) -> tuple[int, dict[str, Any]]:
            return 0, {}

        def send(self, _: Batch) -> None:
            pass

    async def endless(after: int, most: int) -> list[tuple[int, float, str, bytes]]:
        return [(after + 1 + i, 0.0, "outcome", body) for i in range(most)]

    exporter = Exporter(Remote(SimpleNamespace(rows=endless)), Nowhere(), 5.0, 0.0)
    assert [asyncio.run(exporter.turn(0.0)) for _ in range(2)] == [PAGES * PAGE] * 2
    assert exporter.row == 2 * PAGES * PAGE


def test_versions_do_not_wait_for_figures(tmp_path: Path, mlflow_uri: str) -> None:
    """One is published though the exporter cannot go on."""
    gateway = Gateway(tmp_path, mlflow_uri=mlflow_uri, experiment="test", publish_every_s=1e-3)

    async def stuck(*_: Any) -> int:
        raise OSError("a figure that MLflow does not take")

    async def play(tracker: Tracker) -> list[Any]:
        registry = await tracker._connect()
        tracker._exporter.turn = stuck  # type: ignore[method-assign]
        with pytest.raises(OSError, match="does not take"):
            await tracker._track()
        return registry.list()

    with gateway.client:
        gateway.chat()
        eventually(lambda: not gateway.ingress.decider._reporting)
        assert len(asyncio.run(play(Tracker(gateway.settings, gateway.router, 7.0)))) == 1


def test_votes_that_count_no_more_leave_the_figures(source: Source) -> None:
    """Also those that are in the window already: lies come before they are found."""
    asyncio.run(source.serve(20))
    folder = Folder(5.0, 0.0)
    folder.fold(source.journal.rows(0, 10_000))
    assert "score" in folder._windows[ALL].figures()
    folder.silenced.add("")  # the owner of them all
    assert "score" not in folder._windows[ALL].figures()
