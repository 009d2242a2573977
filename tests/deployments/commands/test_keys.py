"""The commands on API keys: what they print, and what they do to the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.access import api_keys
from deployments.access.api_keys import ApiKeyStore
from tests.deployments.access.test_api_keys import Locked
from tests.support.commands import invoke
from tests.support.gateway import eventually

AWAY = "--url http://127.0.0.1:9"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def run(line: str, file: Path, code: int = 0) -> Any:
    """Run a command on this file; its result, with the standard output."""
    result = invoke(None, f"keys {line} --file {file}")
    assert result.exit_code == code, result.output
    return result


def test_the_key_is_printed_once(file: Path) -> None:
    """Standard output has the key and nothing else; the list has names and scopes, but no secrets."""
    made = run("add ann --scopes infer,operate", file)
    key = made.stdout.strip()
    assert made.stderr == "this is the only time that it is shown\n"
    found = ApiKeyStore(file).find(key)
    assert found is not None and found.scopes == ("infer", "operate")
    listed = run(f"list {AWAY}", file).stdout
    assert "ann" in listed and "infer, operate" in listed
    assert key not in listed and key.rpartition("-")[2] not in listed
    assert found.sha256 not in run(f"list --json {AWAY}", file).stdout


def test_the_list_shows_limits_dates_and_dashes(file: Path) -> None:
    """A key of an earlier release has no date; without the gateway, the last use and the standing are unknown."""
    run("add ann --requests-per-minute 5 --scores-per-minute 7", file)
    stored = json.loads(file.read_text())
    old = {**stored["keys"][0], "id": "0a0a0a0a", "name": "old"}
    del old["created_s"]
    file.write_text(json.dumps({"keys": [*stored["keys"], old]}))
    lines = run(f"list {AWAY}", file).stdout.splitlines()
    ann, older = lines[2].split(), lines[3].split()
    assert "5 requests/min, 7 scores/min" in lines[2]
    assert ann[-3].startswith("20") and ann[-2:] == ["-", "-"]
    assert older[0] == "old" and older[-3:] == ["-", "-", "-"]
    plain = json.loads(run(f"list --json {AWAY}", file).stdout)["keys"]
    assert plain[0]["requests_per_minute"] == 5 and plain[1]["created_s"] is None
    assert plain[0]["standing"] == "-" and plain[0]["last_used_s"] is None


def test_an_empty_list_says_so(file: Path) -> None:
    """With the command that makes a key."""
    result = run("list", file)
    assert "no keys yet" in result.stdout and "router keys add NAME" in result.stdout
    assert json.loads(run("list --json", file).stdout) == {"keys": []}


@pytest.mark.parametrize("verb", ["remove", "trust", "distrust"])
def test_an_unknown_name_is_refused(file: Path, verb: str) -> None:
    """The file stays as it is."""
    run("add ann", file)
    before = file.read_text()
    result = run(f"{verb} bob", file, code=1)
    assert f"there is no key of the name 'bob' in {file}" in result.stderr
    assert result.stdout == "" and file.read_text() == before


def test_keys_are_trusted_and_removed(file: Path) -> None:
    """All keys of the name."""
    for name in ("ann", "ann", "ben"):
        run(f"add {name}", file)
    assert run("trust ann", file).stdout == "2 keys of ann: trusted\n"
    assert [k.trusted for k in api_keys.read(file).values()] == [True, True, False]
    assert "trusted" in run(f"list {AWAY}", file).stdout
    assert json.loads(run("distrust ann --json", file).stdout) == {
        "changed": 2,
        "trusted": False,
    }
    assert not any(key.trusted for key in api_keys.read(file).values())
    assert run("remove ann", file).stdout == "removed 2 keys of ann\n"
    assert [key.name for key in api_keys.read(file).values()] == ["ben"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("add ../x", "bad name"),
        ("add ann --scopes infer,root", "unknown scope"),
        ("add ann --scopes ''", "scope"),
        ("add ann --concurrency 0", "limits begin at 1"),
    ],
)
def test_a_wrong_key_is_refused(file: Path, line: str, words: str) -> None:
    """No key is made."""
    assert words in run(line, file, code=1).stderr
    assert not file.exists()


def test_a_broken_file_is_refused_and_kept(file: Path) -> None:
    """Every command names the file."""
    file.write_text("{")
    for line in ("list", "add ann", "remove ann", "trust ann"):
        assert "is no file of API keys" in run(line, file, code=1).stderr
    assert file.read_text() == "{"


def test_the_gateway_says_when_a_key_was_used_and_whether_its_scores_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question needs a key with the scope `operate`; without one there are dashes."""
    gateway = Locked(tmp_path)
    file = tmp_path / "keys.json"
    with gateway.client:
        assert gateway.ask("ann").status_code == 200
        learner = gateway.router.thing._learner
        learner.quarantined["ben"] = {"scores": 12}

        def keys() -> dict[str, dict[str, Any]]:
            result = invoke(gateway.client, f"keys list --json --file {file}")
            assert result.exit_code == 0
            return {key["name"]: key for key in json.loads(result.stdout)["keys"]}

        assert {key["standing"] for key in keys().values()} == {"-"}
        monkeypatch.setenv("ROUTER_API_KEY", gateway.keys["op"])
        eventually(lambda: keys()["ann"]["last_used_s"] is not None)
        listed = keys()
        assert listed["ben"]["standing"] == "quarantined"
        assert listed["ann"]["standing"] == "count"
        assert listed["ben"]["last_used_s"] is None
