"""The commands for stored data and for going back, against a gateway and on files."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from deployments.commands import data, gateway, restore_version
from policies.rollout.roles import CHAMPION
from tests.deployments.operations.test_backup import make, make_instance
from tests.deployments.router.test_going_back import Hours, differences, never_had
from tests.deployments.tracking.test_promotion import Operated
from tests.support.gateway import eventually

RUNNER = CliRunner()


@pytest.fixture
def operated(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Operated]:
    """A gateway with a tracker, which the commands reach in place of one on the network."""
    made = Operated(tmp_path, mlflow_uri, policy="thompson")
    monkeypatch.setattr(
        gateway, "connect", lambda url, timeout_s=0.0: _Open(made.client)
    )
    with made.client:
        made.ingress.tracker = made.tracker
        yield made


class _Open:
    """The test's client, which stays open when a command leaves it."""

    def __init__(self, client: Any):
        self._client = client

    def __enter__(self) -> Any:
        return self._client

    def __exit__(self, *_: object) -> None:
        pass


def run(app: typer.Typer, *line: str) -> Any:
    return RUNNER.invoke(app, list(line))


def restore_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(restore_version.restore_version)
    return app


def test_a_backup_is_restored_by_commands(tmp_path: Path) -> None:
    """Both say what is where, and refuse a folder that is not empty with status 1."""
    make(f"sqlite:///{tmp_path}/var/journal.db")
    config = make_instance(tmp_path).config
    where = ["--config", str(config), "--state", str(tmp_path / "var")]
    done = run(data.app, "backup", str(tmp_path / "backup"), *where)
    assert done.exit_code == 0 and "journal.db" in done.output, done.output
    again = run(data.app, "backup", str(tmp_path / "backup"), *where)
    assert again.exit_code == 1 and "is not empty" in again.output
    new = ["--state", str(tmp_path / "new")]
    done = run(data.app, "restore", str(tmp_path / "backup"), *new)
    assert done.exit_code == 0 and str(tmp_path / "new/journal.db") in done.output
    again = run(data.app, "restore", str(tmp_path / "backup"), *new)
    assert again.exit_code == 1 and "is not empty" in again.output
    second = run(data.app, "backup", str(tmp_path / "second"), *where, "--json")
    said = json.loads(second.output)
    assert said["backup"] == str(tmp_path / "second")
    assert any("journal.db" in part for part in said["parts"])
    third = ["--state", str(tmp_path / "third"), "--json"]
    restored = run(data.app, "restore", str(tmp_path / "second"), *third)
    assert json.loads(restored.output)["state"] == str(tmp_path / "third")


def test_a_user_is_exported_and_erased_by_commands(
    operated: Operated, tmp_path: Path
) -> None:
    """The export is a private file; while MLflow is not done, the erasure ends with exit code 1."""
    for _ in range(3):
        assert operated.chat(user="zoe-1987").status_code == 200
    eventually(lambda: not operated.ingress.router_client.outcomes.unsent)
    file = tmp_path / "zoe.jsonl"
    done = run(data.app, "export", "--user", "zoe-1987", "--output", str(file))
    assert done.exit_code == 0, done.output
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    done = run(data.app, "export", "--user", "zoe-1987", "--output", str(file))
    assert done.exit_code == 1 and "name a new file" in done.output
    done = run(
        data.app,
        *("erase", "--user", "zoe-1987", "--wait", "0"),
        *("--state", str(tmp_path / "none")),
    )
    assert done.exit_code == 1 and "waiting for MLflow" in done.output
    done = run(data.app, "export", "--user", "zoe-1987")
    assert done.exit_code == 0 and done.output == ""
    neither = run(data.app, "erase")
    assert neither.exit_code == 2 and "either --key or --user" in neither.output


def test_the_router_goes_back_to_a_version_by_a_command(operated: Operated) -> None:
    """The result is registered as the champion; a rollback undoes it. Ancestors are not promoted but restored."""
    operated.serve(100)
    operated.command("register")
    operated.serve(100)
    operated.command("register")
    for verb in ("evaluate", "promote"):
        answer = operated.client.post(f"/v1/router/versions/1/{verb}", json={})
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert error["code"] == "ancestor_of_champion" and "restore" in error["message"]
    forced = {"override_gate": "a drill"}
    answer = operated.client.post("/v1/router/versions/1/promote", json=forced)
    assert answer.json()["error"]["code"] == "ancestor_of_champion"
    assert "evaluation.promote" not in operated.registry.show(1)["tags"]

    router = operated.router.thing
    scores = router._learner.records.scored
    first = next(s.time_s for row, s in router._journal.scores(10**6) if row > 300)
    line = ("1", "--forget", str(first), "--reason", "a bad hour", "--json")
    done = run(restore_app(), *line)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    number = told["version"]
    assert told["roles"]["champion"]["version"] == number
    changes = [change["what"] for change in told["history"]]
    assert changes[-2:] == ["restored", "registered"]
    tags = operated.registry.show(number)["tags"]
    assert tags["restored_from"] == "1" and tags["parent"] == "1"
    assert operated.registry.aliases()["champion"] == number
    assert router._learner.records.scored < scores
    # the version came through the registry's files
    found = SimpleNamespace(learner=router._learner)
    system = SimpleNamespace(settings=operated.settings, rows=lambda: Hours.rows(found))  # type: ignore[arg-type]
    expected, derived = never_had(system, first, None)  # type: ignore[arg-type]
    champion = router._rollout.roles.members[CHAMPION]
    assert max(differences(champion, expected.policy).values()) < 1e-9
    assert router._arm_stats.totals == derived.arm_stats.totals
    rates = router._projections.scoring_rates.state()
    assert rates == derived.scoring_rates.state()

    state = operated.command("rollback --reason", "it was right")
    assert list(state["roles"]) == ["champion"]
    assert not operated.router.thing._journal.forgotten
    refused = run(restore_app(), "99", "--forget", "2026-01-01T00:00Z")
    assert refused.exit_code == 1 and "no version 99" in refused.output
    future = run(restore_app(), "1", "--forget", "2100-01-01")
    assert future.exit_code == 1 and "still to come" in future.output
    wrong = run(restore_app(), "1", "--forget", "yesterday")
    assert wrong.exit_code == 1 and "forget_since" in wrong.output


def test_without_a_gateway_the_commands_end_with_a_message() -> None:
    """No stack trace, and the address that did not answer."""
    done = run(data.app, "erase", "--key", "ann", "--url", "http://127.0.0.1:9")
    assert done.exit_code == 3 and "is it running?" in done.output
