"""The command `calibrate`: its progress, its report, the picture, the MLflow run, and the user's own grader."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import NoAnswerError
from deployments.operations import calibrate
from deployments.operations.calibrate import Command, Options, grade_by_program
from deployments.tracking.calibration_report import draw, tables
from deployments.tracking.model_registry import PolicyRegistry
from deployments.tracking.tracker import Tracker
from policies.evaluation.size_comparison import SizeReport, compare_sizes
from policies.types import Objective
from tests.policies.evaluation.test_size_comparison import world
from tests.support.fakes import Remote
from tests.support.gateway import Gateway


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "POLL_S", 0.05)


def write(folder: Path, count: int = 4, **fields: Any) -> Path:
    path = folder / "prompts.jsonl"
    given = {"reference": "large", **fields}
    lines = [
        json.dumps({"prompt": f"What is {i} plus 10?", **given}) for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return path


def command(gateway: Gateway, path: Path, **options: Any) -> SizeReport | None:
    """Run the command against the gateway in this process."""
    given = Options(path, out=path.parent / "out", mlflow_wait=0, **options)
    return Command(gateway.client, given).run()


def test_the_command_prints_the_report_and_saves_the_picture(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second call asks nothing again, and prints the same report."""
    report = command(gateway, write(tmp_path))
    printed = capsys.readouterr().out
    assert report is not None and report.best["all"] == "large"
    assert "finished; 8 calls" in printed and "0 answers exist already" in printed
    assert "| all | **large** | 4 | 0 | 1.00 [0.51, 1.00]" in " ".join(printed.split())
    assert "worth its price" in printed and "not in MLflow yet" in printed
    (picture,) = (tmp_path / "out").glob("calibration-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert command(gateway, write(tmp_path)) == report
    printed = capsys.readouterr().out
    assert "8 answers exist already" in printed and "finished; 0 calls" in printed
    assert len(gateway.models["large"].calls) == 4


def test_the_command_keeps_its_limits(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes, sample and budget."""
    command(gateway, write(tmp_path, 9), models=["small"], sample=5)
    assert len(gateway.models["small"].calls) == 5
    assert gateway.models["large"].calls == []
    command(gateway, write(tmp_path, 9), max_calls=3)
    assert "over budget: the 3 calls are used up" in capsys.readouterr().out
    assert sum(len(gateway.models[name].calls) for name in ("small", "large")) == 8


def test_a_wrong_file_and_a_refusal_end_the_command(
    gateway: Gateway, tmp_path: Path
) -> None:
    """The message names the line; that of the gateway says what to change."""
    path = write(tmp_path)
    with pytest.raises(SystemExit, match="choose from: small, large"):
        command(gateway, path, models=["minilm"])
    path.write_text('{"promt": "a"}')
    with pytest.raises(SystemExit, match="line 1: unknown key 'promt'"):
        command(gateway, path)


def grader(folder: Path, *lines: str) -> str:
    path = folder / "grade.py"
    path.write_text("\n".join(("import json, os, sys", *lines)))
    return f"{sys.executable} {path}"


def test_the_users_program_grades_in_this_process(
    gateway: Gateway, tmp_path: Path
) -> None:
    """It gets prompt, reference and answer, and its score is the score of the report."""
    program = grader(
        tmp_path,
        "given = json.loads(sys.stdin.readline())",
        "assert given['prompt'].startswith('What is') and given['reference'] is None",
        "open(sys.argv[0] + '.pid', 'a').write(f'{os.getppid()}\\n')",
        "print(0.75 if given['answer'] == 'large' else 0.25)",
    )
    path = write(tmp_path, 2, reference=None)
    report = command(gateway, path, grader=program)
    assert report is not None
    means = {
        figures.arm: figures.score.mean
        for figures in report.figures
        if figures.kind == "all"
    }
    assert means == {"small": 0.25, "large": 0.75}
    parents = (tmp_path / "grade.py.pid").read_text().split()
    assert set(parents) == {str(os.getpid())}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("print('good')", "must print one number"),
        ("print(1.5)", "must print one number"),
        ("sys.exit('no such rule')", "no such rule"),
    ],
)
def test_a_grader_that_fails_is_named(tmp_path: Path, line: str, words: str) -> None:
    """The command ends, and says what the program did."""
    answer = {"prompt": "a", "reference": "b", "answer": "c"}
    with pytest.raises(SystemExit, match=words):
        grade_by_program(grader(tmp_path, line), answer)
    with pytest.raises(SystemExit, match="did not run"):
        grade_by_program(str(tmp_path / "missing"), answer)


def test_the_report_becomes_an_mlflow_run(tmp_path: Path, mlflow_uri: str) -> None:
    """The tracker logs it once, with metrics, the report and the picture; the command names the run."""
    gateway = Gateway(tmp_path, mlflow_uri=mlflow_uri, experiment="test")
    with gateway.client:
        tracker = Tracker(gateway.settings, gateway.router, 0.0)
        gateway.ingress.tracker = Remote(tracker)
        command(gateway, write(tmp_path))
        registry = PolicyRegistry(mlflow_uri, "test")
        assert gateway.client.portal is not None
        for _ in range(2):
            gateway.client.portal.call(tracker._log_calibration, registry)
        status = gateway.client.get("/v1/router/calibrations").json()
        (run,) = registry.client.search_runs(
            [registry.experiment_id], "tags.kind = 'calibration'"
        )
        assert run.info.run_id == status["mlflow_run"]
        assert run.data.tags["calibration"] == status["run_id"]
        assert run.data.metrics["score/large"] == 1.0
        assert run.data.metrics["score/large.n"] == 4.0
        assert run.data.metrics["score/small/arithmetic"] == 0.0
        files = {f.path for f in registry.client.list_artifacts(run.info.run_id)}
        assert files == {"report.json", "report.md", "calibration.png"}


def test_the_tables_and_the_picture_show_the_report(tmp_path: Path) -> None:
    """Every size and kind has a row; unknown values are named so."""
    report = compare_sizes(world(), Objective(latency_weight=0.1, cost_weight=100.0))
    text = tables(report)
    assert text.count("| strings ") == 3 and "**large**" in text
    assert "| 1,000 " in text  # (1 - 0.1) / 0.0009
    draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    empty = compare_sizes([], Objective())
    assert tables(empty)
    draw(empty, tmp_path / "empty.png")


def test_a_gateway_that_never_answered_is_not_waited_for(tmp_path: Path) -> None:
    """The command ends at once, and asks whether the gateway runs."""

    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    path = write(tmp_path)
    transport = httpx.MockTransport(refuse)
    client = httpx.Client(transport=transport, base_url="http://gateway")
    with client, pytest.raises(NoAnswerError, match="is it running"):
        Command(client, Options(path)).run()


def test_the_command_sends_the_prompts_again_when_the_router_restarted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gateway is away for a moment and has no prompts afterwards; `--fresh` holds for the first time only."""
    model = {"prompts": 2, "answered": 0, "failed": 0, "waiting": False}
    status = {
        "run_id": "r",
        "state": "running",
        "reason": "",
        "calls": 0,
        "spent_usd": 0.0,
        "reused": 0,
        "ungraded": 0,
        "models": {"small": model},
        "mlflow_run": "",
    }
    replies: list[tuple[int, dict[str, Any]]] = [
        (202, status),
        (503, {"error": {"message": "the router is not available"}}),
        (200, {**status, "state": "interrupted"}),
        (202, status),
        (200, {**status, "state": "cancelled"}),
        (200, {**status, "report": None}),
    ]
    sent = []

    def reply(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        code, content = replies.pop(0)
        return httpx.Response(code, json=content)

    transport = httpx.MockTransport(reply)
    with httpx.Client(transport=transport, base_url="http://gateway") as client:
        path = write(tmp_path, 2)
        assert Command(client, Options(path, fresh=True)).run() is None
    posts = [json.loads(r.content) for r in sent if r.method == "POST"]
    assert [post["fresh"] for post in posts] == [True, False]
    assert posts[0]["prompts"] == posts[1]["prompts"] and not replies
    assert "there is no answer" in capsys.readouterr().out
