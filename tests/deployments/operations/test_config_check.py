"""The shipped configurations are valid, and an invalid one is refused before the system starts."""

import copy
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.constants import DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S

from deployments.operations import haproxy, launcher
from deployments.operations.config_check import check_config
from deployments.operations.launcher import load
from deployments.settings import GatewaySettings, Tuning, explain, latest

ROOT = Path(__file__).resolve().parents[3]
FILES = ("serve_config.yaml", "serve_config.gpu.yaml")
WITH_KUBERNETES = (*FILES, "deploy/rayservice.yaml")


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return (
        config
        if "spec" not in config
        else yaml.safe_load(config["spec"]["serveConfigV2"])
    )


@pytest.mark.parametrize("name", FILES)
def test_the_shipped_files_are_valid(name: str) -> None:
    """They match the schemas of Serve and of the gateway."""
    assert check_config(read(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_every_arm_has_an_application_and_every_application_an_arm(name: str) -> None:
    """Arm and application have the same name, and every model limits its queue."""
    config = read(name)
    gateway = next(a for a in config["applications"] if a["name"] == "gateway")
    served = {a["name"]: a for a in config["applications"] if a["name"] != "gateway"}
    assert set(gateway["args"]["models"]) == set(served)
    for application in served.values():
        assert application["route_prefix"] is None
        options = (
            application["args"].get("deployment_config")
            or application["deployments"][0]
        )
        assert (
            options["max_queued_requests"] > 0
            and options["max_ongoing_requests"] <= 1000
        )
        assert (
            options["autoscaling_config"]["target_ongoing_requests"]
            < options["max_ongoing_requests"]
        )


@pytest.mark.parametrize("name", WITH_KUBERNETES)
def test_admission_limits_fit_the_autoscaler_and_the_engine(
    name: str,
) -> None:
    """All ingresses together admit more requests than a model's target, or Serve would never add a replica.

    They admit no more than Serve and vLLM run at once, or requests would wait where priorities have no effect. An
    ingress refuses a request with 429 before Serve refuses it.
    """
    *served, gateway = read(name)["applications"]
    ingress = next(d for d in gateway["deployments"] if d["name"] == "Ingress")
    admission = Tuning.model_validate(ingress["user_config"]).admission
    admitted = ingress["num_replicas"] * admission.max_running
    for application in served:
        options = (
            application["args"].get("deployment_config")
            or application["deployments"][0]
        )
        most = (
            application["args"].get("engine_kwargs", {}).get("max_num_seqs", admitted)
        )
        assert options["autoscaling_config"]["target_ongoing_requests"] < admitted, (
            application["name"]
        )
        assert admitted <= min(options["max_ongoing_requests"], most), application[
            "name"
        ]
    assert admission.max_in_flight < ingress["max_ongoing_requests"]


@pytest.mark.parametrize("name", WITH_KUBERNETES)
def test_shutdown_timeouts_let_replicas_finish_their_requests(name: str) -> None:
    """A model has time for its answers, an ingress also for the wait before them, and HAProxy for both."""
    *served, gateway = read(name)["applications"]
    ingress = next(d for d in gateway["deployments"] if d["name"] == "Ingress")
    tuning = Tuning.model_validate(ingress["user_config"])
    for application in served:
        options = (
            application["args"].get("deployment_config")
            or application["deployments"][0]
        )
        assert options["graceful_shutdown_timeout_s"] >= tuning.answer_timeout_s, (
            application["name"]
        )
    assert (
        ingress["graceful_shutdown_timeout_s"]
        >= tuning.admission.max_queue_wait_s + tuning.answer_timeout_s
    )
    assert (
        float(haproxy.environment(ROOT, 0)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])
        >= tuning.answer_timeout_s
    )


def test_check_refuses_a_short_shutdown_timeout_and_names_a_valid_one() -> None:
    """Serve's default is 20 s. A longer `answer_timeout_s` needs a longer shutdown timeout."""
    config = read("serve_config.yaml")
    ingress = config["applications"][-1]["deployments"][0]
    ingress["user_config"]["answer_timeout_s"] = 500
    (wrong,) = check_config(config)
    assert (
        "Ingress.graceful_shutdown_timeout_s is 360" in wrong and "write 530" in wrong
    )
    del ingress["graceful_shutdown_timeout_s"]
    (wrong,) = check_config(config)
    assert f"is {DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S:g}" in wrong


def every_key(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys whose names the gateway or Serve defines."""
    free = (
        "engine_kwargs",
        "env_vars",
        "models",
        "presets",
        "bundles",
        "variants",
        "experimental_configs",
    )
    found = []
    if isinstance(node, dict):
        for key, value in node.items():
            if not path or path[-1] not in free:
                found.append((*path, key))
            if key not in (
                "model_loading_config",
                "placement_group_config",
                "runtime_env",
                "bundles",
                "options",
            ):
                found += every_key(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            found += every_key(value, (*path, i))
    return found


def test_check_refuses_a_typo_in_any_key() -> None:
    """Each key of the file in turn gets one letter more."""
    config = read("serve_config.yaml")
    missed = []
    keys = [
        path
        for path in every_key(config)
        if path[-1] not in ("engine_kwargs",) and "engine_kwargs" not in path
    ]
    assert len(keys) > 60
    for path in keys:
        broken = copy.deepcopy(config)
        parent = broken
        for step in path[:-1]:
            parent = parent[step]
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        try:
            if not check_config(broken):
                missed.append(path)
        except (KeyError, AttributeError):
            missed.append((*path, "crashed"))
    assert missed == []


def test_check_names_the_unknown_key_and_the_nearest_valid_one(tmp_path: Path) -> None:
    """The launcher prints it and starts no process."""
    config = read("serve_config.yaml")
    config["applications"][0]["args"]["deployment_config"]["max_queued_request"] = 3
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(
        SystemExit, match=r"max_queued_request'; did you mean 'max_queued_requests'"
    ):
        load(path, tmp_path, 0)


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ({"pair_rate": 0.02}, "unknown key 'pair_rate'; it belongs under 'judge'"),
        ({"judge": {"pair_rate": 1.5}}, "judge.pair_rate: Input should be less than"),
        ({"judge": {"pair_rate": -0.1}}, "judge.pair_rate: Input should be greater"),
        ({"judge": {"sample_rate": 0}}, "sample_rate and pair_rate are both 0"),
        ({"judge": {"pair_rate": 0.1, "calls_per_hour": 1}}, "two grades a pair"),
        ({"judge": {"pair_rate": 0.1, "max_queued": 1}}, "two grades a pair"),
        ({"judge": {"pair_rates": 0.1}}, "did you mean 'pair_rate'?"),
    ],
)
def test_pairs_that_cannot_work_are_refused(tuning: dict[str, Any], words: str) -> None:
    """The error says what to change. Pairs without a judge cannot be written: the rate is a setting of the judge."""
    with pytest.raises(ValidationError) as error:
        Tuning.model_validate(tuning)
    assert words in explain(error.value)


def test_pairs_may_be_all_that_a_judge_grades() -> None:
    """After the first scores; and by default there are none."""
    judge = Tuning.model_validate({"judge": {"sample_rate": 0, "pair_rate": 1}}).judge
    assert judge is not None and (judge.sample_rate, judge.pair_rate) == (0, 1)
    judge = Tuning.model_validate({"judge": {}}).judge
    assert judge is not None and judge.pair_rate == 0


def test_reload_applies_only_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths and ports are those of `up`, or Serve would restart everything. Without a running system it is refused."""
    config = read("serve_config.yaml")
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    before = load(path, tmp_path, 70)
    with pytest.raises(SystemExit, match="`router up` starts it"):
        launcher.reload(before)  # no process has this folder's mark
    ingress = config["applications"][-1]["deployments"][0]
    ingress["user_config"]["presets"]["slow"] = {"latency_weight": 0.01}
    path.write_text(yaml.safe_dump(config))
    sent: list[tuple[str, dict[str, Any]]] = []

    def put(url: str, json: dict[str, Any], **_: Any) -> httpx.Response:
        sent.append((url, json))
        return httpx.Response(200)

    def get(url: str, **_: Any) -> httpx.Response:
        now = "RUNNING" if len(sent) == 1 else "NOT_STARTED"
        return httpx.Response(
            200,
            request=httpx.Request("GET", url),
            json={
                "applications": {
                    a["name"]: {"status": now} for a in config["applications"]
                }
            },
        )

    monkeypatch.setattr(launcher.Cluster, "processes", lambda self: [psutil.Process()])
    monkeypatch.setattr(launcher.httpx, "put", put)
    monkeypatch.setattr(launcher.httpx, "get", get)
    launcher.reload(load(path, tmp_path, 70))
    ((url, given),) = sent
    assert (
        url == "http://127.0.0.1:8335/api/serve/applications/"
        and given["http_options"]["port"] == 8070
    )
    (changed,) = [
        new
        for new, old in zip(
            given["applications"], before.config["applications"], strict=True
        )
        if new != old
    ]
    assert changed["args"] == before.config["applications"][-1]["args"]
    assert changed["deployments"][0]["user_config"] == ingress["user_config"]


def test_arms_keep_the_order_of_the_file() -> None:
    """The order is cheapest first; the static policies depend on it."""
    settings = GatewaySettings.model_validate(
        read("serve_config.yaml")["applications"][-1]["args"]
    )
    names = [arm.name for arm in settings.arms()]
    assert names == ["nano", "general", "small", "large", "large-direct", "minilm"]


def test_check_refuses_an_unknown_policy() -> None:
    """The message lists the known policies."""
    config = read("serve_config.yaml")
    config["applications"][-1]["args"]["policy"]["name"] = "tompson"
    assert any(
        "choose one of: thompson, static" in line for line in check_config(config)
    )


@pytest.mark.parametrize(
    ("policy", "rollout", "why"),
    [
        (
            {},
            {"start": "observ"},
            "rollout.start: Input should be 'policy' or 'observe'",
        ),
        (
            {},
            {"rule": {"policy": "always"}},
            "without `start: observe`, rule would change nothing",
        ),
        (
            {},
            {"advance": "auto"},
            "without `start: observe`, advance would change nothing",
        ),
        (
            {},
            {"start": "observe", "rule": {"policy": "thompson"}},
            "rollout.rule.policy: Input should be 'static', 'always' or 'uniform'",
        ),
        (
            {},
            {
                "start": "observe",
                "rule": {"policy": "always", "options": {"arm": "big"}},
            },
            "rollout.rule: unknown arm 'big'; choose one of: nano, general, small, large, large-direct, minilm",
        ),
        (
            {},
            {"start": "observe", "rule": {"policy": "static", "options": {"at": 1}}},
            "rollout.rule: policy 'static' does not take these options",
        ),
        (
            {"name": "static"},
            {"start": "observe"},
            "the policy 'static' learns nothing from what it observes",
        ),
        ({}, {"start": "observe", "advanse": "auto"}, "did you mean 'advance'?"),
        ({}, {"start": "observe", "first_margin": 0}, "rollout.first_margin: Input"),
        ({}, {"start": "observe", "first_rewards": 1}, "rollout.first_rewards: Input"),
    ],
)
def test_a_first_day_that_cannot_work_is_refused(
    policy: dict[str, Any], rollout: dict[str, Any], why: str
) -> None:
    """The message names the key and the way out."""
    config = read(FILES[0])
    gateway = next(a for a in config["applications"] if a["name"] == "gateway")
    gateway["args"]["rollout"] = rollout
    gateway["args"]["policy"] = policy or {"name": "thompson"}
    wrong = "\n".join(check_config(config))
    assert why in wrong


@pytest.mark.parametrize(
    "rollout",
    [
        {"start": "observe"},
        {"start": "observe", "advance": "auto", "rule": {"policy": "uniform"}},
        {
            "start": "observe",
            "rule": {"policy": "always", "options": {"arm": "large"}},
        },
        {"start": "observe", "rule": {"options": {"threshold": 0.7}}},
    ],
)
def test_a_first_day_is_accepted_and_stored(rollout: dict[str, Any]) -> None:
    """The journal stores the settings as JSON with all fields, and reads them back as they were."""
    config = read(FILES[0])
    gateway = next(a for a in config["applications"] if a["name"] == "gateway")
    for given in (rollout, {}):
        gateway["args"]["rollout"] = given
        assert check_config(config) == []
        settings = GatewaySettings.model_validate(gateway["args"])
        stored = settings.model_dump_json().encode()
        other = settings.model_copy(update={"store_text": True})
        assert latest(stored, other) == settings


def changed(name: str = "serve_config.yaml", **models: Any) -> list[str]:
    """The problems of a shipped file with these changes of the gateway's models; None removes a model."""
    config = read(name)
    given = config["applications"][-1]["args"]["models"]
    for model, change in models.items():
        if change is None:
            del given[model]
        else:
            given[model] = {**given.get(model, {}), **change}
    return check_config(config)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("auto", "the router's own names"),
        ("auto:fast", "the router's own names"),
        ("auto:", "the router's own names"),
        ("模型", "ASCII"),
        ("modèle", "ASCII"),
        ("a\nb", "ASCII"),
        ("a\r\nx-evil: 1", "ASCII"),
        ("", "ASCII"),
        (" large", "ASCII"),
        ("a,b", "ASCII"),
        ("x" * 129, "128"),
    ],
)
def test_names_that_shadow_the_router_or_fit_no_header_are_refused(
    name: str, reason: str
) -> None:
    """Of models, and of presets where these become names, before the start and by the builder of the gateway."""
    (wrong,) = changed(**{name: {}})
    assert reason in wrong and "choose another name" in wrong
    with pytest.raises(ValidationError, match="choose another name"):
        GatewaySettings.model_validate({"models": {name: {}}})
    if reason == "ASCII":
        with pytest.raises(ValidationError, match="choose another name"):
            Tuning.model_validate({"presets": {name: {}}})


@pytest.mark.parametrize(
    "name", ["large", "Qwen/Qwen3-4B", "llama3:8b", "gpt-4.1", "automatic", "a@b+c_d"]
)
def test_names_that_clients_use_are_valid(name: str) -> None:
    assert GatewaySettings.model_validate({"models": {name: {}}}).models


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tasks": ["chatt"]}, "tasks"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["embed"]}, "does not do 'embed'; write: [chat, completion]"),
        ({"parent": "lage"}, "there is no model 'lage'"),
        ({"parent": "small"}, "small -> small is a circle"),
        ({"context_tokens": 1024}, "max_model_len is 512; lower it"),
    ],
    ids=str,
)
def test_a_model_that_would_break_is_refused_with_the_reason(
    change: dict[str, Any], reason: str
) -> None:
    (wrong,) = changed(small=change)
    assert reason in wrong and "small" in wrong


def test_a_circle_of_parents_is_refused() -> None:
    """A line of parents is valid, and so is a parent that is no longer served, if it is named."""
    models = {"a": {"parent": "b"}, "b": {"parent": "c"}, "c": {"parent": "b"}}
    with pytest.raises(ValidationError, match="b -> c -> b is a circle"):
        GatewaySettings.model_validate({"models": models})
    models["c"] = {"parent": "d"}
    with pytest.raises(ValidationError, match="there is no model 'd'"):
        GatewaySettings.model_validate({"models": models})
    assert GatewaySettings.model_validate({"models": models, "retired": ["d"]})
    with pytest.raises(ValidationError, match="among retired"):
        GatewaySettings.model_validate({"models": models, "retired": ["d", "a"]})


def test_models_and_applications_belong_together() -> None:
    """A model that no application serves is refused, and so is an application that no request would reach."""
    (wrong,) = changed(tiny={})
    assert "models.tiny: no application serves it" in wrong
    (wrong,) = changed(large=None)
    assert "applications.large: the gateway has no model of this name" in wrong
    (wrong,) = changed(minilm={"tasks": ["chat"]})
    assert "write: [embed]" in wrong
    found = changed("serve_config.gpu.yaml", **{"qwen3-embedding": {"tasks": ["chat"]}})
    assert "write: [embed]" in found[0]


def test_a_judge_that_is_no_model_here_is_refused() -> None:
    """Unless it has a url, which is where its name is known."""
    config = read("serve_config.yaml")
    tuning = config["applications"][-1]["deployments"][0]["user_config"]
    tuning["judge"] = {"model": "lage"}
    (wrong,) = check_config(config)
    assert "there is no model 'lage'" in wrong
    tuning["judge"]["url"] = "https://example.com/v1"
    assert check_config(config) == []


def test_a_declared_capability_that_the_engine_does_not_have_is_refused() -> None:
    """Both are compared, and the line says what to change; switching one off is no contradiction."""
    config = copy.deepcopy(read("serve_config.gpu.yaml"))
    gateway = next(a for a in config["applications"] if a["name"] == "gateway")
    models = gateway["args"]["models"]
    models["qwen3-4b"]["capabilities"] = {"tools": False, "thinking": True}
    assert check_config(config) == []
    models["qwen3-4b"]["capabilities"] = {"images": True}
    assert check_config(config) == []
    engine = config["applications"][0]["args"]["engine_kwargs"]
    del engine["reasoning_parser"]
    models["qwen3-4b"]["capabilities"] = {"thinking": True}
    (problem,) = check_config(config)
    assert problem.startswith("applications.gateway.args.models.qwen3-4b.capabilities")
    assert "reasoning_parser; add it there, or write false" in problem
    models["qwen3-4b"]["capabilities"] = {"thinkin": True}
    (problem,) = check_config(config)
    assert "did you mean 'thinking'?" in problem


def test_a_model_at_zero_needs_the_policy_that_starts_it() -> None:
    """Serve starts no replica of a model that gets no request; an embedding model has its settings elsewhere."""
    policy = {"policy_function": "deployments.models.autoscaling:DemandPolicy"}

    def problems(application: str, scaling: dict[str, Any]) -> list[str]:
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        (found,) = [a for a in config["applications"] if a["name"] == application]
        if "deployment_config" in found["args"]:
            replicas = dict(found["args"]["deployment_config"])
            found["args"]["deployment_config"] = replicas
            replicas["autoscaling_config"] = scaling
        else:
            found["deployments"][0]["autoscaling_config"] = scaling
        return check_config(config)

    for name in ("large", "minilm"):
        least = {"min_replicas": 0, "max_replicas": 2}
        (problem,) = problems(name, least)
        assert (
            f"applications.{name}" in problem and policy["policy_function"] in problem
        )
        assert not problems(name, {**least, "policy": policy})
        assert not problems(name, {"min_replicas": 1, "max_replicas": 2})
