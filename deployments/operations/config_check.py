"""Checks serve_config.yaml before the system starts: `router check`. Serve itself ignores unknown keys."""

import json
import re
import typing
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from deployments.access.api_keys import FILE, ApiKeyStore, creation_hint
from deployments.model_settings import ModelSettings, VariantSettings
from deployments.models.capabilities import contradictions, lacking, of_application
from deployments.parameters.vllm import TemplateValues
from deployments.paths import bundled
from deployments.runtime import LOOPBACK
from deployments.settings import GatewaySettings, Tuning, explain
from policies.capabilities import MEDIA, Capability
from policies.registry import make_policy

# fields of ray.serve.llm.LLMConfig; to import it takes many seconds, because it imports vLLM
LLM_CONFIG = (
    "model_loading_config",
    "llm_engine",
    "engine_kwargs",
    "accelerator_type",
    "accelerator_config",
    "placement_group_config",
    "runtime_env",
    "lora_config",
    "deployment_config",
    "server_cls",
    "experimental_configs",
    "log_engine_metrics",
    "callback_config",
)
# asks the router for the demand of a model (deployments/models/autoscaling.py)
DEMAND_POLICY = "deployments.models.autoscaling:DemandPolicy"
# of release 0.1.0; what the engine needed it for is done by deployments/models/engine.py
FORMER_WORKER = "deployments.models.vllm_worker.IdleSleepWorker"
# the builders of deployments/app.py that serve a model
MODEL_BUILDERS = ("model", "embedder")
# the content of serve_config.yaml, or a part of it
Config = dict[str, Any]
REDIRECTS = "VLLM_MEDIA_URL_ALLOW_REDIRECTS"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"
TEMPLATE_KEY = "chat_template"
# Serve's default of a deployment's graceful_shutdown_timeout_s
DEFAULT_GRACE_S = 20.0


def check_config(config: Config) -> list[str]:
    """Problems of a configuration, one line each; empty if it is valid."""
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
        wrong += _counterparts(config)
    if not wrong:
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            wrong.append(explain(error))
    return wrong


def _counterparts(config: Config) -> list[str]:
    """Problems between the gateway and the applications of its models, each of which has the name of its model."""
    gateways = []
    served: dict[str, Config] = {}
    for application in config.get("applications", ()):
        builder = str(application.get("import_path", "")).rpartition(":")[2]
        if builder == "gateway":
            gateways.append(application)
        elif builder in MODEL_BUILDERS:
            served[str(application.get("name"))] = application
    wrong = []
    known: set[str] = set()
    for gateway in gateways:
        where = f"applications.{gateway.get('name')}.args.models"
        settings = GatewaySettings.model_validate(gateway.get("args") or {})
        known |= settings.models.keys()
        wrong += _judge(gateway, settings)
        for name, model in settings.models.items():
            if name not in served:
                wrong.append(
                    f"{where}.{name}: no application serves it; add an application of this name, or take the model out"
                )
            else:
                wrong += _served(served[name], model, f"{where}.{name}")
                wrong += _variants(served[name], model, f"{where}.{name}")
                wrong += _fetches(served[name], model, settings)
                wrong += _from_zero(served[name])
    for name in served.keys() - known if gateways else ():
        wrong.append(
            f"applications.{name}: the gateway has no model of this name, so that no request would reach it; add it to "
            "the gateway's models, or take the application out"
        )
    return wrong


def _served(application: Config, model: ModelSettings, where: str) -> list[str]:
    """Problems of a model that its application cannot do."""
    arguments = application.get("args") or {}
    engine = arguments.get("engine_kwargs") or {}
    embeds = (
        str(application.get("import_path")).endswith(":embedder")
        or engine.get("runner") == "pooling"
    )
    wrong = []
    for task in model.tasks:
        if embeds != (task == "embed"):
            does = "embed" if embeds else "chat, completion"
            wrong.append(
                f"{where}.tasks: its application does not do '{task}'; write: [{does}]"
            )
    for problem in contradictions(model.capabilities, of_application(arguments)):
        wrong.append(f"{where}.capabilities.{problem}")
    longest = engine.get("max_model_len")
    if isinstance(longest, int) and model.context_tokens > longest:
        wrong.append(
            f"{where}.context_tokens is {model.context_tokens}, but the engine's max_model_len is {longest}; lower it"
        )
    return wrong


def _variants(
    application: Mapping[str, object], model: ModelSettings, where: str
) -> list[str]:
    """What the application of a model cannot do for its variants, one line each.

    Args:
        application: in serve_config.yaml.
        model: the settings of the model.
        where: their path.
    """
    args = application.get("args")
    arguments = args if isinstance(args, Mapping) else {}
    return [
        f"{where}.variants.{name}.{problem}"
        for name, variant in model.variants.items()
        for problem in _of_variant(arguments, variant)
    ]


def _of_variant(
    arguments: Mapping[str, object], variant: VariantSettings
) -> Iterator[str]:
    known = of_application(arguments)
    if known.get(Capability.VLLM_PARAMETERS) is not True:
        yield "is for an engine of vLLM; take it out, or serve the model by vLLM"
        return
    engine = arguments["engine_kwargs"]
    assert isinstance(engine, Mapping)
    if variant.chat_template_kwargs:
        yield from _of_template(arguments, engine, variant)
    if variant.thinking_token_budget is not None and not known[Capability.THINKING]:
        yield (
            "thinking_token_budget needs `reasoning_parser` in the application's engine_kwargs; add it there, or take "
            "the budget out"
        )
    if variant.adapter and not _serves_adapter(engine, variant.adapter):
        yield (
            f"adapter: the application serves no adapter '{variant.adapter}'; write into its engine_kwargs "
            f"`enable_lora: true` and `lora_modules: [{{name: {variant.adapter}, path: FOLDER}}]`"
        )


def _serves_adapter(engine: Mapping[str, object], adapter: str) -> bool:
    modules = engine.get("lora_modules")
    if not engine.get("enable_lora") or not isinstance(modules, list):
        return False
    return any(
        isinstance(one, Mapping) and one.get("name") == adapter for one in modules
    )


def _of_template(
    arguments: Mapping[str, object],
    engine: Mapping[str, object],
    variant: VariantSettings,
) -> Iterator[str]:
    try:
        TypeAdapter(TemplateValues).validate_python(variant.chat_template_kwargs)
    except ValidationError as error:
        yield f"chat_template_kwargs: {explain(error)}"
        return
    if TEMPLATE_KEY in engine:
        return  # vLLM reads it from there, as a text or a file
    loading = arguments.get("model_loading_config")
    source = loading.get("model_source") if isinstance(loading, Mapping) else None
    folder = Path(bundled(source)) if isinstance(source, str) else None
    if folder is None or not (folder / TOKENIZER_FILE).is_file():
        return  # a name of the hub, or weights that are not here yet
    template = _template(folder)
    if template is None:
        yield "chat_template_kwargs: the model has no chat template; take them out"
        return
    for name in variant.chat_template_kwargs:
        if re.search(rf"\b{re.escape(name)}\b", template) is None:
            yield (
                f"chat_template_kwargs.{name}: the model's chat template does not read it; take it out, or choose a "
                "variable of the template"
            )


def _template(folder: Path) -> str | None:
    """The chat template of a model in a folder; None without one. Several templates count together."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text()
    found = json.loads((folder / TOKENIZER_FILE).read_text()).get(TEMPLATE_KEY)
    return None if not found else json.dumps(found)


def _fetches(
    application: Config, model: ModelSettings, settings: GatewaySettings
) -> list[str]:
    """Problems of a model whose engine would fetch media from more hosts than the gateway allows."""
    arguments = application.get("args") or {}
    lacks = lacking(model.capabilities, of_application(arguments))
    if not settings.media_hosts or lacks >= MEDIA:
        return []
    where = f"applications.{application['name']}.args"
    wrong = []
    engine = arguments.get("engine_kwargs") or {}
    hosts = list(settings.media_hosts)
    if sorted(engine.get("allowed_media_domains") or ()) != sorted(hosts):
        wrong.append(
            f"{where}.engine_kwargs.allowed_media_domains differs from the gateway's media_hosts; write: {hosts}"
        )
    environment = (arguments.get("runtime_env") or {}).get("env_vars") or {}
    if str(environment.get(REDIRECTS)) != "0":
        wrong.append(
            f"{where}.runtime_env.env_vars.{REDIRECTS} lets a host of media_hosts send the engine to any other; write: "
            '"0"'
        )
    return wrong


def _from_zero(application: Config) -> list[str]:
    """A problem if the model may have no replica, and nothing would ever start one."""
    name = application.get("name")
    own = (application.get("args") or {}).get("deployment_config") or {}
    for deployment in (own, *application.get("deployments", ())):
        scaling = deployment.get("autoscaling_config")
        if not isinstance(scaling, dict) or scaling.get("min_replicas") != 0:
            continue
        policy = (scaling.get("policy") or {}).get("policy_function")
        if policy != DEMAND_POLICY:
            return [
                f"applications.{name}: with min_replicas: 0, no request would ever start a replica, because a model "
                "without one gets none; add to its autoscaling_config "
                f'`policy: {{policy_function: "{DEMAND_POLICY}"}}`'
            ]
    return []


def _judge(gateway: Config, settings: GatewaySettings) -> list[str]:
    """A problem if the judge is a model that the gateway does not have."""
    for deployment in gateway.get("deployments", ()):
        judge = (deployment.get("user_config") or {}).get("judge") or {}
        name = judge.get("model")
        arms = [arm.name for arm in settings.arms() if "chat" in arm.tasks]
        if name and not judge.get("url") and name not in arms:
            where = f"applications.{gateway.get('name')}.{deployment.get('name')}.user_config.judge.model"
            known = ", ".join(arms)
            return [
                f"{where}: there is no model '{name}'; choose one of: {known}, or write its url"
            ]
    return []


def _validate(settings: type[BaseModel], value: object, where: str) -> list[str]:
    try:
        settings.model_validate(value)
    except ValidationError as error:
        return [f"{where}: {explain(error)}"]
    return []


def _ingress(deployment: Config, where: str) -> list[str]:
    """Problems of the tuning, or of a shutdown timeout too short for a replica to finish its requests."""
    tuning = deployment.get("user_config") or {}
    wrong = _validate(Tuning, tuning, f"{where}.user_config")
    if wrong:
        return wrong
    limits = Tuning.model_validate(tuning)
    key = "graceful_shutdown_timeout_s"
    least = limits.admission.max_queue_wait_s + limits.answer_timeout_s
    given = deployment.get(key, DEFAULT_GRACE_S)
    if isinstance(given, int | float) and given < least:
        why = "which cuts answers off at a reload: write"
        return [
            f"{where}.{key} is {given:g}, {why} {least:g} (max_queue_wait_s and answer_timeout_s) or more"
        ]
    return []


def _policy(arguments: Config, where: str) -> list[str]:
    try:
        settings = GatewaySettings.model_validate(arguments)
        make_policy(settings.policy.name, settings.arms(), settings.policy.options)
    except ValidationError:
        pass  # reported by _validate
    except ValueError as error:
        return [f"{where}: {error}"]
    return []


def _keys(http: Config, arguments: Config, where: str) -> list[str]:
    """A problem if other machines can reach a gateway without API keys."""
    # Serve's default in a config file
    host = str(http.get("host", "0.0.0.0"))
    if arguments.get("keys") is not None or host in LOOPBACK:
        return []
    return [
        f"{where}.keys is missing, but http_options.host is {host}, which other machines can reach: write "
        f"`keys: {{file: var/keys.json}}` there and make a key with `{creation_hint(FILE)}`, or bind 127.0.0.1"
    ]


def check_keys(config: Config) -> list[str]:
    """Problems of the file of API keys; empty if it is valid, or if the gateway asks for no keys."""
    wrong = []
    for application in config.get("applications", ()):
        if not str(application.get("import_path", "")).endswith(":gateway"):
            continue
        settings = GatewaySettings.model_validate(application.get("args") or {})
        if settings.keys is None:
            continue
        try:
            ApiKeyStore(Path(settings.keys.file))
        except ValueError as error:
            where = f"applications.{application['name']}.args.keys.file"
            wrong.append(f"{where}: {error}")
    return wrong


def _llm(arguments: Config, where: str) -> list[str]:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema

    known = list(LLM_CONFIG)
    wrong = _names(arguments, known, where)
    engine = arguments.get("engine_kwargs") or {}
    if engine.get("worker_extension_cls") == FORMER_WORKER:
        wrong.append(
            f"{where}.engine_kwargs.worker_extension_cls: this class is gone, because an engine on a CPU needs it no "
            "more; remove the line"
        )
    deployment = arguments.get("deployment_config") or {}
    wrong += _unknown(deployment, DeploymentSchema, f"{where}.deployment_config")
    scaling = deployment.get("autoscaling_config") or {}
    wrong += _unknown(
        scaling, AutoscalingConfig, f"{where}.deployment_config.autoscaling_config"
    )
    return wrong


def _names(value: Config, known: list[str], where: str) -> list[str]:
    """Keys that are not among the known ones."""
    wrong = []
    for key in value:
        if key in known:
            continue
        hint = f"; choose from: {', '.join(known)}"
        near = get_close_matches(key, known, n=1)
        if near:
            hint = f"; did you mean '{near[0]}'?"
        wrong.append(f"unknown key '{where}.{key}'{hint}".replace("'.", "'"))
    return wrong


def _unknown(value: object, model: type[BaseModel], where: str) -> list[str]:
    """Keys that are not fields of a schema, at any depth."""
    if not isinstance(value, dict):
        return []
    wrong = _names(value, list(model.model_fields), where)
    for key, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            items = value.get(key)
            for item in items if isinstance(items, list) else [items]:
                wrong += _unknown(item, inner, f"{where}.{key}")
    return wrong


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    models = []
    for part in typing.get_args(annotation):
        models += _models_in(part)
    return models
