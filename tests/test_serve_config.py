"""serve_config.yaml and its GPU sibling: every key has a reader, and typos are refused before anything starts."""

import copy
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray.serve._private.constants import DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S

from deployments import dataplane, launch
from deployments.launch import load
from deployments.lint import lint
from deployments.settings import GatewaySettings, Tuning

ROOT = Path(__file__).resolve().parent.parent
FILES = ("serve_config.yaml", "serve_config.gpu.yaml")
WHOLE = (*FILES, "deploy/rayservice.yaml")


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return config if "spec" not in config else yaml.safe_load(config["spec"]["serveConfigV2"])


@pytest.mark.parametrize("name", FILES)
def test_the_shipped_files_are_valid(name: str) -> None:
    """Against Serve's own schema and ours."""
    assert lint(read(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_every_arm_has_an_application_and_every_application_an_arm(name: str) -> None:
    """By the same name, with back-pressure set on every model."""
    config = read(name)
    gateway = next(a for a in config["applications"] if a["name"] == "gateway")
    served = {a["name"]: a for a in config["applications"] if a["name"] != "gateway"}
    assert set(gateway["args"]["models"]) == set(served)
    for application in served.values():
        assert application["route_prefix"] is None
        options = application["args"].get("deployment_config") or application["deployments"][0]
        assert options["max_queued_requests"] > 0 and options["max_ongoing_requests"] <= 1000
        assert options["autoscaling_config"]["target_ongoing_requests"] < options["max_ongoing_requests"]


@pytest.mark.parametrize("name", WHOLE)
def test_what_all_ingresses_admit_wakes_the_autoscaler_and_fits_into_the_engine(name: str) -> None:
    """Of each model: above its target, or no replica is ever added; not above what Serve and vLLM run at once, or
    requests wait where priorities do not reach. And an ingress refuses by a 429 before Serve refuses it.
    """
    *served, gateway = read(name)["applications"]
    ingress = next(d for d in gateway["deployments"] if d["name"] == "Ingress")
    admission = Tuning.model_validate(ingress["user_config"]).admission
    admitted = ingress["num_replicas"] * admission.running
    for application in served:
        options = application["args"].get("deployment_config") or application["deployments"][0]
        most = application["args"].get("engine_kwargs", {}).get("max_num_seqs", admitted)
        assert options["autoscaling_config"]["target_ongoing_requests"] < admitted, application["name"]
        assert admitted <= min(options["max_ongoing_requests"], most), application["name"]
    assert admission.requests < ingress["max_ongoing_requests"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_replica_that_is_replaced_may_finish_what_it_has_begun(name: str) -> None:
    """A model's its answers, an ingress's the wait before them, too; and no proxy hangs up earlier."""
    *served, gateway = read(name)["applications"]
    ingress = next(d for d in gateway["deployments"] if d["name"] == "Ingress")
    tuning = Tuning.model_validate(ingress["user_config"])
    for application in served:
        options = application["args"].get("deployment_config") or application["deployments"][0]
        assert options["graceful_shutdown_timeout_s"] >= tuning.answer_timeout_s, application["name"]
    assert ingress["graceful_shutdown_timeout_s"] >= tuning.admission.wait_s + tuning.answer_timeout_s
    assert float(dataplane.environment(ROOT, 0)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= tuning.answer_timeout_s


def test_too_short_a_grace_is_refused_with_what_to_write() -> None:
    """Serve's own is 20 s; an `answer_timeout_s` that grows needs more of it."""
    config = read("serve_config.yaml")
    ingress = config["applications"][-1]["deployments"][0]
    ingress["user_config"]["answer_timeout_s"] = 500
    (wrong,) = lint(config)
    assert "Ingress.graceful_shutdown_timeout_s is 360" in wrong and "write 530" in wrong
    del ingress["graceful_shutdown_timeout_s"]
    (wrong,) = lint(config)
    assert f"is {DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S:g}" in wrong


def every_key(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys whose names are ours or Serve's to check."""
    free = ("engine_kwargs", "env_vars", "models", "presets", "bundles", "experimental_configs")
    found = []
    if isinstance(node, dict):
        for key, value in node.items():
            if not path or path[-1] not in free:
                found.append((*path, key))
            if key not in ("model_loading_config", "placement_group_config", "runtime_env", "bundles", "options"):
                found += every_key(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            found += every_key(value, (*path, i))
    return found


def test_a_typo_in_any_key_is_refused() -> None:
    """Each key of the file in turn gets a letter too many."""
    config, missed = read("serve_config.yaml"), []
    keys = [path for path in every_key(config) if path[-1] not in ("engine_kwargs",) and "engine_kwargs" not in path]
    assert len(keys) > 60
    for path in keys:
        broken = copy.deepcopy(config)
        parent = broken
        for step in path[:-1]:
            parent = parent[step]
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        try:
            if not lint(broken):
                missed.append(path)
        except (KeyError, AttributeError):
            missed.append((*path, "crashed"))
    assert missed == []


def test_a_typo_names_the_key_and_the_nearest_valid_one(tmp_path: Path) -> None:
    """The launcher says it and starts nothing."""
    config = read("serve_config.yaml")
    config["applications"][0]["args"]["deployment_config"]["max_queued_request"] = 3
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match=r"max_queued_request'; did you mean 'max_queued_requests'"):
        load(path, tmp_path, 0)


def test_reload_gives_the_running_system_its_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `up` had laid it out, or Serve would take all for changed; and only where there is one."""
    config = read("serve_config.yaml")
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    before = load(path, tmp_path, 70)
    with pytest.raises(SystemExit, match="make serve"):
        launch.reload(before)  # nothing with this folder's mark runs
    ingress = config["applications"][-1]["deployments"][0]
    ingress["user_config"]["presets"]["slow"] = {"latency_weight": 0.01}
    path.write_text(yaml.safe_dump(config))
    sent: list[tuple[str, dict[str, Any]]] = []

    def put(url: str, json: dict[str, Any], **_: Any) -> httpx.Response:
        sent.append((url, json))
        return httpx.Response(200)

    def get(url: str, **_: Any) -> httpx.Response:
        now = "RUNNING" if len(sent) == 1 else "NOT_STARTED"
        return httpx.Response(200, json={"applications": {a["name"]: {"status": now} for a in config["applications"]}})

    monkeypatch.setattr(launch.Cluster, "processes", lambda self: [psutil.Process()])
    monkeypatch.setattr(launch.httpx, "put", put)
    monkeypatch.setattr(launch.httpx, "get", get)
    arguments = ["launch", "reload", "--config", str(path), "--state", str(tmp_path), "--offset", "70"]
    monkeypatch.setattr(launch.sys, "argv", arguments)
    launch.main()
    ((url, given),) = sent
    assert url == "http://127.0.0.1:8335/api/serve/applications/" and given["http_options"]["port"] == 8070
    (changed,) = [
        new for new, old in zip(given["applications"], before.config["applications"], strict=True) if new != old
    ]
    assert changed["args"] == before.config["applications"][-1]["args"]  # the journal's place, too
    assert changed["deployments"][0]["user_config"] == ingress["user_config"]


def test_arms_keep_the_order_of_the_file() -> None:
    """Smallest first: the static rules depend on it."""
    settings = GatewaySettings.model_validate(read("serve_config.yaml")["applications"][-1]["args"])
    assert [arm.name for arm in settings.arms()] == ["nano", "small", "large", "minilm"]


def test_an_unknown_policy_is_refused_before_anything_starts() -> None:
    """With the known ones in the message."""
    config = read("serve_config.yaml")
    config["applications"][-1]["args"]["policy"]["name"] = "tompson"
    assert any("choose one of: thompson, static" in line for line in lint(config))
