"""MLflow shows what the product knows where MLflow's users look: parameters, notes, costs, comparisons."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.tracing.client import TracingClient

from deployments.journal.journal import Journal
from deployments.router.learner import Learner
from deployments.settings import GatewaySettings, Tuning
from deployments.tracking import descriptions
from deployments.tracking.exporter import ALL, Exporter
from deployments.tracking.mlflow_runs import MlflowRuns
from deployments.tracking.model_registry import MODEL, PolicyRegistry
from deployments.tracking.traces import choice, costs, trace_id
from deployments.tracking.tracker import Tracker
from policies.events import FORCED, Decision, Feedback, Outcome
from policies.registry import make_policy
from policies.types import Arm, Objective
from tests.support.fakes import Remote
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile, make_request

ARMS = (Arm("small", output_price_usd=1e-6), Arm("large", output_price_usd=1e-5))


class Tracked(Gateway):
    """A gateway with a tracker that works when the test calls it."""

    def __init__(self, folder: Path, uri: str, **options: Any):
        options = {"publish_interval_s": 1e6, "trace_sample_rate": 1.0, **options}
        super().__init__(folder, mlflow_uri=uri, experiment="test", **options)
        self.mlflow = MlflowClient(uri, uri)
        self.tracker = Tracker(self.settings, self.router, 1_800_000_000.0)

    def ask(self, **body: Any) -> str:
        """Ask; returns the id of the decision when the router has its outcome."""
        answer = self.chat(**body)
        eventually(lambda: not self.ingress.router_client.outcomes.unsent)
        return str(answer.headers["x-router-decision-id"])

    def track(self) -> None:
        """One turn of the tracker, and the points of the interval."""

        async def turn() -> None:
            await self.tracker._refresh_settings()
            await self.tracker._track()
            await self.tracker._exporter.run_once(time.time() + 120)

        asyncio.run(turn())

    def runs(self, kind: str) -> list[Any]:
        """The runs of a kind, oldest first."""
        experiment = self.mlflow.get_experiment_by_name("test").experiment_id
        order = ["attributes.start_time ASC"]
        return list(
            self.mlflow.search_runs(
                [experiment], f"tags.kind = '{kind}'", order_by=order
            )
        )


@pytest.fixture
def tracked(tmp_path: Path, mlflow_uri: str) -> Any:
    made = Tracked(tmp_path, mlflow_uri)
    with made.client:
        # the router knows the ingresses' settings after their next refresh
        reported = made.router.thing
        eventually(lambda: reported._tuning is not None)
        yield made


def test_a_changed_objective_begins_a_run_with_other_parameters(
    tracked: Tracked,
) -> None:
    """MLflow's comparison then shows what changed; the totals continue, and the earlier run ends."""
    tracked.ask()
    tracked.track()
    tracked.tune(objective={"cost_weight": 7.0})
    eventually(lambda: tracked.router.thing._tuning.objective.cost_weight == 7.0)
    tracked.ask()
    tracked.track()
    before, after = (
        run
        for weight in ("0.0", "7.0")
        for run in tracked.runs("live")
        if run.data.params["objective.cost_weight"] == weight
    )
    differ = {
        name
        for name, value in before.data.params.items()
        if after.data.params[name] != value
    }
    assert differ == {"objective.cost_weight", "objective.latency_weight"}
    assert (before.info.status, after.info.status) == ("FINISHED", "RUNNING")
    assert after.data.metrics["decisions_total"] == 2
    params = after.data.params
    assert json.loads(params["presets"])["fast"]["latency_weight"] == 5
    assert params["output_price_usd_per_million/large"] == "10.0"
    assert params["code"] == descriptions.code_digest()
    assert params["version/mlflow"] and params["policy"] == "thompson"
    for run in tracked.runs("arm") + tracked.runs("version"):
        assert run.data.params.keys() == params.keys()


def test_every_page_says_what_its_numbers_mean(tracked: Tracked) -> None:
    """The experiment, each run, the registered model and each version have a description."""
    tracked.ask()
    tracked.track()
    assert asyncio.run(tracked.tracker._promotions.publish()) == 1
    experiment = tracked.mlflow.get_experiment_by_name("test")
    texts = [experiment.tags[descriptions.NOTE]]
    for kind in ("live", "arm", "version"):
        runs = tracked.runs(kind)
        assert runs, kind
        texts += [run.data.tags[descriptions.NOTE] for run in runs]
    texts.append(tracked.mlflow.get_registered_model(MODEL).description)
    version = tracked.mlflow.get_model_version(MODEL, "1")
    texts.append(version.description)
    assert all(len(text) > 100 for text in texts)
    for word in ("reward", "regret", "share"):
        assert f"| {word}" in texts[0]


def test_all_sizes_are_lines_of_one_chart(tracked: Tracked) -> None:
    """Each size has a run with metrics of the same names, which MLflow draws in one chart; an embedder has its own."""
    for _ in range(3):
        for model in ("small", "large"):
            decision_id = tracked.ask(model=model)
            score = {"decision_id": decision_id, "score": float(model == "large")}
            tracked.client.post("/v1/feedback", json=score)
        tracked.ask()
    embedded = {"model": "auto", "input": "a text"}
    assert tracked.client.post("/v1/embeddings", json=embedded).status_code == 200
    eventually(lambda: not tracked.ingress.router_client.outcomes.unsent)
    tracked.track()
    arms = {run.data.tags["arm"]: run for run in tracked.runs("arm")}
    assert arms.keys() == {"small", "large", "minilm"}
    state = tracked.client.get("/v1/router/state").json()["models"]
    (live,) = tracked.runs("live")
    for name, run in arms.items():
        assert run.data.tags["live_run"] == live.info.run_id
        assert (
            "mlflow.parentRunId" not in run.data.tags
        )  # MLflow would hide it in charts
        for metric in ("score", "availability", "latency_p50_s", "answers", "cost_usd"):
            known = state[name]["figures"][metric]
            assert run.data.metrics.get(metric) == pytest.approx(known), metric
        assert run.data.metrics.get("share", 0.0) == state[name]["share"]
    assert arms["small"].data.metrics["score"] == 0.0
    assert arms["large"].data.metrics["score"] == 1.0
    # no score of an embedding is ever learned, so nothing is expected
    assert state["minilm"]["expected_quality"] is None
    assert "expected_quality/minilm" not in live.data.metrics
    assert live.data.metrics["expected_quality/large"] > 0


def test_one_id_names_the_journal_everywhere(tracked: Tracked) -> None:
    """In the tags and the data of the runs, and in the version and its files; the version's run is its source."""
    tracked.ask()
    tracked.track()
    asyncio.run(tracked.tracker._promotions.publish())
    own = tracked.router.thing._journal.id
    for kind in ("live", "arm", "version"):
        for run in tracked.runs(kind):
            assert run.data.tags["journal"] == own
            (data,) = run.inputs.dataset_inputs
            assert (data.dataset.name, data.dataset.digest) == ("journal", own)
    version = tracked.mlflow.get_model_version(MODEL, "1")
    assert version.tags["journal"] == own and own in version.tags["data"]
    source = tracked.mlflow.get_run(version.run_id)
    assert source.info.run_name == source.data.tags["policy_version"] == "thompson-v1"
    assert [f.path for f in tracked.mlflow.list_artifacts(version.run_id)] == ["policy"]
    # the metrics of its decisions are in the same run
    eventually(
        lambda: tracked.chat().headers["x-router-policy-version"] == "thompson-v1"
    )
    tracked.ask()
    tracked.track()
    routed = tracked.mlflow.get_run(version.run_id).data.metrics
    assert routed["decisions_total"] >= 2


def test_the_run_of_a_retired_version_ends_with_its_last_decision(
    tmp_path: Path, mlflow_uri: str
) -> None:
    """Not when the tracker or the system ends; a decision that arrives late moves the end."""
    client = MlflowClient(mlflow_uri, mlflow_uri)
    experiment = client.get_experiment_by_name("test").experiment_id
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    memory = Learner(journal, lambda: make_policy("thompson", ARMS))
    clock = SimpleNamespace(now=1_800_000_000.0)

    async def serve(version: str, at: float) -> None:
        clock.now = 1_800_000_000.0 + at
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("deployments.journal.journal.time.time", lambda: clock.now)
            request = replace(make_request(), id=memory.ids.new_id(clock.now))
            (decision,) = memory.policy.decide(
                [request], {}, np.random.default_rng(0), memory.sequence
            )
            made = decision.made(request, version, clock.now)
            memory.record_decisions([made])
            await memory.observe([(made, Outcome(made.id, "ok", 0.1, 0.2))], clock.now)
            await journal.flush()

    async def rows(after: int, most: int) -> list[Any]:
        return journal.rows(after, most)

    def connect() -> tuple[MlflowRuns, Exporter]:
        runs = MlflowRuns(client, experiment, journal.id, 1_799_999_990.0, {})
        return runs, Exporter(Remote(SimpleNamespace(rows=rows)), runs, 1.0, 0.0)

    def ends() -> dict[str, tuple[str, int | None]]:
        found = client.search_runs([experiment], "tags.kind = 'version'")
        return {
            run.data.tags["policy_version"]: (run.info.status, run.info.end_time)
            for run in found
        }

    async def story() -> None:
        runs, exporter = connect()
        for second in range(5):
            await serve("thompson-v1", second + 0.5)
        await serve("thompson-v2", 60.5)
        await exporter.run_once(clock.now + 100)
        runs.finish({"thompson-v1", "thompson-v2"})
        assert {status for status, _ in ends().values()} == {"RUNNING"}
        runs.finish({"thompson-v2"})
        # a score of an old answer is no decision
        (first,) = [e for _, e in journal.replay() if isinstance(e, Decision)][:1]
        await memory.feedback([Feedback(first.id, 1.0, "user", clock.now)], clock.now)
        await journal.flush()
        await exporter.run_once(clock.now + 200)
        runs.finish({"thompson-v2"})
        assert ends()["thompson-v1"] == ("FINISHED", 1_800_000_005_000)
        assert ends()["thompson-v2"] == ("RUNNING", None)
        # an ingress still decided with its snapshot
        await serve("thompson-v1", 63.2)
        await exporter.run_once(clock.now + 300)
        # also by a tracker that was restarted
        runs, exporter = connect()
        await exporter.run_once(clock.now + 300)
        runs.finish({"thompson-v2"})
        assert ends()["thompson-v1"] == ("FINISHED", 1_800_000_064_000)

    asyncio.run(story())
    (live,) = client.search_runs([experiment], "tags.kind = 'live'")
    assert live.info.start_time == 1_799_999_990_000


def test_runs_of_an_earlier_start_end_when_its_system_last_reported(
    tmp_path: Path, mlflow_uri: str
) -> None:
    """A system that was killed at noon and started at one o'clock did not run until one."""
    client = MlflowClient(mlflow_uri, mlflow_uri)
    experiment = client.get_experiment_by_name("test").experiment_id
    first = MlflowRuns(client, experiment, "ab12", 1_800_000_000.0, {})
    first.connect()
    client.log_metric(first.run_id, "uptime_s", 3600.0)
    second = MlflowRuns(client, experiment, "ab12", 1_800_007_200.0, {})
    second.connect()
    ended = client.get_run(first.run_id).info
    assert (ended.status, ended.end_time) == ("FINISHED", 1_800_003_600_000)


def test_the_export_of_an_earlier_release_is_continued(mlflow_uri: str) -> None:
    """Its runs carry another name of the same journal."""
    client = MlflowClient(mlflow_uri, mlflow_uri)
    experiment = client.get_experiment_by_name("test").experiment_id
    tags = {"journal": "48e007ca", "start": "1.000", "policy_version": ALL}
    tags |= {"journal_row": "77", "totals": '{"": {"decisions_total": 20.0}}'}
    client.create_run(experiment, tags=tags)
    runs = MlflowRuns(
        client, experiment, "e3a0e343", 2.0, {}, former_journal="48e007ca"
    )
    assert runs.connect() == (77, {"": {"decisions_total": 20.0}})
    assert client.get_run(runs.run_id).data.tags["journal_row"] == "77"


def test_traces_carry_cost_model_and_who_chose(tracked: Tracked) -> None:
    """MLflow's view of costs adds them up; tags tell forced from routed, and only a failed model is an error."""
    routed = tracked.ask(model="auto")
    forced = tracked.ask(model="large")
    tracked.track()
    traces = TracingClient(tracked.mlflow.tracking_uri)
    experiment = tracked.mlflow.get_experiment_by_name("test").experiment_id

    def found(condition: str) -> set[str]:
        return {
            trace.info.client_request_id
            for trace in traces.search_traces([experiment], condition)
        }

    assert found("tags.choice = 'forced'") == {forced}
    assert found("tags.choice = 'routed'") == {routed}
    trace = traces.get_trace(trace_id(forced))
    (answer,) = [s for s in trace.data.spans if s.span_type == "LLM"]
    events = [e for _, e in Journal(tracked.settings.journal).replay()]
    (outcome,) = [
        e for e in events if isinstance(e, Outcome) and e.decision_id == forced
    ]
    assert outcome.cost_usd > 0
    assert answer.llm_cost["total_cost"] == outcome.cost_usd
    assert answer.model_name == "large"
    assert trace.info.cost["total_cost"] == outcome.cost_usd
    assert trace.info.token_usage["output_tokens"] == outcome.output_tokens


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("ok", "OK"),
        ("disconnected", "OK"),
        ("rejected", "OK"),
        ("error", "ERROR"),
    ],
)
def test_only_a_failure_of_the_model_is_an_error(
    client_of_traces: tuple[MlflowClient, str], status: str, state: str
) -> None:
    """A 429 is not the model's fault; the tag `status` says what it was. The name of the key is the trace's user."""
    client, experiment = client_of_traces
    runs = MlflowRuns(client, experiment, "ab12", 1.0, {}, arms={"large": ARMS[1]})
    decision = Decision(
        f"dec-{status}",
        "large",
        0,
        "thompson-v1",
        make_profile(),
        Objective(),
        owner="anna",
        time_s=1_800_000_000.0,
        fallback=FORCED,
    )
    outcome = Outcome(decision.id, status, 0.0, 0.5, 100, 10, 1e-4)
    from policies.events import Record

    runs._send_traces([Record(decision, outcome)])
    info = TracingClient(client.tracking_uri).get_trace_info(trace_id(decision.id))
    assert info.state.value == state
    assert info.tags["status"] == status
    assert info.trace_metadata["mlflow.trace.user"] == "anna"


@pytest.fixture
def client_of_traces(mlflow_uri: str) -> tuple[MlflowClient, str]:
    client = MlflowClient(mlflow_uri, mlflow_uri)
    return client, client.get_experiment_by_name("test").experiment_id


def test_costs_are_divided_by_the_prices() -> None:
    """The sum is exactly that of the journal, whatever the prices are now."""
    arm = Arm("large", prompt_price_usd=1e-6, output_price_usd=3e-6)
    outcome = Outcome("d", prompt_tokens=300, output_tokens=100, cost_usd=5e-4)
    divided = costs(outcome, arm)
    assert divided["total_cost"] == 5e-4
    assert divided["input_cost"] == pytest.approx(2.5e-4)
    assert divided["input_cost"] + divided["output_cost"] == pytest.approx(5e-4)
    for other in (None, Arm("free")):
        assert costs(outcome, other)["output_cost"] == 5e-4
    decision = Decision("d", "large", 0, "v", make_profile(), Objective())
    assert choice(decision) == "routed"


def test_parameters_name_no_secret_and_are_short_enough() -> None:
    """MLflow refuses a value of more than 6,000 characters; with many presets it is cut."""
    settings = GatewaySettings.model_validate(
        {"models": {"small": {}}, "keys": {"file": "/etc/router/keys.json"}}
    )
    presets = {f"preset-{n}": {"latency_weight": n} for n in range(500)}
    found = descriptions.parameters(
        settings, Tuning.model_validate({"presets": presets})
    )
    assert max(map(len, found.values())) <= descriptions.LONGEST
    assert not any("keys.json" in value for value in found.values())
    assert descriptions.digest(found) != descriptions.digest(
        {**found, "policy": "uniform"}
    )


def test_old_versions_are_removed_with_their_files(mlflow_uri: str) -> None:
    """Never one with an alias, a report, a role that was given lately, or one that the router works with."""
    from tests.deployments.tracking.test_model_registry import make_snapshot

    registry = PolicyRegistry(mlflow_uri, "test")
    run = registry.start_run("a run", {})
    for _ in range(9):
        registry.publish(make_snapshot(), run)
    registry.client.set_registered_model_alias(MODEL, "before-friday", "1")
    registry.attach_report(2, {"promote": False})
    registry.tag(3, {"champion_since": time.strftime("%Y-%m-%dT%H:%M:%SZ")})
    registry.tag(4, {"champion_since": "2020-01-01T00:00:00Z"})
    files = registry.client.get_model_version(MODEL, "6").run_id
    assert registry.client.list_artifacts(files, "policy")
    assert registry.prune(3, {5}) == (4, 6)
    left = [version["version"] for version in registry.list()]
    assert left == [9, 8, 7, 5, 3, 2, 1]
    assert registry.client.list_artifacts(files, "policy") == []
    assert registry.client.get_run(files).info.status  # the metrics stay
    assert registry.prune(3, {5}) == ()
    assert registry.load(5).sequence == 41
