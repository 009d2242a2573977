"""Manages a running system: its policy versions, and calibrations. `python -m deployments.cli list`.

    list                              list all versions, their roles, and their evaluations
    show N                            show a version, with the report of its newest evaluation
    diff N [M]                        compare a version with another, by default with the champion
    register [--policy NAME] [--options JSON]
                                      register the champion as it is, or another policy trained on the journal
    evaluate N                        compare a version with the champion on the logged decisions
    promote N [--to ROLE]             make a version champion if it is better; or challenger (--share), or shadow
    rollback [--role ROLE]            go back to the champion's predecessor; or remove a challenger or shadow
    calibrate PROMPTS.jsonl           every size answers your prompts while it is idle (operations/calibrate.py; --help)
    status                            on the first day: its stage, what the policy would have done, what comes next
    advance                           begin the next stage of the first day, if the gate agrees

The commands use the gateway's HTTP API. If it asks for keys, ROUTER_API_KEY needs the scope `operate`.
"""

import argparse
import json
import os
import sys
from typing import Any

import httpx

from deployments.operations import calibrate

URL = "http://127.0.0.1:8000"
Json = dict[str, Any]  # a reply of the gateway


def run(client: httpx.Client, given: argparse.Namespace) -> str:
    """Run a command. Returns the text to print.

    Raises:
        SystemExit: the gateway refused it, or did not answer.
    """
    versions = "/v1/router/versions"
    number = f"/v1/router/versions/{given.version}"
    options = json.loads(given.options) if given.options else None
    if given.verb == "list":
        return _table(_ask(client, "GET", versions)["versions"])
    if given.verb == "show":
        return _as_json(_ask(client, "GET", number))
    if given.verb == "diff":
        return _as_json(
            _ask(client, "GET", f"{number}/diff", params={"other": given.other or 0})
        )
    if given.verb == "register":
        body = None
        if given.policy or options:
            body = {"policy": given.policy, "options": options}
        return f"registered as version {_ask(client, 'POST', versions, json=body)['version']}"
    if given.verb == "evaluate":
        return _as_json(_ask(client, "POST", f"{number}/evaluate"))
    if given.verb == "promote":
        body = {
            "to": given.to,
            "share": given.share,
            "override_gate": given.reason if given.override_gate else "",
        }
        return _as_json(_ask(client, "POST", f"{number}/promote", json=body))
    if given.verb == "status":
        return _status(_ask(client, "GET", "/v1/router/rollout"))
    if given.verb == "advance":
        body = {"override_gate": given.reason if given.override_gate else ""}
        return _status(_ask(client, "POST", "/v1/router/rollout/advance", json=body))
    body = {"role": given.role, "reason": given.reason}
    return _as_json(_ask(client, "POST", "/v1/router/versions/rollback", json=body))


def _ask(client: httpx.Client, method: str, path: str, **options: Any) -> Json:
    try:
        answer = client.request(method, path, **options)
    except httpx.HTTPError as error:
        raise SystemExit(
            f"no answer from {client.base_url} ({type(error).__name__}); is it running?"
        ) from None
    content: Json = answer.json()
    if answer.is_error:
        raise SystemExit(str(content["error"]["message"]))
    return content


def _as_json(content: Json) -> str:
    return json.dumps(content, indent=2)


def _status(rollout: Json) -> str:
    """The stage of the first day in words; without a first day, the roles."""
    day = rollout.get("first_day")
    if day is None:
        return _as_json(rollout["roles"])
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


def _table(versions: list[Json]) -> str:
    rows = [
        ("version", "roles", "policy", "decisions", "parent", "created", "evaluation")
    ]
    for version in versions:
        tags = version["tags"]
        policy = f"{tags.get('policy', '')} {tags.get('options', '{}')}"
        evaluation = tags.get("evaluation.reason", "")
        if len(evaluation) > 60:
            evaluation = evaluation[:57] + "..."
        rows.append(
            (
                str(version["version"]),
                " ".join(version["aliases"]),
                policy.removesuffix(" {}"),
                tags.get("decisions", ""),
                tags.get("parent", ""),
                version["created"],
                evaluation,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of_versions = (
        "list",
        "show",
        "diff",
        "register",
        "evaluate",
        "promote",
        "rollback",
    )
    verbs = (*of_versions, "status", "advance")
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("version", nargs="?", type=int)
    parser.add_argument("other", nargs="?", type=int, help="second version of diff")
    parser.add_argument(
        "--to", choices=("champion", "challenger", "shadow"), default="champion"
    )
    parser.add_argument(
        "--share", type=float, help="share of the traffic for a challenger"
    )
    parser.add_argument(
        "--override-gate",
        action="store_true",
        help="promote or advance without proof; needs --reason",
    )
    parser.add_argument(
        "--reason", default="", help="recorded on the version, or in the history"
    )
    parser.add_argument(
        "--role", choices=("champion", "challenger", "shadow"), default="champion"
    )
    parser.add_argument("--policy", default="", help="a name of policies/registry.py")
    parser.add_argument(
        "--options", default="", help='of that policy, as JSON: {"exploration": 0.3}'
    )
    parser.add_argument("--url", default=URL)
    given = parser.parse_args(arguments)
    if given.verb in ("show", "diff", "evaluate", "promote") and given.version is None:
        parser.error(f"say which version to {given.verb}")
    if given.override_gate and not given.reason:
        parser.error("--override-gate needs --reason: it is recorded")
    return given


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["calibrate"]:
        calibrate.main(sys.argv[2:])
        return
    given = parse()
    key = os.environ.get("ROUTER_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=given.url, headers=headers, timeout=310) as client:
        print(run(client, given))


if __name__ == "__main__":
    main()
