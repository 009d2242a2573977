"""Tests of the simulated cluster."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cluster import __main__ as command
from benchmarks.cluster import capacity, report, routers
from benchmarks.cluster.hardware import Engine, Size
from benchmarks.cluster.peers import ONLINE
from benchmarks.cluster.replica import BLOCK, Job, Replica
from benchmarks.cluster.simulation import Plan, Run, Simulation
from benchmarks.cluster.workload import Workload, workload
from benchmarks.decisions.streams import load
from policies.base import Policy
from policies.types import ModelState, Request
from tests.support import streams as recordings

ENGINE = Engine(1, 1000.0, 0.01, 0.001, 10_000, chunk=100, max_running=4)
PORTFOLIO = "routellm_gsm8k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Generated streams, and a generated load of 300 requests at two a second."""
    made = tmp_path_factory.mktemp("cluster")
    recordings.generate(made)
    recordings.generate_load(made, "azure_conv")
    return str(made)


def world(folder: str, rate_share: float, count: int = 200) -> routers.World:
    """A world of the generated streams at a share of its capacity."""
    options = ["--data", folder, "--portfolio", PORTFOLIO, "--calibrate", "50"]
    arguments = command.parse([*options, "--requests", str(count)])
    setting = command.Setting(PORTFOLIO, "azure_conv", "", rate_share, 0)
    return command.world_of(setting, arguments)


def play(name: str, made: routers.World, event: str = "", **options: object) -> Run:
    """A router in a world."""
    plan = Plan(made.rate, event=event, **options)  # type: ignore[arg-type]
    only = name.removeprefix(routers.FIXED) if name.startswith(routers.FIXED) else ""
    simulation = Simulation(
        made.sizes, made.load, plan, made.cost, made.objective, made.seed
    )
    return simulation.run(routers.make(name, made), only, routers.reprice(made))


def test_a_lone_request_takes_what_the_engine_says() -> None:
    """On an idle replica the first token comes after the prompt's chunks, the others after a step each."""
    replica = Replica(ENGINE)
    job = Job(0, 5.0, prompt=200, answer=11)
    replica.add(job, 5.0)
    assert replica.advance(60.0) == [job]
    first, whole = ENGINE.alone_s(200, 11)
    assert job.first_s == pytest.approx(5.0 + first) == pytest.approx(5.22)
    assert job.finished_s == pytest.approx(5.0 + whole) == pytest.approx(5.33)
    assert replica.busy_s == pytest.approx(whole)


def test_requests_of_a_batch_share_its_steps() -> None:
    """Four answers in a batch take less than four times as long as one, and each is slower than alone."""
    replica = Replica(ENGINE)
    jobs = [Job(n, 0.0, prompt=1, answer=101) for n in range(4)]
    for job in jobs:
        replica.add(job, 0.0)
    replica.advance(100.0)
    pace = (jobs[0].finished_s - jobs[0].first_s) / 100
    assert (
        0.0139 < pace < 0.0145
    )  # 10 ms and 1 ms for each answer, and the reading of the others
    assert max(job.finished_s for job in jobs) < 2 * ENGINE.alone_s(1, 101)[1]


def test_a_request_waits_for_memory_and_for_its_place_in_the_batch() -> None:
    """A request that does not fit into the memory begins when another one has finished."""
    replica = Replica(ENGINE)
    long = Job(0, 0.0, prompt=8000, answer=100)
    other = Job(1, 0.0, prompt=3000, answer=100)
    replica.add(long, 0.0)
    replica.add(other, 0.0)
    assert replica.jobs == 2 and replica.running == 1
    replica.advance(1000.0)
    assert other.first_s > long.finished_s


def test_cached_blocks_are_not_read_again() -> None:
    """The second request with the same blocks has its first token sooner, and a dead replica forgets them."""
    replica = Replica(ENGINE)
    durations = []
    for n in range(3):
        start = 100.0 * n
        if n == 2:
            replica.fail(start)
        job = Job(n, start, prompt=4 * BLOCK, answer=2, blocks=(1, 2, 3))
        replica.add(job, start)
        replica.advance(start + 99.0)
        durations.append(job.first_s - start)
    assert durations[1] < durations[0] / 3
    assert durations[2] == pytest.approx(durations[0])


def test_steps_of_any_size_give_the_same_times() -> None:
    """The times do not depend on how often the replica is looked at."""
    times = []
    for step in (0.003, 7.0):
        replica = Replica(ENGINE)
        jobs = [Job(n, 0.0, prompt=150 + n, answer=20 * n + 1) for n in range(9)]
        for job in jobs:
            replica.add(job, 0.0)
        for now in np.arange(0.0, 21.0, step):
            replica.advance(float(now))
        times.append([job.finished_s for job in jobs])
    np.testing.assert_allclose(times[0], times[1], rtol=1e-6)


def test_the_highest_rate_fills_every_size() -> None:
    """With equal requests the highest rate is the sum over the sizes of replicas by work."""
    sizes = (Size("a", ENGINE, 2), Size("b", ENGINE, 3))
    work = np.tile([0.5, 1.5], (64, 1))
    assert capacity.highest_rate(sizes, work) == pytest.approx(2 / 0.5 + 3 / 1.5)


def test_the_price_of_a_size_that_is_not_full_is_zero() -> None:
    """A scarce size costs what its next second would bring, and a size with room costs nothing."""
    worth = np.tile([0.4, 0.9], (10, 1))
    worth[:5, 1] = 0.5
    work = np.ones((10, 2))
    prices = capacity.scarcity(worth, work, np.array([100.0, 5.5]))
    assert prices[0] == pytest.approx(0.0, abs=1e-9)
    assert prices[1] == pytest.approx(0.1)


def test_the_longest_arrival_gets_the_longest_prompt(folder: str) -> None:
    """Arrivals keep their order and lengths; prompts are joined to them by the rank of the length."""
    portfolio = load(PORTFOLIO, data=folder)
    rows = np.arange(len(portfolio.profiles))
    made = workload("azure_conv", portfolio, rows, 250, 3, folder)
    own = np.array([portfolio.profiles[row].prompt_tokens for row in made.rows])
    by_arrival = own[np.argsort(made.prompts, kind="stable")]
    assert (np.diff(by_arrival) >= 0).all()
    assert (np.diff(made.arrival_s) >= 0).all()
    assert made.arrival_s[-1] == pytest.approx(250.0)
    assert (made.scores == portfolio.scores[made.rows]).all()


@pytest.mark.parametrize("event", ["", "degrade", "death", "price"])
def test_every_request_ends_once_whatever_happens(folder: str, event: str) -> None:
    """Each request is answered or refused, after its arrival, and the run can be repeated."""
    made = world(folder, 1.2)
    runs = [play(routers.OURS, made, event) for _ in range(2)]
    run = runs[0]
    answered = run.chosen >= 0
    assert np.isfinite(run.latency_s[answered]).all()
    assert (run.ttft_s[answered] > 0).all()
    assert (run.latency_s[answered] >= run.ttft_s[answered]).all()
    assert (run.chosen == runs[1].chosen).all()
    assert (run.utilisation <= 1.0 + 1e-9).all()


def test_every_router_plays_and_hindsight_is_best(folder: str) -> None:
    """No router has a higher utility than hindsight, and the named size answers alone."""
    made = world(folder, 0.7)
    utility = {}
    for name in routers.names(made):
        run = play(name, made)
        utility[name] = run.utility(made.objective).mean()
        if name.startswith(routers.FIXED):
            column = [size.name for size in made.sizes].index(
                name.removeprefix(routers.FIXED)
            )
            assert set(run.chosen) <= {column, -1}
    assert max(utility, key=lambda name: utility[name]) == "hindsight"
    with pytest.raises(ValueError, match="unknown router"):
        routers.make("fastest", made)


def test_more_load_makes_a_fixed_size_slower(folder: str) -> None:
    """The p95 of a size grows with the load, and beyond its capacity requests are refused."""
    light, heavy = (world(folder, share, 300) for share in (0.05, 3.0))
    name = routers.FIXED + light.sizes[1].name
    slow, fast = (play(name, made) for made in (heavy, light))
    assert np.nanpercentile(slow.latency_s, 95) > np.nanpercentile(fast.latency_s, 95)
    assert not (fast.chosen < 0).any()


def test_a_degraded_size_loses_half_of_its_scores(folder: str) -> None:
    """After noon the dearest size has half the score, and before noon nothing changes."""
    made = world(folder, 0.2)
    name = routers.FIXED + made.sizes[1].name
    before, after = play(name, made), play(name, made, "degrade")
    half = len(made.load) // 2
    assert (before.score[:half] == after.score[:half]).all()
    assert (before.score[half:] / 2 == after.score[half:]).all()


def test_a_dead_replica_begins_its_requests_anew(folder: str) -> None:
    """Requests of a replica that dies are answered by another one."""
    made = world(folder, 1.0)
    name = routers.FIXED + made.sizes[1].name
    run = play(name, made, "death")
    assert run.retries > 0 and run.starts == 1
    assert np.isfinite(run.latency_s[run.chosen >= 0]).all()


def test_routebalance_leaves_out_sizes_that_miss_the_limits(folder: str) -> None:
    """A size is left out while its queue is longer than the limit on the first token, unless all queues are."""
    made = world(folder, 0.5)
    router = routers.make("routebalance quality", made)
    cheap, dear = (size.name for size in made.sizes)
    short = replace(made.load.profiles[0], prompt_tokens=100)
    request = Request("0", short, made.objective)

    def chosen(wait_cheap_s: float, wait_dear_s: float) -> str:
        states = {
            cheap: ModelState(wait_s=wait_cheap_s),
            dear: ModelState(wait_s=wait_dear_s),
        }
        return router.decide([request], states, np.random.default_rng(0), 0)[0].arm

    assert chosen(0.0, 2.0) == cheap
    assert chosen(2.0, 0.0) == dear
    assert chosen(100.0, 2.0) == dear


def test_the_command_prints_and_saves(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints a table for each load, and saves the figures and a picture."""
    saved = tmp_path / "cluster.json"
    given = ["--data", folder, "--portfolio", PORTFOLIO, "--requests", "200"]
    given += ["--load", "0.5", "1", "--seeds", "1", "--calibrate", "20"]
    given += ["--router", routers.OURS, "least loaded", "--json", str(saved)]
    given += ["--event", "", "death"]
    command.main([*given, "--pictures", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "load 0.5" in shown and "least loaded" in shown and "hindsight" in shown
    assert "all loads" in shown and "back after requests" in shown
    rows = json.loads(saved.read_text())["rows"]
    assert {row["router"] for row in rows} == {
        routers.OURS,
        "least loaded",
        "hindsight",
    }
    assert all(row["regret"] == 0 for row in rows if row["router"] == "hindsight")
    assert (tmp_path / f"cluster-{PORTFOLIO}-azure_conv.png").stat().st_size > 10_000


def test_missing_load_is_an_error_that_says_where_it_comes_from(
    tmp_path: Path, folder: str
) -> None:
    """Without the recorded load the command names the page with its source."""
    recordings.generate(tmp_path)
    portfolio = load(PORTFOLIO, data=folder)
    with pytest.raises(SystemExit, match=r"cluster\.md"):
        workload("azure_conv", portfolio, np.arange(10), 10, 0, str(tmp_path))


def test_a_workload_is_as_long_as_its_arrivals(folder: str) -> None:
    """A workload is never longer than the recording."""
    portfolio = load(PORTFOLIO, data=folder)
    made = workload("azure_conv", portfolio, np.arange(50), 10_000, 0, folder)
    assert isinstance(made, Workload) and len(made) == 300 == len(made.profiles)


def figures(router: str, **given: Any) -> report.Figures:
    """Figures of a router at load 1, in which nothing happens."""
    zero = {one.name: 0.0 for one in fields(report.Figures)}
    named = {"portfolio": "", "trace": "", "event": "", "seed": 0, "load": 1.0}
    empty = {"shares": (), "utilisation": (), "utilities": (), "dearest_scores": ()}
    return report.Figures(**{**zero, **named, **empty, "router": router, **given})


def test_a_router_is_compared_at_equal_p95_and_at_equal_quality() -> None:
    """Presets that are slower, or worse, are no peers; the best learner is named."""
    rows = [
        figures(routers.OURS, quality=0.5, p95_s=10.0, mean_s=4.0, utility=0.40),
        figures("routebalance quality", quality=0.6, p95_s=11.0, mean_s=9.0),
        figures("routebalance balanced", quality=0.48, p95_s=10.4, mean_s=5.0),
        figures("routebalance fast", quality=0.498, p95_s=9.0, mean_s=6.0),
        figures("acqb", utility=0.1),
        figures("linucb", utility=0.3),
    ]
    table = report.comparison(rows, routers.OURS)
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["1", "+0.002", "1.5", "+0.400", "+0.100 (linucb)"]
    alone = report.comparison([rows[0], rows[1]], routers.OURS)
    assert "-0.100" in alone  # slower, but there is no other one
    assert "–" in alone.splitlines()[-1]
    assert len(report.comparison(rows[1:], routers.OURS).splitlines()) == 2


def test_a_router_is_back_when_it_loses_as_much_as_in_the_end() -> None:
    """The requests and the scores of the dearest size count from the event to the end of the second good window."""
    given = tuple(range(16))
    usual = (0.5,) * 16
    lost = (0.5,) * 8 + (0.1, 0.24, 0.4, 0.4) + (0.4,) * 4
    worse = (0.5,) * 12 + (0.4, 0.4, 0.4, 0.3)
    names = ("quick", "worse")
    rows = [
        figures(name, utilities=course, dearest_scores=given)
        for name, course in zip(names, (lost, worse), strict=True)
    ]
    before = [figures(name, utilities=usual, dearest_scores=given) for name in names]
    lines = report.recovery(rows, before).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == [
        ["quick", "1", "0.157", "0.330", "0.100", "200", "4"],
        ["worse", "1", "0.062", "0.000", "0.125", "100", "2"],
    ]


def test_a_new_price_reaches_an_online_learner(folder: str) -> None:
    """It chooses by the new costs at the next request."""
    made = world(folder, 0.3, count=60)
    for name in ONLINE.keys() - {
        "acqb",
        "epsilon-greedy",
    }:  # these choose by chance, too
        router = routers.make(name, made)
        after = routers.reprice(made)(router, np.array([1e6, 0.0]))
        assert play_one(after, made) == made.sizes[1].name, name


def play_one(router: Policy, made: routers.World) -> str:
    """The size that a router chooses for the first request on an idle cluster."""
    states = {size.name: ModelState() for size in made.sizes}
    request = Request("0", made.load.profiles[0], made.objective)
    (decision,) = router.decide([request], states, np.random.default_rng(0), 0)
    return decision.arm
