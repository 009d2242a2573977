"""What a reload changes: the settings that differ, and the replicas that restart because of it."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from deployments.operations.config_change import HIDDEN, NOT_SET, Change, compare
from tests.support.dashboard import details_of
from tests.support.gateway import ROOT

Config = dict[str, Any]
CONFIG: Config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())


def application(config: Config, name: str) -> Config:
    found: Config = next(a for a in config["applications"] if a["name"] == name)
    return found


def change_of(edit: Callable[[Config], object]) -> Any:
    """The difference that an edit of a copy of serve_config.yaml makes."""
    after = copy.deepcopy(CONFIG)
    edit(after)
    return compare(details_of(CONFIG), after)


def restarted(change: Any) -> set[str]:
    return {effect.deployment for effect in change.effects if effect.restarts}


def test_the_same_config_changes_nothing() -> None:
    """Although Serve shows more than the file has."""
    change = compare(details_of(CONFIG), CONFIG)
    assert change.changes == () and restarted(change) == set()
    assert len(change.effects) == 7 and change.not_running == ()


@pytest.mark.parametrize("name", ["serve_config.yaml", "serve_config.gpu.yaml"])
def test_serves_own_form_of_the_shipped_files_changes_nothing(name: str) -> None:
    """Serve reads a config into its schema and shows the fields that were set."""
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / name).read_text())
    schema = ServeDeploySchema.model_validate(config)
    shown = json.loads(json.dumps(schema.model_dump(exclude_unset=True), default=str))
    assert compare(details_of({**config, **shown}), config).changes == ()


def test_a_changed_objective_restarts_nothing() -> None:
    """The ingress takes it over while it runs; the others are not touched."""

    def edit(config: Config) -> None:
        ingress = application(config, "gateway")["deployments"][0]
        ingress["user_config"]["objective"]["latency_weight"] = 0.7
        ingress["user_config"]["judge"] = {"sample_rate": 0.05}

    change = change_of(edit)
    path = "deployments.Ingress.user_config"
    assert set(change.changes) == {
        Change("gateway", f"{path}.objective.latency_weight", 0.005, 0.7),
        Change("gateway", f"{path}.judge.sample_rate", NOT_SET, 0.05),
    }
    assert restarted(change) == set()
    words = {effect.deployment: effect.why for effect in change.effects}
    assert words["Ingress"] == "takes over user_config while it runs"
    assert words["Profiler"] == words["Model:nano"] == "unchanged"


def test_changed_arguments_restart_the_application() -> None:
    """All deployments of that application, and no other; a removed setting is a change, too."""
    change = change_of(
        lambda config: application(config, "gateway")["args"].pop("mlflow_uri")
    )
    (found,) = change.changes
    assert found.setting == "args.mlflow_uri" and found.new == NOT_SET
    assert restarted(change) == {"Ingress", "Profiler"}
    change = change_of(
        lambda config: application(config, "nano")["args"]["engine_kwargs"].update(
            max_num_seqs=16
        )
    )
    # the YAML anchor makes small and large share these arguments
    assert restarted(change) == {"Model:nano", "Model:small", "Model:large"}


def test_changed_actor_options_restart_one_deployment() -> None:
    """Those of the profiler do not concern the ingress."""

    def edit(config: Config) -> None:
        profiler = application(config, "gateway")["deployments"][1]
        profiler["ray_actor_options"] = {"num_cpus": 1}

    assert restarted(change_of(edit)) == {"Profiler"}


@pytest.mark.parametrize(
    ("setting", "value", "restarts"),
    [
        ("max_ongoing_requests", 5, False),
        ("graceful_shutdown_timeout_s", 500, False),
        ("num_replicas", 3, False),
        ("max_replicas_per_node", 1, True),
        ("placement_group_strategy", "SPREAD", True),
    ],
)
def test_which_settings_of_a_deployment_restart_it(
    setting: str, value: object, restarts: bool
) -> None:
    """As Serve decides it (ray.serve._private.version)."""
    change = change_of(
        lambda config: application(config, "gateway")["deployments"][0].update(
            {setting: value}
        )
    )
    assert restarted(change) == ({"Ingress"} if restarts else set())


def test_the_lists_of_settings_are_those_of_serve() -> None:
    """A newer Ray with other rules makes this test fail."""
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve._private.version import DeploymentVersion
    from ray.serve.schema import ServeApplicationSchema

    base = {"name": "a", "import_path": "m:f", "deployments": [{"name": "D"}]}

    def version(**changed: Any) -> str:
        schema = ServeApplicationSchema.model_validate({**base, **changed})
        found: str = get_app_code_version(schema)
        return found

    for changed in (
        {"args": {"x": 1}},
        {"import_path": "m:g"},
        {"runtime_env": {"env_vars": {"A": "b"}}},
    ):
        assert version(**changed) != version(), changed
    for option in (
        {"user_config": {"a": 1}},
        {"num_replicas": 2},
        {"ray_actor_options": {"num_cpus": 2}},
    ):
        assert version(deployments=[{"name": "D", **option}]) == version(), option

    def deployment(**options: Any) -> DeploymentVersion:
        from ray.serve._private.config import DeploymentConfig

        return DeploymentVersion("1", DeploymentConfig(), **options)

    for options in (
        {"ray_actor_options": {"num_cpus": 2}},
        {"max_replicas_per_node": 1},
        {"placement_group_strategy": "SPREAD"},
    ):
        before = deployment(ray_actor_options={})
        after = deployment(**{"ray_actor_options": {}, **options})
        assert before.requires_actor_restart(after), options


def test_applications_come_and_go() -> None:
    """One that was added starts, one that is gone stops."""

    def edit(config: Config) -> None:
        application(config, "nano")["name"] = "pico"

    change = change_of(edit)
    assert change.started == ("pico",) and change.stopped == ("nano",)
    assert {(c.application, c.new) for c in change.changes} == {
        ("pico", "added"),
        ("nano", "removed"),
    }


def test_settings_of_the_start_are_named() -> None:
    """Serve reads http_options at its start, and the router actor its journal."""

    def edit(config: Config) -> None:
        config["http_options"]["port"] = 9000
        application(config, "gateway")["args"]["journal"] = "sqlite:///other.db"

    change = change_of(edit)
    assert change.at_start == ("http_options.port", "args.journal")
    assert Change("", "http_options.port", 8000, 9000) in change.changes


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD"])
def test_secrets_of_the_environment_are_hidden(name: str) -> None:
    """They change, and are not printed; other variables are."""

    def edit(config: Config) -> None:
        variables = application(config, "nano")["args"]["runtime_env"]["env_vars"]
        variables |= {name: "very-secret", "OMP_NUM_THREADS": "2"}

    change = change_of(edit)
    assert "very-secret" not in str(change)
    values = {c.setting.rpartition(".")[2]: c.new for c in change.changes}
    assert values == {name: HIDDEN, "OMP_NUM_THREADS": "2"}


def test_an_application_that_failed_is_named() -> None:
    """A reload deploys it again, although nothing changed."""
    details = details_of(CONFIG)
    details["applications"]["nano"]["status"] = "DEPLOY_FAILED"
    change = compare(details, CONFIG)
    assert change.changes == () and change.not_running == ("nano",)
