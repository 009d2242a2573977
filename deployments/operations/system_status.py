"""Whether the system is well: each component, ready or not and why, from what Serve, the gateway and MLflow answer."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Json = Mapping[str, object]
MODEL_BUILDERS = ("model", "embedder")  # of deployments/app.py
# the tracker reports every 5 s; MLflow may take a while for a page
TRACKER_SILENT_S = 60.0
STARTING_S = 60.0  # of the router, in which the tracker need not have reported


@dataclass(frozen=True)
class Component:
    """A part of the system; `ready` is None if that is unknown. `detail` says why it is not ready, or how it does."""

    name: str
    ready: bool | None
    detail: str


@dataclass(frozen=True)
class Observed:
    """What could be learned of a system.

    applications: Serve's, by name; None if the dashboard was not asked, or does not answer.
    gateway: whether the gateway answers, and a model is ready.
    gateway_problem: what it said instead.
    state: of the router; None if it was not to be had.
    state_problem: why not; `denied` if a key was missing.
    mlflow: whether MLflow answers; None if it was not asked, or the gateway is configured without.
    """

    applications: Json | None
    gateway: bool
    gateway_problem: str
    state: Json | None
    state_problem: str
    denied: bool
    mlflow: bool | None


def components(observed: Observed, now_s: float | None = None) -> list[Component]:
    """The components, from the gateway to MLflow; `now_s` is in seconds since the epoch."""
    now_s = time.time() if now_s is None else now_s
    applications = observed.applications or {}
    gateway = _application(applications.get("gateway"))
    found = [_gateway(observed, gateway)]
    found += _models(observed, applications)
    if "Profiler" in gateway.deployments:
        detail = gateway.deployments["Profiler"]
        found.append(Component("profiler", detail.running > 0, detail.words))
    else:
        found.append(Component("profiler", None, "not asked: see the Ray dashboard"))
    found.append(_router(observed))
    found += _tracking(observed, now_s)
    return found


def is_well(parts: list[Component]) -> bool:
    """Whether no component is known to be not ready."""
    return all(part.ready is not False for part in parts)


def plain(parts: list[Component]) -> list[dict[str, object]]:
    """The components as plain data."""
    return [asdict(part) for part in parts]


def router_figures(state: Mapping[str, Any]) -> dict[str, object]:
    """The part of the router's state that `status` shows, as data; a router of an earlier release has less of it."""
    counts, rollout = state["counts"], state["rollout"]
    champion = rollout["roles"]["champion"]
    day = rollout.get("first_day")
    return {
        "uptime_s": state.get("uptime_s"),
        "champion": champion,
        "champion_since_s": since_s(rollout, "champion", champion["version"]),
        "roles": rollout["roles"],
        "first_day_stage": day["stage"] if day else None,
        "counts": counts,
        "feedback_coverage": _coverage(state),
        "journal": state.get("journal"),
        "export": state.get("export"),
        "quarantined": sorted(state["quarantined"]),
    }


def _coverage(state: Mapping[str, Any]) -> float | None:
    """The share of the latest answers that have a score."""
    window = state["window"]
    answers: int = window["answers"]
    return window["scored"] / answers if answers else None


def since_s(rollout: Mapping[str, Any], role: str, version: int) -> float | None:
    """Since when a version has a role, in seconds since the epoch; None if the history does not say."""
    times = [
        change.get("time_s")
        for change in rollout["history"]
        if change["role"] == role and change["version"] == version
    ]
    return times[-1] if times else None


@dataclass(frozen=True)
class _Deployment:
    running: int
    wanted: int

    @property
    def words(self) -> str:
        return f"{self.running} of {self.wanted} replicas"


@dataclass(frozen=True)
class _Application:
    status: str
    message: str
    import_path: str
    deployments: Mapping[str, _Deployment]

    @property
    def running(self) -> int:
        return sum(each.running for each in self.deployments.values())

    @property
    def words(self) -> str:
        counts = ", ".join(each.words for each in self.deployments.values())
        if self.status == "RUNNING":
            return counts
        status = self.status.lower().replace("_", " ")
        lines = self.message.strip().splitlines()
        return ": ".join(part for part in (status, lines[-1] if lines else "") if part)


def _application(details: object) -> _Application:
    """An application, from what Serve says of it."""
    plain = _mapping(details)
    deployments = {}
    for name, each in _mapping(plain.get("deployments")).items():
        found = _mapping(each).get("replicas")
        replicas = found if isinstance(found, list) else []
        running = sum(
            _mapping(replica).get("state") == "RUNNING" for replica in replicas
        )
        wanted = _mapping(each).get("target_num_replicas", len(replicas))
        deployments[name] = _Deployment(
            running, wanted if isinstance(wanted, int) else 0
        )
    config = _mapping(plain.get("deployed_app_config"))
    return _Application(
        str(plain.get("status", "")),
        str(plain.get("message", "")),
        str(config.get("import_path", "")),
        deployments,
    )


def _gateway(observed: Observed, application: _Application) -> Component:
    ingress = application.deployments.get("Ingress")
    if not observed.gateway:
        return Component("gateway", False, observed.gateway_problem)
    if ingress is None:
        return Component("gateway", True, "answers")
    return Component("gateway", ingress.running >= ingress.wanted, ingress.words)


def _models(observed: Observed, applications: Json) -> list[Component]:
    """Each model: from Serve where it was asked, otherwise from the router's state."""
    states = _mapping((observed.state or {}).get("models"))
    served = {}
    for name, details in applications.items():
        application = _application(details)
        if application.import_path.rpartition(":")[2] in MODEL_BUILDERS:
            served[name] = application
    parts = []
    for name in dict.fromkeys([*states, *served]):
        state = _mapping(states.get(name))
        if name in served:
            ready = served[name].running > 0
            words = served[name].words
        else:
            replicas = state.get("replicas")
            ready = isinstance(replicas, int) and replicas > 0
            words = f"{replicas} replicas"
        load = state.get("in_flight")
        if isinstance(load, int | float) and load:
            words += f", {load:g} requests in flight"
        if ready and state.get("healthy") is False:
            words += ", but the router does not use it"
        parts.append(Component(f"model {name}", ready, words))
    return parts


def _router(observed: Observed) -> Component:
    if observed.state is None:
        return Component(
            "router", None if observed.denied else False, observed.state_problem
        )
    waiting = _mapping(observed.state.get("journal")).get("waiting_rows")
    if waiting is None:
        return Component("router", True, "answers")
    return Component("router", True, f"{waiting} rows of the journal wait for the disk")


def _tracking(observed: Observed, now_s: float) -> list[Component]:
    """The tracker and MLflow."""
    tracker = Component("tracker", None, "not asked: the router's state is not known")
    problem = ""
    if observed.state is not None:
        export = _mapping(observed.state.get("export"))
        reported_s = export.get("reported_s")
        problem = str(export.get("problem", ""))
        uptime_s = observed.state.get("uptime_s")
        young = isinstance(uptime_s, int | float) and uptime_s < STARTING_S
        if isinstance(reported_s, int | float):
            silent_s = max(0.0, now_s - reported_s)
            words = f"{export.get('waiting_rows')} rows to export, last report {silent_s:.0f} s ago"
            tracker = Component("tracker", silent_s < TRACKER_SILENT_S, words)
        elif "export" not in observed.state:
            words = "not known: the router is of an earlier release"
            tracker = Component("tracker", None, words)
        elif observed.mlflow is None or young:
            tracker = Component("tracker", None, "has not reported yet")
        else:
            tracker = Component("tracker", False, "does not report")
    if observed.mlflow is None and not problem:
        return [tracker, Component("MLflow", None, "not asked")]
    if problem:
        words = f"the last export failed ({problem}); it is tried again"
        return [tracker, Component("MLflow", False, words)]
    words = "answers" if observed.mlflow else "does not answer"
    return [tracker, Component("MLflow", observed.mlflow, words)]


def _mapping(value: object) -> Json:
    return value if isinstance(value, Mapping) else {}
