"""The commands on policy versions: their words, tables and exit codes, with a real registry and with fixed replies."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.commands.output import duration, iso, table
from tests.deployments.tracking.test_promotion import Operated
from tests.support.commands import data_of, invoke
from tests.support.gateway import Gateway

REPORT = {
    "version": 12,
    "champion_version": 9,
    "promote": True,
    "reason": "all above 0",
    "difference": {"value": 0.12},
    "lower": 0.05,
    "upper": 0.19,
    "level": 0.95,
    "bound": "interval",
    "decisions": 800,
    "randomised": 640,
    "left_out": {"without a score": 40},
}
DIFF = {
    "versions": [12, 9],
    "changed": {
        "policy": ["thompson", "uniform"],
        "options": [{"exploration": 0.3}, {}],
    },
    "decisions": 500,
    "shares": [{"small": 0.25, "large": 0.75}, {"small": 0.5, "large": 0.5}],
    "decide_otherwise": 0.25,
    "kinds": {
        "code": {
            "decisions": 300,
            "shares": [{"small": 0.1, "large": 0.9}, {"small": 0.5, "large": 0.5}],
            "decide_otherwise": 0.4,
        }
    },
}
HISTORY = [
    {"what": "promoted", "role": "champion", "version": 3, "reason": "by ann: a drill"},
    {
        "what": "registered",
        "role": "champion",
        "version": 9,
        "reason": "what it has learned since",
        "time_s": 1e9,
        "by": "automatic",
        "first": 4,
    },
    {
        "what": "rolled back",
        "role": "champion",
        "version": 3,
        "reason": "it is Friday",
        "time_s": 1e9 + 60,
        "by": "ops",
        "loser": 9,
    },
]


@pytest.fixture
def operated(tmp_path: Path, mlflow_uri: str) -> Iterator[Operated]:
    made = Operated(tmp_path, mlflow_uri, policy="uniform")
    with made.client:
        made.ingress.tracker = made.tracker
        yield made


def replying(content: Any) -> httpx.Client:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=content))
    return httpx.Client(transport=transport, base_url="http://gateway")


def said(client: httpx.Client, line: str, code: int = 0) -> str:
    """What a command prints."""
    result = invoke(client, line)
    assert result.exit_code == code, result.output
    printed: str = result.stdout
    return printed


def test_from_the_first_version_to_the_gate(operated: Operated) -> None:
    """A worse version is registered, compared, evaluated (exit code 4), refused (4) and tried as a shadow."""
    client = operated.client
    assert "no versions yet" in said(client, "versions list")
    assert "no change yet" in said(client, "versions history")
    assert said(client, "versions register") == "registered as version 1\n"
    made = invoke(
        client, "versions register --policy always --options", '{"arm": "small"}'
    )
    assert made.stdout == "registered as version 2\n"
    operated.serve(600)
    report = said(client, "versions evaluate 2", code=4)
    assert "version 2 is not proved better" in report and "all below 0" in report
    plain = invoke(client, "versions evaluate 2 --json")
    assert plain.exit_code == 4 and json.loads(plain.stdout)["promote"] is False
    refused = invoke(client, "versions promote 2")
    assert refused.exit_code == 4 and "override_gate" in refused.stderr
    assert refused.stdout == ""

    listed = said(client, "versions list").splitlines()
    assert listed[2].split()[0] == "2" and "always (arm=small)" in listed[2]
    assert "n=600 over 1" in listed[2]
    assert listed[3].split()[:2] == ["1", "champion"]
    shown = said(client, "versions show 2")
    assert "always (arm=small)" in shown and "gain per request over version 1" in shown
    compared = said(client, "versions diff 2")
    assert "version 2" in compared and "version 1" in compared
    assert "they decide 50.0% of the newest" in compared
    assert "small 100.0%" in compared

    promoted = said(client, "versions promote 2 --to shadow")
    assert promoted.startswith("version 2 is shadow") and "0.0%" in promoted
    removed = said(client, "versions rollback --role shadow --reason enough")
    assert removed.startswith("the shadow is removed") and "\nshadow" not in removed
    history = data_of(client, "versions history")["history"]
    assert [(c["what"], c["role"], c["version"]) for c in history] == [
        ("registered", "champion", 1),
        ("registered", "", 2),
        ("seated", "shadow", 2),
        ("retired", "shadow", 2),
    ]
    assert {change["by"] for change in history} == {"an operator"}
    assert history[-1]["reason"] == "enough"
    times = [change["time_s"] for change in history]
    assert times == sorted(times)
    assert "an operator" in said(client, "versions history")


def test_refusals_of_versions(operated: Operated) -> None:
    """What does not exist or does not fit is exit code 1, and the gateway's sentence is printed."""
    for line, words in (
        ("versions show 7", "there is no version 7"),
        ("versions diff 7 8", "there is no version 7"),
        ("versions evaluate 1", "no version of the champion is registered"),
        ("versions rollback", "no promotion is being watched"),
        ("versions rollback --role shadow", "there is no shadow"),
        ("versions register --policy oracle", "unknown policy 'oracle'"),
    ):
        result = invoke(operated.client, line)
        assert result.exit_code == 1 and words in result.stderr, line
        assert result.stdout == ""


def test_without_mlflow_there_are_no_versions(gateway: Gateway) -> None:
    """The message says which setting is missing; the history needs no MLflow."""
    result = invoke(gateway.client, "versions list")
    assert result.exit_code == 1 and "set mlflow_uri" in result.stderr
    assert invoke(gateway.client, "versions history").exit_code == 0


def test_a_comparison_is_labelled_with_the_versions() -> None:
    """What differs, how often they decide differently, and the shares, in total and by kind."""
    lines = said(replying(DIFF), "versions diff 12 9").splitlines()
    assert lines[0].split("  ")[0] == "what differs"
    assert "version 12" in lines[0] and "version 9" in lines[0]
    assert any("exploration=0.3" in line and "(none)" in line for line in lines)
    assert "they decide 25.0% of the newest 500 requests differently" in lines
    assert any(line.split() == ["small", "25.0%", "50.0%"] for line in lines)
    assert any(
        line.split() == ["code", "300", "40.0%", "large", "90.0%", "small", "50.0%"]
        for line in lines
    )
    alike = {"versions": [2, 1], "changed": {}, "decisions": 0}
    text = said(replying(alike), "versions diff 2")
    assert "have the same policy" in text and "no decision" in text


def test_an_evaluation_in_words() -> None:
    """The verdict, the gain with its interval and level, and the decisions."""
    text = said(replying(REPORT), "versions evaluate 12")
    assert "version 12 may be promoted: all above 0" in text
    assert "over version 9: +0.1200, between +0.0500 and +0.1900 at 95%" in text
    assert "on 800 decisions, 640 of them" in text
    assert "left out: 40 without a score" in text


def test_the_history_of_an_earlier_release_has_no_time() -> None:
    """Unknown values are dashes; several registrations are one row; the reason keeps who it was."""
    lines = said(replying({"history": HISTORY}), "versions history").splitlines()[2:]
    assert lines[0].split()[0] == "-" and "by ann: a drill" in lines[0]
    assert lines[1].startswith("2001-09-09T01:46:40Z") and "4 to 9" in lines[1]
    assert "ops" in lines[2] and "it is Friday" in lines[2]


def test_times_and_tables() -> None:
    """Two units at most; None and empty texts are dashes, and numbers are printed as they are."""
    assert [duration(s) for s in (0, 59.9, 61, 3600, 90_061, -5)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h",
        "1 d 1 h",
        "0 s",
    ]
    assert iso(None) == "-" and iso(0) == "1970-01-01T00:00:00Z"
    text = table(("a", "b"), [("1e5", None), ("0.10", "")])
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["1e5", "-"],
        ["0.10", "-"],
    ]
    assert table(("a",), [], "there is nothing") == "there is nothing"
