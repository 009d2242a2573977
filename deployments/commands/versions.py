"""Commands on the policy versions: list, show, diff, register, evaluate, promote, rollback and history."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from deployments.commands.gateway import URL, Url, ask
from deployments.commands.output import (
    AsJson,
    ExitCode,
    example,
    fail,
    in_words,
    iso,
    percent,
    show,
    table,
)
from deployments.commands.routing import (
    ROLLOUT,
    OverrideGate,
    Reason,
    override,
    roles_table,
)

PATH = "/v1/router/versions"
FIELDS = {  # of a comparison, in words
    "policy": "policy",
    "options": "options",
    "arms": "models",
    "sequence": "decisions when it was registered",
    "row": "last row of the journal",
}

app = typer.Typer(
    no_args_is_help=True,
    help="""List and compare the policy versions, and give them roles.

A version is what the router had learned at a time. The champion decides; a challenger decides a share of the requests;
a shadow decides without effect. MLflow's registry has the versions.

\b
Example:
  router versions register --policy thompson --options '{"exploration": 0.3}'
  router versions promote 12 --to challenger
  router versions evaluate 12
  router versions promote 12""",
)

Number = Annotated[int, typer.Argument(metavar="N", min=1, help="Of the version.")]


class Role(StrEnum):
    """What a version may do."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"
    SHADOW = "shadow"


@app.command("list")
@example("router versions list")
def list_versions(url: Url = URL, as_json: AsJson = False) -> None:
    """List all versions, newest first, with their roles and what their newest evaluation showed."""
    found = ask(url, "GET", PATH)
    header = (
        "version",
        "role",
        "created",
        "decisions",
        "policy",
        "gain over the champion",
    )
    rows = [
        (
            each["version"],
            " ".join(each["aliases"]),
            each["created"],
            each["tags"].get("decisions"),
            _policy_of(each["tags"]),
            _gain_of(each["tags"]),
        )
        for each in found["versions"]
    ]
    empty = "no versions yet; register the first with `router versions register`"
    show(table(header, rows, empty), found, as_json)


@app.command("show")
@example("router versions show 12")
def show_version(version: Number, url: Url = URL, as_json: AsJson = False) -> None:
    """Show a version with its tags and the report of its newest evaluation."""
    found = ask(url, "GET", f"{PATH}/{version}")
    tags = found["tags"]
    rows = [
        ("version", found["version"]),
        ("role", " ".join(found["aliases"])),
        ("created", found["created"]),
        ("description", str(found.get("description", "")).partition("\n")[0]),
        ("policy", _policy_of(tags)),
        *((k, v) for k, v in sorted(tags.items()) if not k.startswith("evaluation")),
    ]
    text = table(("what", "value"), rows)
    if "evaluation" in found:
        text += f"\n\n{_report_in_words(found['evaluation'])}"
    show(text, found, as_json)


@app.command()
@example("router versions diff 12", "router versions diff 12 9")
def diff(
    version: Number,
    other: Annotated[
        int,
        typer.Argument(
            metavar="[M]", min=0, show_default=False, help="By default the champion."
        ),
    ] = 0,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: what differs, and how differently they would have decided the newest requests."""
    found = ask(url, "GET", f"{PATH}/{version}/diff", params={"other": other})
    show(_diff_in_words(found), found, as_json)


@app.command()
@example(
    "router versions register",
    "router versions register --policy thompson --options '{\"exploration\": 0.3}'",
)
def register(
    url: Url = URL,
    policy: Annotated[
        str, typer.Option(help="Train this policy on the journal, as thompson.")
    ] = "",
    options: Annotated[
        str, typer.Option(help='Of that policy, as JSON: {"exploration": 0.3}')
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Register the champion as it is now, or another policy that is trained on the journal."""
    body = None
    if policy or options:
        body = {"policy": policy, "options": _parse_options(options)}
    found = ask(url, "POST", PATH, json=body)
    show(f"registered as version {found['version']}", found, as_json)


@app.command()
@example("router versions evaluate 12")
def evaluate(version: Number, url: Url = URL, as_json: AsJson = False) -> None:
    """Compare a version with the champion on the decisions since both exist; exit code 4 if it is not proved better."""
    found = ask(url, "POST", f"{PATH}/{version}/evaluate")
    show(_report_in_words(found), found, as_json)
    if not found["promote"]:
        raise typer.Exit(ExitCode.GATE)


@app.command()
@example(
    "router versions promote 12 --to challenger --share 0.1",
    "router versions promote 12",
)
def promote(
    version: Number,
    to: Annotated[Role, typer.Option(help="The role.")] = Role.CHAMPION,
    share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of the traffic, for a challenger."),
    ] = None,
    url: Url = URL,
    override_gate: OverrideGate = False,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Make a version champion, if the log proves that it is better; or challenger, or shadow.

    The exit code is 4 if the gate refuses.
    """
    body = {
        "to": to.value,
        "share": share,
        "override_gate": override(override_gate, reason),
    }
    found = ask(url, "POST", f"{PATH}/{version}/promote", json=body)
    text = f"version {version} is {to.value}\n\n{roles_table(found)}"
    show(text, found, as_json)


@app.command()
@example(
    'router versions rollback --reason "more complaints since noon"',
    "router versions rollback --role shadow",
)
def rollback(
    url: Url = URL,
    role: Annotated[
        Role, typer.Option(help="Of another role than champion, end it.")
    ] = Role.CHAMPION,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Go back to the champion's predecessor, or on the first day to the rule; or end another role."""
    body = {"role": role.value, "reason": reason}
    found = ask(url, "POST", f"{PATH}/rollback", json=body)
    done = "rolled back" if role is Role.CHAMPION else f"the {role.value} is removed"
    show(f"{done}\n\n{roles_table(found)}", found, as_json)


@app.command()
@example("router versions history")
def history(url: Url = URL, as_json: AsJson = False) -> None:
    """Show which version got or lost which role, when, by whom and why; newest last."""
    changes = ask(url, "GET", ROLLOUT)["history"]
    rows = [
        (
            iso(change.get("time_s")),
            change["what"],
            _numbers(change),
            change["role"],
            change.get("by"),
            change["reason"],
        )
        for change in changes
    ]
    header = ("time", "what", "version", "role", "by", "reason")
    empty = "no change yet: the policy of serve_config.yaml is the champion"
    show(table(header, rows, empty), {"history": changes}, as_json)


def _numbers(change: dict[str, Any]) -> str:
    """The version of a change; the first and the last of several registrations."""
    first, version = change.get("first"), change["version"]
    if first is not None:
        return f"{first} to {version}"
    return str(version) if version else ""


def _parse_options(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        options = json.loads(text)
    except ValueError as error:
        fail(f"--options is no JSON: {error}", ExitCode.USAGE)
    if not isinstance(options, dict):
        fail('--options: write an object, as {"exploration": 0.3}', ExitCode.USAGE)
    return options


def _policy_of(tags: dict[str, str]) -> str:
    """The policy and its options in one cell."""
    options = json.loads(tags.get("options", "{}"))
    words = in_words(options)
    return f"{tags.get('policy', '')} ({words})" if words else tags.get("policy", "")


def _gain_of(tags: dict[str, str]) -> str:
    """The gain of the newest evaluation with its interval and the number of decisions."""
    lower, upper = tags.get("evaluation.lower"), tags.get("evaluation.upper")
    if lower is None or upper is None:
        return "refused: too little data" if "evaluation.promote" in tags else ""
    interval = f"[{float(lower):+.3f}, {float(upper):+.3f}]"
    gain = tags.get("evaluation.gain")
    decisions = tags.get("evaluation.decisions")
    parts = [f"{float(gain):+.3f}" if gain is not None else "", interval]
    parts.append(f"n={decisions}" if decisions else "")
    champion = tags.get("evaluation.champion_version")
    parts.append(f"over {champion}" if champion else "")
    return " ".join(part for part in parts if part)


def _report_in_words(report: dict[str, Any]) -> str:
    """An evaluation: the verdict, the gain and the data behind it."""
    verdict = "may be promoted" if report["promote"] else "is not proved better"
    lines = [
        f"version {report['version']} {verdict}: {report['reason']}",
    ]
    difference = report.get("difference")
    if difference and "lower" in report:
        lines.append(
            f"gain per request over version {report['champion_version']}: {difference['value']:+.4f}, "
            f"between {report['lower']:+.4f} and {report['upper']:+.4f} at {report['level']:.0%} ({report['bound']})"
        )
    if "decisions" in report:
        lines.append(
            f"on {report['decisions']} decisions, {report['randomised']} of them with more than one possible model"
        )
    for why, count in (report.get("left_out") or {}).items():
        lines.append(f"left out: {count} {why}")
    return "\n".join(lines)


def _diff_in_words(found: dict[str, Any]) -> str:
    """A comparison of two versions: what differs, and how differently they decide."""
    one, other = (f"version {number}" for number in found["versions"])
    changed = [
        (FIELDS.get(field, field), *(_value(value) for value in values))
        for field, values in found["changed"].items()
    ]
    parts = [
        table(
            ("what differs", one, other),
            changed,
            f"{one} and {other} have the same policy, options and data",
        )
    ]
    count = found["decisions"]
    if not count:
        parts.append("the journal has no decision on which they could be compared")
        return "\n\n".join(parts)
    parts.append(
        f"they decide {percent(found['decide_otherwise'])} of the newest {count} requests differently"
    )
    first, second = found["shares"]
    rows = [
        (arm, percent(share), percent(second.get(arm, 0.0)))
        for arm, share in first.items()
    ]
    parts.append(table(("model", f"share under {one}", f"under {other}"), rows))
    kinds = found.get("kinds") or {}
    if kinds:
        kind_rows = [
            (
                kind,
                each["decisions"],
                percent(each["decide_otherwise"]),
                _favourite(each["shares"][0]),
                _favourite(each["shares"][1]),
            )
            for kind, each in kinds.items()
        ]
        header = (
            "kind",
            "requests",
            "differently",
            f"mostly, {one}",
            f"mostly, {other}",
        )
        parts.append(table(header, kind_rows))
    return "\n\n".join(parts)


def _favourite(shares: dict[str, float]) -> str:
    """The model that a version chooses most often, with its share."""
    arm = max(shares, key=lambda name: shares[name])
    return f"{arm} {percent(shares[arm])}"


def _value(value: object) -> str:
    if isinstance(value, dict):
        return in_words(value) or "(none)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
