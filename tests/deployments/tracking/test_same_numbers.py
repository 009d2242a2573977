"""The state, Prometheus, MLflow, the journal and the notebook report the same numbers for the same decisions."""

import asyncio
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from deployments.journal.codec import decode
from deployments.journal.journal import Journal
from deployments.tracking.tracker import Tracker
from notebooks.analysis import decisions as decisions_of
from notebooks.decision_log import log_of
from policies.evaluation.kind_figures import Figures, FigureTable
from policies.evaluation.recent_metrics import KIND_METRICS
from policies.events import FORCED, Decision, Event, Feedback, Outcome
from policies.worth import rounded
from tests.deployments.dispatch.test_admission import takes
from tests.support import exposition
from tests.support.exposition import Metric
from tests.support.fakes import failing
from tests.support.gateway import Gateway, eventually

# a request's own wish: `small` is asked first, because it is the cheapest
CHEAP = {"cost_weight": 1e6}
CODE = "Write a python function that sorts."
POEM = "Write a poem."
# Requests that the load may send for each reading. All together are fewer than the decisions in a window of figures:
# a kind that has left the window is absent from the state, and is NaN in Prometheus.
A_READING = 100


@dataclass(frozen=True)
class Numbers:
    """What every surface must agree on; the definitions are in kind_figures.py."""

    routed: int
    forced: int
    answers: int
    scores: int
    scored: int
    feedback: int
    cost_usd: float
    regret: float
    dearest_cost_usd: float

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Numbers)
        mine = list(vars(self).values())
        return mine == pytest.approx(list(vars(other).values()), rel=1e-9)


class Traffic:
    """Sends the requests and scores of the test through HTTP."""

    def __init__(self, gateway: Gateway):
        self.gateway = gateway

    def ask(self, text: str = "What is 3 plus 5?", **body: Any) -> str:
        """Ask a question; returns the id of the decision that answered."""
        messages = [{"role": "user", "content": text}]
        answer = self.gateway.chat(messages=messages, **body)
        assert answer.status_code == 200, answer.text
        return str(answer.headers["x-router-decision-id"])

    def score(self, decision_id: str, score: float, source: str = "user") -> str:
        """Score an answer; returns the status of the score."""
        body = {"decision_id": decision_id, "score": score, "source": source}
        answer = self.gateway.client.post("/v1/feedback", json=body)
        return str(answer.json()["status"])

    def wait(self) -> None:
        """Wait until the router has all outcomes."""
        outcomes = self.gateway.ingress.router_client.outcomes
        eventually(lambda: not outcomes.unsent)

    def play(self) -> None:
        """Traffic with everything that has made the surfaces differ."""
        models = self.gateway.models
        routed = [
            self.ask(text) for text in (CODE, POEM, "Sort the letters: b a c") * 8
        ]
        routed += [self.ask(stream=True) for _ in range(3)]
        forced = [self.ask(model=arm) for arm in ("small", "large", "small")]
        embedded = self.gateway.client.post(
            "/v1/embeddings", json={"model": "auto", "input": "a text"}
        )
        assert embedded.status_code == 200
        # a score that arrives before its decision, with a correction of it
        self.gateway.router.broken = True
        early = self.ask(CODE)
        self.gateway.router.broken = False
        assert [self.score(early, 1.0), self.score(early, 0.5)] == [
            "pending",
            "pending",
        ]
        self.wait()
        self._snapshot()
        # late scores; two sources on one decision; corrections, one of them to the same value; repetitions
        for n, decision_id in enumerate(routed[:24] + forced[:1]):
            assert self.score(decision_id, n % 2) == "accepted"
        assert self.score(routed[0], 0.8, "judge") == "accepted"
        assert self.score(routed[1], 0.25) == "accepted"
        assert self.score(routed[2], 0.0) == "duplicate"
        assert self.score(routed[0], 0.9, "judge") == "accepted"
        self._fail(models)
        self._hedge(models)
        self.wait()

    def _snapshot(self) -> None:
        """A snapshot in the middle: a restart replays only what follows."""
        learner = self.gateway.router.thing._learner
        assert self.gateway.client.portal is not None
        self.gateway.client.portal.call(learner.save)

    def _fail(self, models: dict[str, Any]) -> None:
        """A failure of a forced model, and a failover from a failed one."""
        models["small"].script = failing(RuntimeError())
        assert self.gateway.chat(model="small").status_code == 503
        self.score(self.ask(CODE, router=CHEAP), 1.0)
        models["small"].script = None

    def _hedge(self, models: dict[str, Any]) -> None:
        """A slow model that loses to its hedge."""
        self.gateway.tune(hedge_after_fraction=0.05)
        models["small"].script = takes(5.0)
        answer = self.gateway.chat(router={**CHEAP, "max_latency_s": 2.0})
        assert answer.headers["x-router-fallback"] == "hedge"
        models["small"].script = None
        self.score(answer.headers["x-router-decision-id"], 1.0)


def events_of(path: Path, last_row: int) -> list[Event]:
    """The events up to this row, by reading the database without the product's code for journals."""
    rows = sqlite3.connect(path).execute(
        "select kind, body from events where row <= ? order by row", (last_row,)
    )
    return [decode(kind, body) for kind, body in rows]


def of_journal(path: Path, last_row: int = 10**9) -> Numbers:
    """The numbers up to this row, without the product's code for records."""
    events = events_of(path, last_row)
    decisions = {e.id: e for e in events if isinstance(e, Decision)}
    outcomes = {e.decision_id: e for e in events if isinstance(e, Outcome)}
    given = [e for e in events if isinstance(e, Feedback)]
    forced = sum(d.fallback == FORCED for d in decisions.values())
    # A source's same score twice in a row changes nothing. Of its scores before the decision the last one counts.
    rows_of = {e.id: n for n, e in enumerate(events) if isinstance(e, Decision)}
    changes: dict[tuple[str, str], list[float]] = {}
    for n, event in enumerate(events):
        if not isinstance(event, Feedback) or event.decision_id not in rows_of:
            continue
        values = changes.setdefault((event.decision_id, event.source), [])
        if n < rows_of[event.decision_id]:
            values.clear()
        if not values or values[-1] != event.score:
            values.append(event.score)
    kept = {(e.decision_id, e.source) for e in given if e.decision_id in decisions}
    chosen = [d for d in decisions.values() if d.fallback != FORCED]
    regrets, dearest = [], []
    for decision in chosen:
        possible = [e for e in decision.estimates if not e.removed_by]
        (mine,) = [e for e in decision.estimates if e.arm == decision.arm]
        best = max((e.utility for e in possible), default=mine.utility)
        regrets.append(max(0.0, best - mine.utility))
        outcome = outcomes.get(decision.id)
        if outcome is not None and outcome.status == "ok":
            dearest.append(max((e.cost_usd for e in possible), default=0.0))
    return Numbers(
        routed=len(decisions) - forced,
        forced=forced,
        answers=sum(o.status in ("ok", "error") for o in outcomes.values()),
        scores=len(kept),
        scored=len({decision_id for decision_id, _ in kept}),
        feedback=sum(map(len, changes.values())),
        cost_usd=sum(o.cost_usd for o in outcomes.values()),
        regret=sum(regrets),
        dearest_cost_usd=sum(dearest),
    )


def of_state(state: dict[str, Any]) -> Numbers:
    counts = state["counts"]
    return Numbers(**{name: counts[name] for name in Numbers.__annotations__})


def of_prometheus(made: dict[str, Metric]) -> Numbers:
    def total(name: str, **tags: tuple[str, ...]) -> float:
        """Sum of a counter's samples with these values of tags."""
        return sum(
            value
            for key, value in made[f"ray_router_{name}"].values.items()
            if all(dict(key)[tag] in wanted for tag, wanted in tags.items())
        )

    arms = ("small", "large", "minilm")
    forced = total("decisions", arm=arms, fallback=("forced",))
    scores = total("feedback", status=("accepted",))
    return Numbers(
        routed=int(total("decisions", arm=arms) - forced),
        forced=int(forced),
        answers=int(total("outcomes", status=("ok", "error"))),
        scores=int(scores),
        scored=int(total("scored_decisions")),
        feedback=int(scores + total("feedback", status=("corrected",))),
        cost_usd=total("cost_usd"),
        regret=total("regret"),
        dearest_cost_usd=total("estimated_dearest_cost_usd"),
    )


def of_mlflow(metrics: dict[str, float]) -> Numbers:
    both = {
        name: metrics[f"{name}_total"] + metrics.get(f"forced/{name}_total", 0.0)
        for name in ("answers", "scores", "scored", "feedback", "cost_usd")
    }
    return Numbers(
        routed=int(metrics["decisions_total"]),
        forced=int(metrics.get("forced/decisions_total", 0.0)),
        regret=metrics["regret_total"],
        dearest_cost_usd=metrics["dearest_cost_usd_total"],
        **both,  # type: ignore[arg-type]
    )


# gauges about the latest routed decisions, by the names that the state and MLflow have for them
ROUTED = {
    "reward": "reward",
    "votes": "reward_votes",
    "regret": "mean_regret",
    "estimated_saving": "estimated_saving",
}


def routed_of_prometheus(made: dict[str, Metric]) -> dict[str, float]:
    return {
        name: made[f"ray_router_{gauge}"].values[()] for name, gauge in ROUTED.items()
    }


def kinds_of_prometheus(made: dict[str, Metric]) -> dict[str, float]:
    """The gauges by kind, under the names that MLflow has for them."""
    quantiles = {"0.5": "latency_p50_s", "0.95": "latency_p95_s"}
    found = {}
    for name, metric in made.items():
        figure = name.removeprefix("ray_router_kind_")
        figure = figure.replace("per_second", "per_s")
        if figure == name:
            continue
        for key, value in metric.values.items():
            tags = dict(key)
            label = quantiles.get(tags.get("quantile", ""), figure)
            found[f"kind/{tags['kind']}/{tags['arm']}/{label}"] = value
    return found


def kinds_of_state(state: dict[str, Any]) -> dict[str, float]:
    return {
        f"kind/{kind}/{arm}/{name}": figures[name]
        for arm, model in state["models"].items()
        for kind, figures in model["kinds"].items()
        for name in KIND_METRICS
        if figures[name] is not None
    }


def test_every_surface_reports_the_same_numbers(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions, answers, scores, costs, and the figures of each arm and kind, in total and after a restart."""
    made = exposition.record(monkeypatch)
    gateway = Gateway(tmp_path, mlflow_uri=mlflow_uri, experiment="test")
    traffic = Traffic(gateway)
    with gateway.client:
        traffic.play()
        router = gateway.router.thing
        assert gateway.client.portal is not None
        gateway.client.portal.call(router._maintain)
        state = gateway.client.get("/v1/router/state").json()
        # the waiting scores of the play have taken effect
        assert made["ray_router_feedback_pending"].values[()] == 0
        tracker = Tracker(gateway.settings, gateway.router, 7.0)
        asyncio.run(tracker._track())
        asyncio.run(tracker._exporter.run_once(time.time() + 120))
        metrics = (
            MlflowClient(mlflow_uri, mlflow_uri).get_run(tracker._run_id).data.metrics
        )
        known = [
            e.id
            for e in events_of(tmp_path / "journal.db", 10**9)
            if isinstance(e, Decision)
        ]
        gateway_answers = {
            decision_id: gateway.client.get(
                f"/v1/router/decisions/{decision_id}"
            ).json()
            for decision_id in known
        }
        assert state["journal"]["row"] == gateway.router.thing._journal.last_row
        roles = made["ray_router_role_version"].values
        assert roles == {(("role", "champion"),): 0.0}

    journal = of_journal(tmp_path / "journal.db")
    # the traffic had what it should have
    assert journal.scores > journal.scored > 10 and journal.feedback > journal.scores
    events = [e for _, e in Journal(f"sqlite:///{tmp_path}/journal.db").replay()]
    fallbacks = Counter(e.fallback for e in events if isinstance(e, Decision))
    assert {"router", "model", "hedge", FORCED} <= fallbacks.keys()
    statuses = Counter(e.status for e in events if isinstance(e, Outcome))
    assert statuses["error"] >= 2 and statuses["disconnected"] >= 1

    log = log_of(events, gateway.settings.arms())
    counted = log.counted()
    notebook = counted.totals
    everything = notebook.of_all()
    assert of_state(state) == journal
    assert of_prometheus(made) == journal
    assert of_mlflow(metrics) == journal
    assert journal == Numbers(
        notebook.routed.decisions,
        notebook.forced.decisions,
        everything.answers,
        everything.scores,
        everything.scored,
        everything.feedback,
        everything.cost_usd,
        everything.regret,
        everything.dearest_cost_usd,
    )
    assert decisions_of(log).regret.sum() == pytest.approx(journal.regret)

    # does routing pay: the same window of routed decisions everywhere
    routed = {name: state["routed"][name] for name in ROUTED}
    assert routed["votes"] >= 20 and routed["regret"] > 0
    assert routed_of_prometheus(made) == pytest.approx(routed)
    assert {name: metrics[name] for name in ROUTED} == pytest.approx(routed)
    for name, value in state["routed"].items():
        assert metrics[name] == pytest.approx(value), name
    # what was saved, from what the notebook counts
    spent = notebook.routed
    saved = 1.0 - spent.cost_usd / spent.dearest_cost_usd
    assert routed["estimated_saving"] == pytest.approx(saved)
    assert sum(made["ray_router_routed_cost_usd"].values.values()) == pytest.approx(
        spent.cost_usd
    )
    explained(gateway_answers, state, events)

    kinds = kinds_of_state(state)
    assert len({name.split("/")[1] for name in kinds}) >= 4
    assert kinds_of_prometheus(made) == pytest.approx(kinds)
    exported = {n: v for n, v in metrics.items() if n.startswith("kind/")}
    assert exported == pytest.approx(kinds)
    table = counted.figures.table()
    assert kinds_of_state(plain(table)) == pytest.approx(kinds)
    # the whole window, and the window of each arm
    window = Figures(**state["window"])
    assert (window.decisions, window.scores, window.scored) == (
        journal.routed + journal.forced,
        journal.scores,
        journal.scored,
    )
    assert window.cost_usd == pytest.approx(journal.cost_usd)
    assert window == table.total
    for arm, model in state["models"].items():
        assert Figures(**model["figures"]) == table.arms[arm]
        share = metrics.get(f"share/{arm}", 0.0)
        assert model["share"] == pytest.approx(share)
        known = metrics.get(f"score/{arm}")
        assert model["figures"]["score"] == pytest.approx(known), arm

    again = Gateway(tmp_path)
    row, snapshot = again.router.thing._journal.snapshot()
    assert snapshot is not None and 0 < row < len(events)
    with again.client:
        restored = again.client.get("/v1/router/state").json()
    for part in ("counts", "window", "recent"):
        assert restored[part] == state[part], part
    for arm, model in state["models"].items():
        for part in ("kinds", "figures", "share", "expected_quality"):
            assert restored["models"][arm][part] == model[part], (arm, part)


def explained(
    answers: dict[str, Any], state: dict[str, Any], events: list[Event]
) -> None:
    """The explanation of each decision has the journal's outcome and scores, and the state's figures of its kind."""
    outcomes = {e.decision_id: e for e in events if isinstance(e, Outcome)}
    for decision_id, answer in answers.items():
        outcome = outcomes[decision_id]
        assert answer["outcome"]["cost_usd"] == rounded(outcome.cost_usd)
        assert answer["outcome"]["status"] == outcome.status
        scores = {
            e.source: e.score
            for e in events
            if isinstance(e, Feedback) and e.decision_id == decision_id
        }
        assert {f["source"]: f["score"] for f in answer["feedback"]} == scores
        kind = answer["profile"]["kind"]
        shown = {
            arm: model["kinds"][kind]
            for arm, model in state["models"].items()
            if kind in model["kinds"]
        }
        assert answer["figures_of_kind"].keys() == shown.keys()
        for arm, figures in shown.items():
            told = answer["figures_of_kind"][arm]
            for name, value in figures.items():
                exact = rounded(value) if isinstance(value, float) else value
                assert told[name] == exact, (arm, name)


def test_every_surface_agrees_with_the_journal_while_requests_and_scores_arrive(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each surface names the journal's last row that it contains; its numbers are those of the journal up to there."""
    monkeypatch.setattr("deployments.tracking.tracker.EVERY_S", 0.05)
    made = exposition.record(monkeypatch)
    gateway = Gateway(tmp_path, mlflow_uri=mlflow_uri, experiment="test")
    traffic = Traffic(gateway)
    states: list[dict[str, Any]] = []
    gauges: list[dict[str, Metric]] = []
    exported: list[tuple[int, dict[str, float]]] = []
    explanations: list[dict[str, Any]] = []
    allowed = threading.Semaphore(0)
    over = threading.Event()
    failures: list[BaseException] = []

    def load(number: int) -> None:
        try:
            n = 0
            while not over.is_set():
                if not allowed.acquire(timeout=0.1):
                    continue
                n += 1
                named = {"model": "small"} if (n + number) % 3 == 0 else {}
                decision_id = traffic.ask(
                    CODE if n % 2 else "Sort the letters: b a c", **named
                )
                assert traffic.score(decision_id, n % 2) in ("accepted", "held")
                if n % 4 == 0:
                    traffic.score(decision_id, 0.5)  # a correction
        except BaseException as error:  # a thread's failure is the test's
            failures.append(error)

    async def copy() -> dict[str, Metric]:
        """The exposition at one moment; the router sets all gauges without a pause."""
        await gateway.router.thing._maintain()
        copied = {}
        for name, metric in made.items():
            copied[name] = duplicate = object.__new__(type(metric))
            duplicate.__dict__ = {**vars(metric), "values": dict(metric.values)}
        return copied

    with gateway.client:
        poem = traffic.ask(POEM)
        traffic.score(poem, 1.0)
        traffic.wait()
        client = MlflowClient(mlflow_uri, mlflow_uri)
        tracker = Tracker(gateway.settings, gateway.router, 7.0)
        asyncio.run(tracker._connect())
        threads = [threading.Thread(target=load, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        portal = gateway.client.portal
        assert portal is not None

        def progressed(before: int) -> bool:
            """Export again; whether MLflow names a later row, and the other surfaces have moved on, too."""
            asyncio.run(tracker._exporter.run_once(time.time()))
            run = client.get_run(tracker._run_id)
            row = int(run.data.tags["journal_row"])
            if failures or row > before:
                exported.append((row, run.data.metrics))
                return True
            return False

        try:
            for _ in range(4):
                allowed.release(A_READING)
                states.append(gateway.client.get("/v1/router/state").json())
                gauges.append(portal.call(copy))
                explanations.append(
                    gateway.client.get(f"/v1/router/decisions/{poem}").json()
                )
                before = exported[-1][0] if exported else 0
                eventually(partial(progressed, before))
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert not failures, failures
        traffic.wait()
        final = portal.call(copy)
        last = gateway.client.get("/v1/router/state").json()
    path = tmp_path / "journal.db"
    # the load was real: every reading saw more than the one before
    rows = [state["journal"]["row"] for state in states]
    assert rows == sorted(set(rows)) and rows[-1] < last["journal"]["row"]
    arms = gateway.settings.arms()
    for state in (*states, last):
        row = state["journal"]["row"]
        assert of_state(state) == of_journal(path, row)
        table = log_of(events_of(path, row), arms).counted().figures.table()
        assert kinds_of_state(state) == pytest.approx(kinds_of_state(plain(table)))
    for shown in (*gauges, final):
        row = int(shown["ray_router_journal_row"].values[()])
        table = log_of(events_of(path, row), arms).counted().figures.table()
        assert kinds_of_prometheus(shown) == pytest.approx(kinds_of_state(plain(table)))
    assert of_prometheus(final) == of_journal(path) == of_state(last)
    for row, metrics in exported:
        assert of_mlflow(metrics) == of_journal(path, row)
    # no thread asked for another poem
    figures = [answer["figures_of_kind"] for answer in explanations]
    assert figures == [figures[0]] * len(figures)
    assert sum(f["votes"] for f in figures[0].values()) == 1


async def test_the_tracker_logs_a_true_zero_and_no_unknown_value(
    tmp_path: Path,
) -> None:
    """The worst arm, which was wrong each time, has a line; an arm without a score has none."""
    gateway = Gateway(tmp_path)
    traffic = Traffic(gateway)
    logged: dict[str, float] = {}

    async def nothing() -> None:
        pass

    def log(run: str, metrics: dict[str, float], step: int) -> None:
        logged.update(metrics)

    with gateway.client:
        for _ in range(2):
            traffic.score(traffic.ask(model="small"), 0.0)
        traffic.wait()
        tracker = Tracker(gateway.settings, gateway.router, 7.0)
        tracker._promotions = SimpleNamespace(sync_aliases=nothing)  # type: ignore[assignment]
        assert gateway.client.portal is not None
        summary = gateway.client.portal.call(gateway.router.thing.summary)
        registry: Any = SimpleNamespace(log=log)
        await tracker._publish(registry, summary)
    assert logged["score/small"] == 0.0 and logged["votes/small"] == 2
    assert logged["votes/large"] == 0 and "score/large" not in logged
    assert "availability/large" not in logged and logged["availability/small"] == 1.0
    assert not any(name.startswith("expected_quality") for name in logged)
    assert "profiler/ece" not in logged and logged["profiler/scored"] == 0


def plain(table: FigureTable) -> dict[str, Any]:
    """A table in the shape of the state's models."""
    models = {
        arm: {"kinds": {kind: vars(figures) for kind, figures in kinds.items()}}
        for arm, kinds in table.kinds.items()
    }
    return {"models": models}
