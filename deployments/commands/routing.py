"""Commands on what the router decides: explain a decision, and the stages of the first day."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from deployments.commands.gateway import URL, Url, ask
from deployments.commands.output import (
    AsJson,
    ExitCode,
    example,
    fail,
    percent,
    show,
    table,
)

ROLLOUT = "/v1/router/rollout"
OverrideGate = Annotated[
    bool, typer.Option("--override-gate", help="Without proof; needs --reason.")
]
Reason = Annotated[str, typer.Option(help="Is recorded, and shown in the history.")]

first_day = typer.Typer(
    no_args_is_help=True,
    help="""See and begin the stages in which the policy takes over from your own rule.

The stages are observe, 1 %, 10 %, 100 % and done; `rollout: {start: observe}` in serve_config.yaml begins with the
first. `router versions rollback` returns to the rule from any stage.

\b
Example:
  router first-day status
  router first-day advance""",
)


@example("router explain 0d9f3c2e")
def explain(
    decision_id: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="Of the decision: the header x-router-decision-id."
        ),
    ],
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Tell why a request went to its model, and what came of it; --json has every number."""
    found = ask(url, "GET", f"/v1/router/decisions/{quote(decision_id, safe='')}")
    show(str(found["summary"]), found, as_json)


@first_day.command("status")
@example("router first-day status")
def status(url: Url = URL, as_json: AsJson = False) -> None:
    """Show the stage, what the policy would have done, and what the next stage waits for."""
    _show_day(ask(url, "GET", ROLLOUT), as_json)


@first_day.command("advance")
@example(
    "router first-day advance",
    'router first-day advance --override-gate --reason "a drill"',
)
def advance(
    url: Url = URL,
    override_gate: OverrideGate = False,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Begin the next stage, if the gate agrees; exit code 4 if it does not."""
    body = {"override_gate": override(override_gate, reason)}
    _show_day(ask(url, "POST", f"{ROLLOUT}/advance", json=body), as_json)


def override(override_gate: bool, reason: str) -> str:
    """The reason with which the gate is overridden; "" if it is not."""
    if override_gate and not reason:
        fail("--override-gate needs --reason: it is recorded", ExitCode.USAGE)
    return reason if override_gate else ""


def _show_day(rollout: dict[str, Any], as_json: bool) -> None:
    plain = {"first_day": rollout.get("first_day"), "roles": rollout["roles"]}
    show(_day_in_words(rollout), plain, as_json)


def roles_table(rollout: dict[str, Any]) -> str:
    """The roles with their versions and shares."""
    rows = [
        (role, each["version"] or None, each["policy"], percent(each["share"]))
        for role, each in rollout["roles"].items()
    ]
    return table(("role", "version", "policy", "traffic"), rows)


def _day_in_words(rollout: dict[str, Any]) -> str:
    """The stage of the first day; without a first day, the roles."""
    day = rollout.get("first_day")
    if day is None:
        return f"there is no first day: the policy has had the traffic from the start\n\n{roles_table(rollout)}"
    rule, policy, stage = day["rule"], day["policy"], day["stage"]
    lines = [f"stage: {stage} (rule: {rule}, policy: {policy})"]
    if day["requests"]:
        lines.append(
            f"both choose the same model for {day['agreement']:.1%} of {day['requests']} requests that leave a choice"
        )
        for name, choices in ((policy, day["chosen"]), (rule, day["by_rule"])):
            counts = ", ".join(f"{arm} {n}" for arm, n in choices.items())
            lines.append(f"{name} chooses: {counts}")
    scored = ", ".join(f"{arm} {n}" for arm, n in day["scored"].items())
    lines.append(f"answers with a score: {scored or 'none'}")
    expected = day["expected"]
    if expected["requests"]:
        lines.append(
            f"by its own estimates {policy} changes per request (mean of {expected['requests']}): "
            f"score {expected['score']:+.4f}, latency {expected['latency_s']:+.3f} s, "
            f"cost {expected['cost_usd']:+.3g} USD, utility {expected['utility']:+.4f}"
        )
    measured = day["measured"]
    if measured is not None:
        value = measured["value"]
        shown = "unknown" if value is None else f"{value:+.4f}"
        lines.append(
            f"measured change of utility per request: {shown}, between {measured['lower']:+.4f} and "
            f"{measured['upper']:+.4f} ({measured['rewards']} and {measured['rule_rewards']} rewards)"
        )
    if day["held"]:
        lines.append(f"no stage begins by itself: {day['held']}")
    if day["next_stage"]:
        gate = "may begin" if day["passed"] else "waits for"
        lines.append(
            f"next stage, {day['next_stage']}, {gate}: {day['next_waits_for']}"
        )
    return "\n".join(lines)
