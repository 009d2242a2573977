"""Policy versions from the command line: `python -m deployments.policy list`, on a running system.

    list                              all versions, their roles, and what was found about them
    show N                            one of them, with the report of its newest evaluation
    diff N [M]                        beside another, by default the champion
    register [--policy NAME] [--options JSON]
                                      the champion as it is; or another policy, taught by the journal
    evaluate N                        is it better than the champion? judged on the log, attached to the version
    promote N [--to ROLE]             if it is; as challenger (--share) or shadow in any case
    rollback [--role ROLE]            to the predecessor; or take a challenger or shadow off

Everything goes through the gateway's HTTP API; where it asks for keys, ROUTER_API_KEY needs the scope `operate`.
"""

import argparse
import json
import os
from typing import Any

import httpx

URL = "http://127.0.0.1:8000"


def run(client: httpx.Client, given: argparse.Namespace) -> str:
    """Carry out a verb; returns what to print.

    Raises:
        SystemExit: it was refused; the message says why.
    """
    at, number = "/v1/router/versions", f"/v1/router/versions/{given.version}"
    options = json.loads(given.options) if given.options else None
    if given.verb == "list":
        return _table(_ask(client, "GET", at)["versions"])
    if given.verb == "show":
        return _plain(_ask(client, "GET", number))
    if given.verb == "diff":
        return _plain(_ask(client, "GET", f"{number}/diff", params={"other": given.other or 0}))
    if given.verb == "register":
        body = {"policy": given.policy, "options": options} if given.policy or options else None
        return f"registered as version {_ask(client, 'POST', at, json=body)['version']}"
    if given.verb == "evaluate":
        return _plain(_ask(client, "POST", f"{number}/evaluate"))
    if given.verb == "promote":
        body = {"to": given.to, "share": given.share, "override_gate": given.reason if given.override_gate else ""}
        return _plain(_ask(client, "POST", f"{number}/promote", json=body))
    body = {"role": given.role, "reason": given.reason}
    return _plain(_ask(client, "POST", "/v1/router/versions/rollback", json=body))


def _ask(client: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    try:
        answer = client.request(method, path, **options)
    except httpx.HTTPError as error:
        raise SystemExit(f"no answer from {client.base_url} ({type(error).__name__}); is it running?") from None
    found: dict[str, Any] = answer.json()
    if answer.is_error:
        raise SystemExit(str(found["error"]["message"]))
    return found


def _plain(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2)


def _table(versions: list[dict[str, Any]]) -> str:
    rows = [("version", "roles", "policy", "decisions", "parent", "created", "evaluation")]
    for version in versions:
        tags = version["tags"]
        policy = f"{tags.get('policy', '')} {tags.get('options', '{}')}".removesuffix(" {}")
        found = tags.get("evaluation.reason", "")
        rows.append(
            (
                str(version["version"]),
                " ".join(version["aliases"]),
                policy,
                tags.get("decisions", ""),
                tags.get("parent", ""),
                version["created"],
                found if len(found) <= 60 else found[:57] + "...",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = ("list", "show", "diff", "register", "evaluate", "promote", "rollback")
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("version", nargs="?", type=int)
    parser.add_argument("other", nargs="?", type=int, help="of diff")
    parser.add_argument("--to", choices=("champion", "challenger", "shadow"), default="champion")
    parser.add_argument("--share", type=float, help="of the traffic, for a challenger")
    parser.add_argument("--override-gate", action="store_true", help="promote without proof; needs --reason")
    parser.add_argument("--reason", default="", help="recorded on the version, or in the history")
    parser.add_argument("--role", choices=("champion", "challenger", "shadow"), default="champion")
    parser.add_argument("--policy", default="", help="a name of policies/registry.py")
    parser.add_argument("--options", default="", help='of that policy, as JSON: {"exploration": 0.3}')
    parser.add_argument("--url", default=URL)
    given = parser.parse_args(arguments)
    if given.verb in ("show", "diff", "evaluate", "promote") and given.version is None:
        parser.error(f"say which version to {given.verb}")
    if given.override_gate and not given.reason:
        parser.error("--override-gate needs --reason: it is recorded on the version")
    return given


def main() -> None:
    """The command line."""
    given, key = parse(), os.environ.get("ROUTER_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=given.url, headers=headers, timeout=310) as client:
        print(run(client, given))


if __name__ == "__main__":
    main()
