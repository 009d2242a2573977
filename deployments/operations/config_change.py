"""Compares a config with the one in force: which settings differ, and which replicas a reload restarts because of it.

Serve restarts the replicas of an application whose code version changes, and the replicas of a deployment whose actor
options change; every other change reaches the replicas while they run (ray.serve._private.deploy_utils and version).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

Config = Mapping[str, object]
NOT_SET = "(not set)"
HIDDEN = "(hidden)"
# settings of an application that are part of its code version
CODE = ("import_path", "runtime_env", "args", "autoscaling_policy")
# settings of a deployment that are part of its application's code version
CODE_OF_DEPLOYMENT = ("request_router_config", "deployment_actors")
# settings of a deployment that only new actors can have
ACTOR = (
    "ray_actor_options",
    "placement_group_bundles",
    "placement_group_strategy",
    "placement_group_bundle_label_selector",
    "placement_group_fallback_strategy",
    "max_replicas_per_node",
    "gang_scheduling_config",
)
# settings of the whole system that Serve reads at its start only
AT_START = ("http_options", "proxy_location", "grpc_options")
# settings of the gateway that the router actor, which outlives a reload, reads at its start only
GATEWAY_AT_START = ("args.journal",)
SECRET = re.compile(r"env_vars\..*(secret|token|password|passwd|key)$", re.I)
RUNNING = "RUNNING"


@dataclass(frozen=True)
class Change:
    """A setting that differs.

    application: its name; "" for the settings of the whole system.
    setting: path in the application, as deployments.Ingress.user_config.objective.latency_weight.
    old, new: values; NOT_SET for none.
    """

    application: str
    setting: str
    old: object
    new: object


@dataclass(frozen=True)
class Effect:
    """What a reload does with the replicas of a deployment.

    application, deployment: names.
    replicas: number of running replicas.
    restarts: whether they are replaced by new ones.
    why: in words.
    """

    application: str
    deployment: str
    replicas: int
    restarts: bool
    why: str


@dataclass(frozen=True)
class ConfigChange:
    """The difference of two configs.

    changes: settings that differ. effects: of the running deployments.
    started, stopped: names of applications that only one of the two has.
    at_start: settings that take effect at the next start of the system.
    not_running: names of applications that should run and do not.
    """

    changes: tuple[Change, ...]
    effects: tuple[Effect, ...]
    started: tuple[str, ...]
    stopped: tuple[str, ...]
    at_start: tuple[str, ...]
    not_running: tuple[str, ...]

    def plain(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def compare(details: Config, config: Config) -> ConfigChange:
    """The difference between the config in force and another one.

    Args:
        details: what Serve's REST API says of the running applications.
        config: the other one.
    """
    wanted = json.loads(json.dumps(config, default=str))
    running = _mapping(details.get("applications"))
    before = {
        name: _mapping(_mapping(details_of).get("deployed_app_config"))
        for name, details_of in running.items()
    }
    after = {
        str(application.get("name")): application
        for application in wanted.get("applications", ())
    }
    changes = list(_system_changes(details, wanted))
    at_start = [change.setting for change in changes]
    started = tuple(name for name in after if name not in before)
    stopped = tuple(name for name in before if name not in after)
    effects: list[Effect] = []
    for name, application in after.items():
        if name in started:
            changes.append(Change(name, "the application", NOT_SET, "added"))
            continue
        found = list(_application_changes(name, before[name], application))
        changes += found
        if str(application.get("import_path")).endswith(":gateway"):
            settings = {change.setting for change in found}
            at_start += [path for path in GATEWAY_AT_START if path in settings]
        deployments = _mapping(_mapping(running[name]).get("deployments"))
        effects += _effects(name, [change.setting for change in found], deployments)
    changes += [
        Change(name, "the application", "present", "removed") for name in stopped
    ]
    not_running = tuple(
        name
        for name in after
        if name in running and _mapping(running[name]).get("status") != RUNNING
    )
    return ConfigChange(
        tuple(changes), tuple(effects), started, stopped, tuple(at_start), not_running
    )


def _system_changes(details: Config, wanted: Config) -> Iterator[Change]:
    """The settings of the whole system that differ. Serve shows all of them, so only those in the file are compared."""
    for setting in AT_START:
        if setting not in wanted or setting not in details:
            continue
        old = dict(_flatten(details[setting], setting))
        for path, value in _flatten(wanted[setting], setting):
            if path in old and old[path] != value:
                yield Change("", path, old[path], value)


def _application_changes(name: str, before: Config, after: Config) -> Iterator[Change]:
    # Serve gives the logging_config of the whole system to each application that has none
    logging = "logging_config"
    old, new = (
        dict(_flatten({k: v for k, v in each.items() if k != logging}, ""))
        for each in (before, after)
    )
    if logging in after:
        old |= dict(_flatten(before.get(logging), logging))
        new |= dict(_flatten(after[logging], logging))
    for path in dict.fromkeys([*new, *old]):
        values = (old.get(path, NOT_SET), new.get(path, NOT_SET))
        if values[0] != values[1]:
            if SECRET.search(path):
                values = (HIDDEN, HIDDEN)
            yield Change(name, path, *values)


def _flatten(value: object, path: str) -> Iterator[tuple[str, object]]:
    """The leaves of nested settings by their path; the items of a list that have names are found by these."""
    if isinstance(value, Mapping) and value:
        items = [(str(key), inner) for key, inner in value.items()]
    elif _is_named(value):
        assert isinstance(value, Sequence)
        items = [(str(item["name"]), item) for item in value]
    else:
        yield path, value
        return
    for key, inner in items:
        yield from _flatten(inner, f"{path}.{key}" if path else key)


def _is_named(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and "name" in item for item in value)
    )


def _effects(name: str, paths: list[str], deployments: Config) -> Iterator[Effect]:
    """What the changed settings of an application do to its deployments."""
    code = [path for path in paths if _is_code(path)]
    for deployment, details in deployments.items():
        prefix = f"deployments.{deployment}."
        own = [
            path.removeprefix(prefix)
            for path in paths
            if path.startswith(prefix) and not path.endswith(".name")
        ]
        actor = [path for path in own if path.partition(".")[0] in ACTOR]
        found = _mapping(details).get("replicas")
        replicas = len(found) if isinstance(found, list) else 0
        if code or actor:
            roots = dict.fromkeys(_root(path) for path in [*code, *actor])
            why = f"{', '.join(roots)} changed"
        elif own:
            why = f"takes over {', '.join(dict.fromkeys(_root(path) for path in own))} while it runs"
        else:
            why = "unchanged"
        yield Effect(name, deployment, replicas, bool(code or actor), why)


def _is_code(path: str) -> bool:
    """Whether a setting is part of an application's code version, so that all of its replicas are replaced."""
    if _root(path) in CODE:
        return True
    if _root(path) != "deployments":
        return False
    return ".autoscaling_config.policy" in path or any(
        f".{setting}" in path for setting in CODE_OF_DEPLOYMENT
    )


def _root(path: str) -> str:
    return path.partition(".")[0]


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
