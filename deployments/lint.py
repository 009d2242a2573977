"""Checks serve_config.yaml before anything starts: Serve itself ignores keys it does not know."""

import sys
import typing
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from deployments.dataplane import LOOPBACK
from deployments.keys import FILE, Keyring, how
from deployments.settings import GatewaySettings, Tuning, explain
from policies.registry import make_policy

LLM_CONFIG = (  # fields of ray.serve.llm.LLMConfig; importing it would cost this check many seconds of vLLM
    *("model_loading_config", "llm_engine", "engine_kwargs", "accelerator_type", "accelerator_config"),
    *("placement_group_config", "runtime_env", "lora_config", "deployment_config", "server_cls"),
    *("experimental_configs", "log_engine_metrics", "callback_config"),
)


SERVES_GRACE_S = 20.0  # where a deployment's graceful_shutdown_timeout_s is not given


def lint(config: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration, one line each; empty if nothing is."""
    from ray.serve.schema import ServeDeploySchema

    wrong = _unknown(config, ServeDeploySchema, "")
    for application in config.get("applications", ()):
        where = f"applications.{application.get('name', '?')}"
        builder = str(application.get("import_path", "")).rpartition(":")[2]
        arguments = application.get("args") or {}
        if builder == "gateway":
            wrong += _validate(GatewaySettings, arguments, f"{where}.args")
            wrong += _policy(arguments, f"{where}.args.policy")
            wrong += _keys(config.get("http_options") or {}, arguments, f"{where}.args")
            for deployment in application.get("deployments", ()):
                if deployment.get("name") == "Ingress":
                    wrong += _ingress(deployment, f"{where}.Ingress")
        elif builder == "model":
            wrong += _llm(arguments, f"{where}.args")
        elif builder == "embedder":
            wrong += _names(arguments, ["model_id", "source"], f"{where}.args")
    if not wrong:
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            wrong.append(explain(error))
    return wrong


def _validate(settings: type[BaseModel], value: Any, where: str) -> list[str]:
    try:
        settings.model_validate(value)
    except ValidationError as error:
        return [f"{where}: {explain(error)}"]
    return []


def _ingress(deployment: dict[str, Any], where: str) -> list[str]:
    """Its tuning, and that a replica which is replaced has the time to finish what it has taken in."""
    tuning = deployment.get("user_config") or {}
    if wrong := _validate(Tuning, tuning, f"{where}.user_config"):
        return wrong
    limits, key = Tuning.model_validate(tuning), "graceful_shutdown_timeout_s"
    least, given = limits.admission.wait_s + limits.answer_timeout_s, deployment.get(key, SERVES_GRACE_S)
    if isinstance(given, int | float) and given < least:
        why = "which cuts answers off at a reload: write"
        return [f"{where}.{key} is {given:g}, {why} {least:g} (wait_s and answer_timeout_s) or more"]
    return []


def _policy(arguments: dict[str, Any], where: str) -> list[str]:
    try:
        settings = GatewaySettings.model_validate(arguments)
        make_policy(settings.policy.name, settings.arms(), settings.policy.options)
    except ValidationError:
        pass  # said already
    except ValueError as error:
        return [f"{where}: {error}"]
    return []


def _keys(http: dict[str, Any], arguments: dict[str, Any], where: str) -> list[str]:
    """Without API keys only this machine may reach it."""
    host = str(http.get("host", "0.0.0.0"))  # what Serve takes where a config file says nothing
    if arguments.get("keys") is not None or host in LOOPBACK:
        return []
    return [
        f"{where}.keys is missing, but http_options.host is {host}, which other machines can reach: write "
        f"`keys: {{file: var/keys.json}}` there and make a key with `{how(FILE)}`, or bind 127.0.0.1"
    ]


def no_key(config: dict[str, Any]) -> list[str]:
    """What is wrong with the file of keys, if one is asked for; empty if nothing is."""
    wrong = []
    for application in config.get("applications", ()):
        if str(application.get("import_path", "")).endswith(":gateway"):
            settings = GatewaySettings.model_validate(application.get("args") or {})
            if settings.keys is not None:
                try:
                    Keyring(Path(settings.keys.file))
                except ValueError as error:
                    wrong.append(f"applications.{application['name']}.args.keys.file: {error}")
    return wrong


def main() -> None:
    """`python -m deployments.lint FILE`, before a `serve deploy FILE`."""
    wrong = lint(yaml.safe_load(Path(sys.argv[1]).read_text()))
    print("\n".join(wrong) or "valid")
    sys.exit(bool(wrong))


def _llm(arguments: dict[str, Any], where: str) -> list[str]:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema

    known = list(LLM_CONFIG)
    wrong = _names(arguments, known, where)
    deployment = arguments.get("deployment_config") or {}
    wrong += _unknown(deployment, DeploymentSchema, f"{where}.deployment_config")
    scaling = deployment.get("autoscaling_config") or {}
    wrong += _unknown(scaling, AutoscalingConfig, f"{where}.deployment_config.autoscaling_config")
    return wrong


def _names(value: dict[str, Any], known: list[str], where: str) -> list[str]:
    wrong = []
    for key in value:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; choose from: {', '.join(known)}"
            wrong.append(f"unknown key '{where}.{key}'{hint}".replace("'.", "'"))
    return wrong


def _unknown(value: Any, model: type[BaseModel], where: str) -> list[str]:
    """Keys that a schema does not have, at any depth."""
    if not isinstance(value, dict):
        return []
    wrong = _names(value, list(model.model_fields), where)
    for key, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            items = value.get(key)
            for item in items if isinstance(items, list) else [items]:
                wrong += _unknown(item, inner, f"{where}.{key}")
    return wrong


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


if __name__ == "__main__":
    main()
