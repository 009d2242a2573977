"""Tests of the rules for the number of replicas in the simulated cluster."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ray.serve import autoscaling_policy as serve
from ray.serve.config import AutoscalingContext

from benchmarks.autoscaling import __main__ as command
from benchmarks.autoscaling import report, rules
from benchmarks.autoscaling.periods import world
from benchmarks.autoscaling.rules import DEMAND, SERVE, WAKE, WARM, Controller, Rule
from benchmarks.autoscaling.scaler import CALL_PAUSE_S, RuleScaler
from benchmarks.cluster.fleet import Pool
from benchmarks.cluster.hardware import Engine, Size
from benchmarks.cluster.replica import Job
from benchmarks.cluster.routers import World
from deployments.models.autoscaling import DemandPolicy
from deployments.settings import AdmissionSettings
from policies.registry import make_policy
from policies.types import Arm, ModelState, Objective, Request
from tests.support import streams as recordings
from tests.support.requests import make_profile

ENGINE = Engine(2, 1000.0, 0.01, 0.001, 10_000, max_running=4, start_s=40.0)
SIZES = (Size("small", ENGINE, 2), Size("large", ENGINE, 2))
PERIOD = "azure_code hour"
PORTFOLIO = "routellm_gsm8k"


class Clock:
    """A simulated time."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pools(clock: Clock, *replicas: int) -> list[Pool]:
    """The sizes with so many replicas."""
    return [
        Pool(
            replace(size, replicas=number),
            AdmissionSettings(),
            clock,
            np.random.default_rng(0),
        )
        for size, number in zip(SIZES, replicas, strict=True)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An hour of 300 requests, of which the larger size answers a third far better."""
    folder = tmp_path_factory.mktemp("autoscaling")
    recordings.generate(folder)
    recordings.generate_load(folder, "azure_code")
    objective = Objective(latency_weight=0.01, cost_weight=0.1)
    return world(PERIOD, PORTFOLIO, objective, 100, 0, data=str(folder))


@pytest.mark.parametrize("demand", [False, True])
def test_the_control_loop_decides_as_rays_own(
    demand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same contexts Ray's own composition of policy, factors and delays wants the same number each time."""
    rule = Rule("", target=4.0, up_s=20.0, down_s=60.0, zero_s=30.0)
    controller = Controller("large", rule.config(0, 5), demand)
    contexts: list[AutoscalingContext] = []
    context = controller._context

    def noted(ready: int, now_s: float) -> AutoscalingContext:
        contexts.append(context(ready, now_s))
        return contexts[-1]

    monkeypatch.setattr(controller, "_context", noted)
    rng = np.random.default_rng(0)
    ready, extra, load = 0, 0.0, 0.0
    wanted, expected = [], []
    state: dict[str, object] = {}
    target = 0
    for second in range(2000):
        if second % 50 == 0:
            load = float(rng.choice([0.0, 0.0, 3.0, 9.0, 18.0]))
            extra = float(rng.choice([0.0, 6.0])) if demand else 0.0
        wanted.append(controller.look(load, extra, ready, float(second)))
        seen = contexts[-1]
        seen.policy_state = state
        seen.target_num_replicas = target

        def policy(
            ctx: AutoscalingContext, extra: float = extra
        ) -> tuple[float, dict[str, object]]:
            if demand:
                return DemandPolicy.wanted(ctx, extra), {}
            return serve.replica_queue_length_autoscaling_policy(ctx)

        with monkeypatch.context() as patched:
            patched.setattr(serve.time, "time", lambda now=second: float(now))
            number, state = serve._apply_autoscaling_config(policy)(seen)
        target = min(5, int(np.ceil(number)))
        expected.append(target)
        if second % 7 == 0:
            ready = wanted[-1]
    assert wanted == expected
    assert {0, 1, 3, 5} <= set(wanted)


def test_gpu_hours_count_from_the_start_of_a_replica_to_its_end(clock: Clock) -> None:
    """A replica costs while it starts, and a stopped one until its last request is answered."""
    pool = pools(clock, 1, 0)[1]
    pool.resize(1)
    clock.now_s = 39.0
    pool.advance(39.0)
    assert pool.gpu_s == pytest.approx(2 * 39.0) and not pool.ready
    clock.now_s = 41.0
    assert len(pool.ready) == 1
    pool.advance(41.0)
    job = Job(0, 41.0, prompt=10, answer=1000)
    pool.submit(job)
    pool.resize(0)
    assert not pool.replicas and pool.starts == pool.stops == 1
    clock.now_s = pool.next_s()
    while not (done := pool.advance(clock.now_s)):
        clock.now_s = pool.next_s()
    assert done == [job] and job.finished_s > 50.0
    cost = pool.gpu_s
    assert cost == pytest.approx(2 * job.finished_s)
    pool.advance(500.0)
    assert pool.gpu_s == cost


def test_replicas_that_start_are_stopped_before_those_that_work(clock: Clock) -> None:
    """Serve stops a replica that is not ready first."""
    pool = pools(clock, 1, 1)[0]
    (working,) = pool.replicas
    pool.resize(2)
    pool.resize(1)
    assert pool.replicas == [working]


@pytest.mark.slow
def test_a_wake_up_request_starts_one_replica_and_pauses(clock: Clock) -> None:
    """The first request starts a larger size; the next call comes a minute after the end of one."""
    scaler = RuleScaler(Rule(WAKE, wake_up=True, zero_s=10.0), SIZES)
    policy = make_policy("static", (Arm("small"), Arm("large")))
    own = pools(clock, 1, 0)
    states = {"small": ModelState(), "large": ModelState(replicas=0, healthy=False)}
    (decision,) = policy.decide(
        [Request("r", make_profile(), Objective())],
        states,
        np.random.default_rng(0),
        0,
    )
    replicas = []
    for second in range(0, 200):
        clock.now_s = float(second)
        for pool in own:
            pool.advance(clock.now_s)
        if second < 150:
            scaler.decided(decision, clock.now_s)
        scaler.look(own, policy, states, clock.now_s)
        replicas.append(len(own[1].replicas))
    stopped = replicas.index(0, 40)
    again = replicas.index(1, stopped)
    assert replicas[1] == 1 and 40 < stopped < 100
    assert again == pytest.approx(40 + CALL_PAUSE_S, abs=2)
    assert max(replicas) == 1


@pytest.mark.slow
def test_a_need_begins_with_a_request_that_came_without_a_replica() -> None:
    """The loss of the last minute alone, whose requests came while there was a replica, is no need."""
    scaler = RuleScaler(Rule(WAKE), SIZES)
    large = SIZES[-1].name
    for count, (ready, now_s) in enumerate(((1, 10.0), (0, 20.0), (0, 30.0))):
        if count == 2:
            scaler._came_s.append(25.0)
        scaler._note_need(large, 1e9, ready, now_s)
        assert scaler.unmet == (count == 2)
    scaler._note_need(large, 1e9, 1, 45.0)
    assert scaler.waits_s == [20.0] and scaler.unmet == 0


def test_demand_starts_what_serve_leaves_at_zero(made: World) -> None:
    """At zero the larger size never answers by Serve's own rule; by demand or wake-up requests it does, for less."""
    found = {
        rule.name: command.measure(rule, made, PERIOD, 0.1)
        for rule in (
            Rule(SERVE),
            Rule(WARM, least=1),
            Rule(WAKE, wake_up=True),
            Rule(DEMAND, demand=True),
        )
    }
    assert found[SERVE].larger == 0.0 == found[SERVE].gpu_hours[1]
    assert found[SERVE].unmet == 1 and not found[SERVE].waits_s
    assert found[WARM].waits_s == () and found[WARM].unmet == 0
    for name in (WAKE, DEMAND):
        assert 0.0 < found[name].larger < found[WARM].larger
        assert 0.0 < found[name].gpu_hours[1] < found[WARM].gpu_hours[1]
    (wait_s,) = found[DEMAND].waits_s
    start_s = made.sizes[1].engine.start_s
    assert start_s < wait_s < start_s + 600.0


def test_a_price_beyond_every_loss_starts_nothing(made: World) -> None:
    """The demand rule starts a larger size for its worth only."""
    rule = Rule(DEMAND, demand=True, replica=1000.0)
    assert command.measure(rule, made, PERIOD, 0.1).gpu_hours[1] == 0.0


def point(rule: str, knob: str, utility: float, hours: float) -> report.Figures:
    """A run with this utility and these GPU-hours; other figures have no meaning."""
    return report.Figures(
        "", "", 0, rule, knob, utility, utility, 0.0, 1.0, 2.0, (1.0, hours), 0.0, 0.5, (), 0
    )  # fmt: skip


def test_shares_and_equal_hours() -> None:
    """What is won back is a share of what is lost at zero, and a timetable is between zero and warm."""
    found = report.points(
        [
            point(SERVE, "", 0.4, 0.0),
            point(WARM, "", 0.5, 8.0),
            point(DEMAND, "a", 0.48, 4.0),
        ]
    )
    assert found[2].won == pytest.approx(0.8) and found[2].spent == pytest.approx(0.5)
    assert report.at_hours(found[:2], 5.0, "utility") == pytest.approx(0.45)
    assert report.at_hours(found[:2], 9.5, "utility") is None
    assert "+0.030" in report.table(found)
    assert report.points([point(DEMAND, "a", 0.48, 4.0)])[0].won is None


@pytest.mark.slow
def test_the_command_prints_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints a table, and saves the figures and a picture."""
    recordings.generate(tmp_path)
    recordings.generate_load(tmp_path, "azure_code")
    saved = tmp_path / "figures.json"
    given = ["--quick", "--data", str(tmp_path), "--portfolio", PORTFOLIO]
    given += ["--calibrate", "20", "--json", str(saved), "--pictures", str(tmp_path)]
    command.main([*given, "--rule", SERVE, WARM])
    assert "serve, one kept warm" in capsys.readouterr().out
    figures = json.loads(saved.read_text())
    assert [row["rule"] for row in figures["rows"]] == [SERVE, WARM]
    assert [one["won"] for one in figures["points"][PERIOD]] == [0.0, 1.0]
    assert (tmp_path / "autoscaling-azure_code-hour.png").stat().st_size > 10_000


def test_every_rule_has_its_own_name_and_knob() -> None:
    """A row of the table stands for one rule."""
    keys = [(rule.name, rule.knob) for rule in rules.RULES]
    assert len(set(keys)) == len(keys)
