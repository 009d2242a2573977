"""The replay of recorded load on a running system; a small gateway in a thread takes its place."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from assets.tasks import KINDS, Task
from benchmarks.live import __main__ as command
from benchmarks.live import system
from benchmarks.live.arrivals import window
from benchmarks.live.cells import (
    AUTO,
    Cell,
    measure_capacity,
    open_plan,
    schedule,
)
from benchmarks.live.client import BROKEN, Reply, send, send_apart
from benchmarks.live.figures import Figures, compare, figures, sentence, table
from benchmarks.live.plan import OK, Plan, Seen
from benchmarks.live.system import Price, Running, System
from deployments.demonstration.run import make_stream
from deployments.errors import NoAnswerError
from policies.types import Objective
from tests.support import streams as recordings
from tests.support.live_gateway import LiveGateway, event, serving

CONTENDERS = (AUTO, "nano", "small", "large")
CELL = Cell("azure_conv", 1.0, 0, AUTO, 10.0, 1.0, 1)
PRICES = {"nano": Price(1e-6, 1e-6), "large": Price(1e-5, 1e-5)}
BEFORE = Running(Objective(0.1, 1000.0), PRICES, ("nano", "large"), 2, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Generated loads of 300 requests."""
    made = tmp_path_factory.mktemp("live")
    recordings.generate(made)
    recordings.generate_load(made, "azure_conv", "azure_code")
    return str(made)


def answers_of(*seeds: int, count: int = 400) -> dict[str, str]:
    """The right answers to the tasks of these streams."""
    return {task.question: task.answer for s in seeds for task in make_stream(s, count)}


# --- arrivals ---------------------------------------------------------------------------------------------------


def test_a_window_has_the_rate_that_is_asked_for(folder: str) -> None:
    """So many requests arrive as rate and seconds say, all within the seconds."""
    found = window("azure_conv", 8.0, 15.0, 3, folder)
    assert len(found) == 120 and found[0] == 0.0 and found[-1] < 15.0
    assert (np.diff(found) >= 0).all()


def test_bursts_stay_bursts(folder: str) -> None:
    """Another rate divides all gaps by the same number; the seed chooses the place."""
    slow = window("azure_conv", 4.0, 20.0, 3, folder)
    fast = window("azure_conv", 16.0, 5.0, 3, folder)
    assert fast == pytest.approx(slow / 4)
    other = window("azure_conv", 4.0, 20.0, 4, folder)
    assert not np.allclose(other, slow)


def test_a_window_that_the_recording_does_not_have_is_refused(folder: str) -> None:
    """The message says how many requests were asked for."""
    with pytest.raises(ValueError, match="are 400 requests; azure_conv has windows"):
        window("azure_conv", 20.0, 20.0, 1, folder)
    with pytest.raises(ValueError, match="are 1 requests"):
        window("azure_conv", 1.0, 1.0, 1, folder)


# --- order ------------------------------------------------------------------------------------------------------


def cells() -> list[Cell]:
    """Two recordings, two factors and four rounds."""
    traces = ("azure_code", "azure_conv")
    return schedule(traces, (1.0, 4.0), 4, CONTENDERS, 5.0, 10.0, 7)


def test_every_contender_plays_every_group_once_before_the_next_round() -> None:
    """The rounds follow each other, and each has all recordings, factors and contenders."""
    made = cells()
    assert [cell.round for cell in made] == sorted(cell.round for cell in made)
    counts = Counter((c.round, c.trace, c.factor, c.contender) for c in made)
    assert len(counts) == 4 * 2 * 2 * 4 and set(counts.values()) == {1}


def test_the_order_of_the_contenders_rotates() -> None:
    """Over four groups each contender is once at each place."""
    made = cells()
    orders = [
        [cell.contender for cell in made[n : n + 4]] for n in range(0, len(made), 4)
    ]
    for place in range(4):
        assert {order[place] for order in orders[:4]} == set(CONTENDERS)


def test_the_contenders_of_a_group_get_the_same_arrivals_and_tasks(folder: str) -> None:
    """Rate, window and seed are equal within a group, and differ between rounds."""
    made = cells()
    for n in range(0, len(made), 4):
        group = made[n : n + 4]
        assert len({(cell.rate, cell.seed) for cell in group}) == 1
        first = group[0].arrivals(folder)
        assert all((cell.arrivals(folder) == first).all() for cell in group)
    assert len({cell.seed for cell in made}) == 4


def test_the_tasks_are_calculations_only() -> None:
    """The default models that calculate can do every one of them."""
    assert {task.kind for task in make_stream(1001, 200)} == set(KINDS)


# --- figures ----------------------------------------------------------------------------------------------------


def seen(number: int, text: str, status: str = OK, **changed: float) -> Seen:
    """An answer of `large` after a second, which the client sent 0.2 s late."""
    times = {"ttft_s": 0.5, "latency_s": 1.0, **changed}
    return Seen(
        number,
        status,
        sent_s=0.0,
        lag_s=0.2,
        model="large",
        decision_id=f"d{number}",
        text=text,
        prompt_tokens=20,
        output_tokens=10,
        **times,
    )


TASK = Task("add", "What is 1 plus 1?", "2")


def test_the_utility_of_a_refused_request_is_0() -> None:
    """A right answer has 1 − 0.1 · 1 s − 1000 · 30 tokens, a wrong one the same without the 1, a refusal nothing."""
    rows = [seen(0, "2"), seen(1, "3"), seen(2, "", "429"), seen(3, "", "TimeoutError")]
    found = figures(CELL, [TASK] * 4, rows, BEFORE, {}, 2)
    right = 1 - 0.1 - 1000 * 30e-5
    wrong = right - 1
    assert found.utility == pytest.approx((right + wrong) / 4)
    assert found.right == 0.25 and found.refused == 0.5
    assert found.p95_s == 1.0 and found.shares == {"large": 1.0}


def test_the_ratio_is_of_the_same_answers_from_the_real_time_of_sending() -> None:
    """Answers that were not looked up do not count, and neither does the lag of the client itself."""
    rows = [seen(0, "2"), seen(1, "2", latency_s=9.0), seen(2, "2", latency_s=2.2)]
    found = figures(CELL, [TASK] * 3, rows, BEFORE, {"d0": 0.4, "d2": 1.0}, 2)
    assert found.client_s == pytest.approx((0.8 + 2.0) / 2)
    assert found.ratio == pytest.approx(1.4 / 2.8)
    assert figures(CELL, [TASK] * 3, rows, BEFORE, {}, 2).ratio is None


def test_a_cell_without_an_answer_has_no_latency() -> None:
    """Unknown figures are None, and a dash in the table."""
    found = figures(CELL, [TASK], [seen(0, "", "503")], BEFORE, {}, 2)
    assert (found.p50_s, found.p95_s, found.ttft_p95_s, found.ratio) == (None,) * 4
    assert "| – " in table([found]) and found.refused == 1.0


def row(contender: str, round_: int, utility: float) -> Figures:
    """The figures of a cell with this utility."""
    cell = Cell("azure_conv", 2.0, round_, contender, 10.0, 5.0, round_)
    known = (0.1, 0.2, 0.1, 0.2, 0.19)
    return Figures(cell, 50, utility, 0.9, 0.0, *known, 0.001, 3, {"large": 1.0})


def utilities(**by_name: Sequence[float]) -> list[Figures]:
    """The rows of several contenders with a utility for each round."""
    return [
        row(name, n, utility)
        for name, values in by_name.items()
        for n, utility in enumerate(values)
    ]


def test_auto_is_compared_with_the_best_fixed_size_round_by_round() -> None:
    """`small` has the highest mean. The interval is Student's over the paired differences 0.1, 0.2 and 0.3."""
    rows = utilities(nano=(0.9, 0.1, 0.1), small=(0.5, 0.5, 0.5), auto=(0.6, 0.7, 0.8))
    found = compare(rows)
    assert found is not None and found.best == "small"
    assert found.difference.mean == pytest.approx(0.2)
    assert found.difference.lower == pytest.approx(0.2 - 4.303 * 0.1 / 3**0.5, abs=1e-4)
    assert (
        sentence(found)
        == "auto − small, the best fixed size: +0.2000 ± 0.2484 (3 rounds)"
    )


def test_one_round_has_no_interval_and_no_router_no_comparison() -> None:
    """The difference alone is shown."""
    found = compare(utilities(auto=(0.5,), nano=(0.6,)))
    assert found is not None
    assert sentence(found) == (
        "auto − nano, the best fixed size: -0.1000 (one round, so no interval)"
    )
    assert compare(utilities(nano=(0.6,))) is None


def test_the_table_names_auto_first_and_the_measured_delay_of_the_client() -> None:
    """It has the ratio of the recorded latency, and the lag in milliseconds."""
    lines = table(utilities(nano=(0.6,), auto=(0.5,))).splitlines()
    assert lines[2].split("|")[1].strip() == "auto"
    assert "| 0.95 " in lines[2] and "| 1.0 " in lines[2]


# --- system -----------------------------------------------------------------------------------------------------


def test_the_sizes_are_the_models_that_calculate() -> None:
    """The language model, the embedder and variants are none; all that chat have a price."""
    with serving(LiveGateway({})) as gateway:
        found = System(gateway.url).running()
    assert found.sizes == ("nano", "small", "large")
    assert set(found.prices) == {"nano", "general", "small", "large", "large-direct"}
    assert found.replicas == 4 and found.in_flight == 0
    assert found.prices["large"].cost_usd(10, 20) == pytest.approx(30e-6)


def test_a_decision_on_its_way_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that the router does not know is left out."""
    monkeypatch.setattr(system, "LOOK_S", 0.0)
    with serving(LiveGateway({})) as gateway:
        found = System(gateway.url).recorded_s(["a", "late", "running", "unknown"])
    assert found == {"a": 0.001, "late": 0.001, "running": 0.001}
    assert Counter(gateway.looked_up) == {"a": 1, "late": 2, "running": 2, "unknown": 1}


def test_the_next_cell_waits_for_replicas_that_were_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system settles when they are gone, or the wait ends."""
    monkeypatch.setattr(system, "LOOK_S", 0.0)
    with serving(LiveGateway({}, replicas=3)) as gateway:
        assert System(gateway.url).settle(4)
        assert gateway.replicas == 1
        monkeypatch.setattr(system, "SETTLE_S", 0.2)
        assert not System(gateway.url).settle(3)


# --- client -----------------------------------------------------------------------------------------------------


def test_a_reply_is_timed_from_the_intended_moment() -> None:
    """The first token is the first text, and the role alone is none."""
    pieces = [
        (11.0, event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})),
        (12.0, event({"choices": [{"delta": {"content": "so "}}]})[:-3]),
        (13.0, b"}\n\n" + event({"choices": [{"delta": {"content": "2"}}]})),
        (
            14.0,
            event({"choices": [], "usage": {"prompt_tokens": 5}}) + b"data: [DONE]\n\n",
        ),
    ]
    reply = Reply(3, 10.0, 10.5, OK, 15.0, "nano", "d3", pieces)
    found = reply.seen(4.0)
    assert (found.ttft_s, found.latency_s, found.lag_s, found.sent_s) == (
        3,
        5,
        0.5,
        6.5,
    )
    assert found.text == "so 2" and found.prompt_tokens == 5


def test_a_stream_that_ends_with_an_error_is_no_answer() -> None:
    """Its status says so."""
    pieces = [(11.0, event({"error": {"message": "the model failed"}}))]
    found = Reply(0, 10.0, 10.0, OK, 12.0, "nano", "d", pieces).seen(10.0)
    assert found.status == BROKEN and not found.answered


def test_the_client_sends_every_request_once_and_reads_its_answer() -> None:
    """In a process of its own, with the request that the demo sends."""
    tasks = make_stream(5, 20)
    refuses = lambda model, number: number == 4  # noqa: E731
    with serving(LiveGateway(answers_of(5), refuses)) as gateway:
        plan = open_plan(gateway.url, "nano", tasks, np.linspace(0, 0.2, 20))
        found = send_apart(plan)
    assert [one.number for one in found] == list(range(20))
    assert Counter(gateway.asked) == Counter(("nano", t.question) for t in tasks)
    assert Counter(one.status for one in found) == {OK: 19, "429": 1}
    for one in found:
        if one.answered:
            assert one.text == tasks[one.number].answer
            assert one.latency_s >= one.ttft_s > 0 and one.output_tokens == 3
            assert one.lag_s >= 0


def test_a_client_without_a_gateway_says_which(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command ends with a message."""
    plan = open_plan("http://127.0.0.1:1", "nano", make_stream(1, 1), np.zeros(1))
    with pytest.raises(SystemExit, match=r"client of http://127\.0\.0\.1:1 failed"):
        send_apart(plan)
    assert "Cannot connect" in capfd.readouterr().err
    with pytest.raises(NoAnswerError):
        System("http://127.0.0.1:1").running()


def test_the_capacity_counts_answers_after_the_beginning() -> None:
    """Eight answers a second after the first 1.6 of 4 seconds; a refused request is none."""

    def closed(plan: Plan) -> list[Seen]:
        assert plan.clients == 4 and plan.seconds == 4.0
        made = [
            Seen(n, OK, n / 8, 0.0, 0.05, 0.1, "large", "d")
            for n in range(len(plan.sendings))
        ]
        late = Seen(999, "429", 2.0, 0.0)
        return [*(one for one in made if one.sent_s < 4), late]

    found = measure_capacity(closed, "http://gateway", "large", 4, 4.0, 1)
    assert found == pytest.approx(8.0, abs=0.4)
    with pytest.raises(SystemExit, match="'large' answered nothing"):
        measure_capacity(lambda _: [Seen(0, "503", 0, 0)], "", "large", 1, 1.0, 1)


def in_process(plan: Plan) -> list[Seen]:
    """Carry out a plan without the start of a process."""
    return asyncio.run(send(plan))


# --- command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_for_every_recording_and_factor(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It measures the capacity, plays all contenders but the language model, and saves the figures and the picture."""
    options = ["--data", folder, "--seconds", "0.4", "--rounds", "1", "--scored", "1"]
    options += ["--trace", "azure_conv", "--factor", "1", "2", "--capacity", "40"]
    options += [
        "--json",
        str(tmp_path / "l.json"),
        "--picture",
        str(tmp_path / "l.png"),
    ]
    refuses = lambda model, number: model == "nano"  # noqa: E731
    with serving(LiveGateway(answers_of(1000), refuses)) as gateway:
        command.main(["--url", gateway.url, *options], in_process)
    saved = json.loads((tmp_path / "l.json").read_text())
    assert len(saved["rows"]) == 2 * 4
    by_name = {row["cell"]["contender"]: row for row in saved["rows"]}
    assert set(by_name) == set(CONTENDERS)
    assert by_name["nano"]["utility"] == 0.0 and by_name["nano"]["refused"] == 1.0
    assert by_name["large"]["right"] == by_name[AUTO]["right"] == 1.0
    assert by_name[AUTO]["shares"] == {"small": 1.0}
    assert by_name[AUTO]["recorded_s"] == pytest.approx(0.001)
    assert {found["best"] for found in saved["comparisons"]} <= {"small", "large"}
    # 8 and 16 requests; all answers of auto are scored, none of another contender
    assert len(gateway.scores) == 8 + 16 and set(gateway.scores.values()) == {1.0}
    assert Counter(model for model, _ in gateway.asked) == dict.fromkeys(CONTENDERS, 24)
    text = capsys.readouterr().out
    assert "azure_conv × 2: 40.00 requests a second" in text
    assert (tmp_path / "l.png").is_file()


def test_a_contender_that_is_not_there_is_named(folder: str) -> None:
    """The message has the models that are there."""
    with (
        serving(LiveGateway({})) as gateway,
        pytest.raises(
            SystemExit, match="unknown contender 'tiny'; choose of: auto, nano"
        ),
    ):
        command.main(["--url", gateway.url, "--data", folder, "--contender", "tiny"])
