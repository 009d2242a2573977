"""The recording of every size's answers to the demo's questions, and the replay of the policy on it."""

import asyncio
import json
from pathlib import Path

import httpx
import pandas as pd
import pytest

from assets.tasks import HARD, Task
from benchmarks.replay.figures import interval, leaders, report, shares, thirds
from benchmarks.replay.player import AUTO, Delays, Player
from benchmarks.replay.record import record
from benchmarks.replay.recording import RecordedAnswer, Recording, digest
from benchmarks.replay.run import configured
from deployments.demonstration.run import make_stream

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("nano", "small", "large")
SEED = 7
SECONDS = {"nano": 0.07, "small": 0.1, "large": 0.3}


def fake_answer(seed: int, number: int, task: Task, model: str) -> RecordedAnswer:
    """`large` is right everywhere; the other sizes are right except on the hard kinds."""
    return RecordedAnswer(
        seed=seed,
        number=number,
        model=model,
        kind=task.kind,
        question=digest(task),
        right=model == "large" or task.kind not in HARD,
        ttft_s=SECONDS[model] / 3,
        latency_s=SECONDS[model],
        prompt_tokens=12,
        output_tokens=30,
    )


def fake_recording(path: Path, requests: int, seed: int = SEED) -> Recording:
    """A whole recording of one seed."""
    recording = Recording(path)
    tasks = make_stream(seed, requests)
    recording.append(
        fake_answer(seed, number, task, model)
        for number, task in enumerate(tasks)
        for model in MODELS
    )
    return recording


def played(
    path: Path, requests: int, delays: Delays | None = None, seed: int = SEED
) -> pd.DataFrame:
    """The replay of a fake recording with the default configuration."""
    recording = fake_recording(path, requests, seed)
    stream = recording.stream(seed, make_stream(seed, requests), MODELS)
    return Player(*configured(ROOT / "serve_config.yaml"), delays).play(stream, seed)


def stream_of(text: str, model: str) -> httpx.Response:
    """A streamed answer of the gateway."""
    chunks = [
        {"choices": [{"delta": {"content": text}}]},
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}},
    ]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    headers = {
        "x-router-model": model,
        "x-router-decision-id": "d",
        "x-router-fallback": "none",
    }
    return httpx.Response(
        200, headers=headers, text="".join(lines) + "data: [DONE]\n\n"
    )


class FakeGateway:
    """Answers every question rightly; fails at one request if that is asked for."""

    def __init__(self, tasks: list[Task], fails_at: int = -1, answers_as: str = ""):
        self.asked: list[tuple[str, str]] = []
        self._answers = {task.question: task.answer for task in tasks}
        self._fails_at = fails_at
        self._answers_as = answers_as

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        question = body["messages"][0]["content"]
        if len(self.asked) == self._fails_at:
            return httpx.Response(503, text="busy")
        self.asked.append((body["model"], question))
        return stream_of(self._answers[question], self._answers_as or body["model"])

    def record(self, path: Path, tasks: list[Task]) -> int:
        """Run the recorder against this gateway."""

        async def run() -> int:
            transport = httpx.MockTransport(self)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://gateway"
            ) as client:
                return await record(
                    client, Recording(path), {SEED: tasks}, MODELS, 1, quiet=True
                )

        return asyncio.run(run())


def test_the_recorder_asks_every_size_every_question_once(tmp_path: Path) -> None:
    """The recording then has each answer with its correctness and its tokens, and no text."""
    tasks = make_stream(SEED, 4)
    gateway = FakeGateway(tasks)
    assert gateway.record(tmp_path / "r.jsonl", tasks) == 12
    expected = [(model, task.question) for task in tasks for model in MODELS]
    assert gateway.asked == expected
    answers = Recording(tmp_path / "r.jsonl").answers
    assert len(answers) == 12
    assert all(
        answer.right and answer.output_tokens == 3 for answer in answers.values()
    )
    assert tasks[0].question not in (tmp_path / "r.jsonl").read_text()


def test_an_interrupted_recording_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Answers that exist are not asked again, also if the last line is only half written."""
    path = tmp_path / "r.jsonl"
    tasks = make_stream(SEED, 4)
    with pytest.raises(ExceptionGroup):
        FakeGateway(tasks, fails_at=5).record(path, tasks)
    assert len(Recording(path).answers) == 5
    path.write_bytes(path.read_bytes() + b'{"seed": 7, "numb')
    second = FakeGateway(tasks)
    assert second.record(path, tasks) == 7
    assert len(second.asked) == 7
    assert len(Recording(path).answers) == 12


def test_an_answer_of_another_size_is_refused(tmp_path: Path) -> None:
    """A failover would put the answer of one size under the name of another."""
    tasks = make_stream(SEED, 2)
    with pytest.raises(ExceptionGroup) as caught:
        FakeGateway(tasks, answers_as="large").record(tmp_path / "r.jsonl", tasks)
    assert "'large' answered a question for 'nano'" in str(caught.value.exceptions[0])


def test_an_incomplete_seed_is_refused(tmp_path: Path) -> None:
    """The message says how many answers are missing."""
    recording = fake_recording(tmp_path / "r.jsonl", 4)
    with pytest.raises(ValueError, match="lacks 6 of 18 answers of seed 7"):
        recording.stream(SEED, make_stream(SEED, 6), MODELS)


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    """The tasks of a seed may change with the code, and a recording does not have their text."""
    recording = fake_recording(tmp_path / "r.jsonl", 4)
    with pytest.raises(ValueError, match="other questions"):
        recording.stream(SEED, make_stream(SEED + 1, 4), MODELS)


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    """The message has the number of the line."""
    path = tmp_path / "r.jsonl"
    fake_recording(path, 1)
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(ValueError, match="line 4 is not a recorded answer"):
        Recording(path)


def test_the_replayed_policy_learns_which_size_each_kind_needs(tmp_path: Path) -> None:
    """In the last third the hard kinds go to the size that can do them, and the easy ones to a cheaper size."""
    frame = played(tmp_path / "r.jsonl", 450)
    auto = frame[(frame.strategy == AUTO) & (frame.third == 3)]
    hard = auto.kind.isin(HARD)
    assert (auto[hard].model == "large").mean() > 0.8
    assert (auto[~hard].model != "large").mean() > 0.7


def test_a_replay_is_repeatable_and_keeps_the_recorded_answers(tmp_path: Path) -> None:
    """The fixed sizes get what was recorded, and the same seed gives the same choices."""
    frame = played(tmp_path / "a.jsonl", 60)
    again = played(tmp_path / "b.jsonl", 60)
    pd.testing.assert_frame_equal(frame, again)
    large = frame[frame.strategy == "large"]
    assert len(large) == 60
    assert large.score.mean() == 1.0
    assert set(large.latency_s) == {SECONDS["large"]}


def test_no_score_counts_before_the_ingress_has_its_snapshot(tmp_path: Path) -> None:
    """With snapshots further apart than the stream is long, the policy never learns anything."""
    never = played(tmp_path / "a.jsonl", 200, Delays(refresh_s=1e9))
    auto = never[never.strategy == AUTO]
    first, last = auto[auto.third == 1], auto[auto.third == 3]
    assert last.score.mean() == pytest.approx(first.score.mean(), abs=0.15)
    at_once = played(tmp_path / "b.jsonl", 200, Delays(refresh_s=0.0))
    learned = at_once[(at_once.strategy == AUTO) & (at_once.third == 3)]
    assert learned.score.mean() > last.score.mean() + 0.1


def table(*rows: tuple[str, int, int, str, str, float]) -> pd.DataFrame:
    """Rows of strategy, seed, third, kind, model and score; the utility is half of the score."""
    columns = ["strategy", "seed", "third", "kind", "model", "score"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(utility=frame.score / 2)


def small_table() -> pd.DataFrame:
    """Two seeds, in which `a` leads on `sum` and neither size on `copy`."""
    rows = []
    for seed in (1, 2):
        for third in (1, 2, 3):
            rows += [
                ("a", seed, third, "sum", "a", 1.0),
                ("b", seed, third, "sum", "b", 0.0),
                ("a", seed, third, "copy", "a", 0.98),
                ("b", seed, third, "copy", "b", 1.0),
                (AUTO, seed, third, "sum", "a" if seed == 1 else "b", 2.0 - seed),
                (AUTO, seed, third, "copy", "b", 1.0),
            ]
    return table(*rows)


def test_the_best_size_of_each_kind_is_the_bound_of_a_third() -> None:
    """It combines the sizes, so it is above each of them."""
    rows = thirds(small_table(), ("a", "b"), "score")
    assert len(rows) == 6
    assert rows["best by kind"].tolist() == [1.0] * 6
    assert rows["of best size"].tolist() == [0.99] * 6
    assert rows["ratio"].tolist() == [1.0] * 3 + [0.5] * 3


def test_only_a_size_that_leads_needs_a_share() -> None:
    """A difference below the lead gives no row."""
    assert leaders(small_table(), ("a", "b"), "score") == {"sum": "a"}
    rows = shares(small_table(), ("a", "b"), "score")
    assert rows[["kind", "leader", "seed", "n", "share"]].values.tolist() == [
        ["sum", "a", 1, 1, 1.0],
        ["sum", "a", 2, 1, 0.0],
    ]


def test_the_report_names_the_seed_in_which_a_leading_size_is_neglected() -> None:
    """It has the seed, the size, its share and the number of questions."""
    text = report(small_table(), ("a", "b"))
    assert "below 0.3 in 1 of 2" in text
    assert "seed 2: a has 0.00 of 1 'sum'" in text


def test_the_interval_of_a_mean_over_seeds_is_students() -> None:
    """Two values 0 and 1: 12.706 · (1/√2) / √2. One value has none."""
    assert interval(pd.Series([0.0, 1.0])) == "0.5000 ± 6.3531 (n = 2)"
    assert interval(pd.Series([0.25])) == "0.2500 (n = 1)"


def test_scaled_latencies_leave_everything_else(tmp_path: Path) -> None:
    """A recording of a busy machine can be replayed as if the sizes were idle."""
    recording = fake_recording(tmp_path / "r.jsonl", 3)
    stream = recording.stream(SEED, make_stream(SEED, 3), MODELS)
    scaled = stream.scaled(0.5)
    for before, after in zip(stream.answers, scaled.answers, strict=True):
        for one, half in zip(before, after, strict=True):
            assert half.latency_s == one.latency_s / 2
            assert half.ttft_s == one.ttft_s / 2
            assert (half.key, half.right) == (one.key, one.right)
