"""Commands that measure: calibrate on your prompts; and of a checkout, the demo and the report."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deployments.commands import gateway
from deployments.commands.gateway import URL, Url
from deployments.commands.output import AsJson, ExitCode, example, fail, reported, show

ROOT = Path(__file__).resolve().parents[2]
# options that these commands do not know go to what they start
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@example(
    "router calibrate assets/prompts.jsonl --max-usd 5",
    '{"prompt": "What is 2 plus 2?", "reference": "4", "grade": "number", "max_tokens": 50}',
    '{"messages": [{"role": "user", "content": "…"}]}',
)
def calibrate(
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS.jsonl", help="One prompt a line.")
    ],
    url: Url = URL,
    sample: Annotated[int, typer.Option(min=1, help="How many prompts to ask.")] = 200,
    models: Annotated[
        str,
        typer.Option(help="Sizes, separated by commas; by default all that chat."),
    ] = "",
    grader: Annotated[
        str, typer.Option(help='Your program: "python grade.py"; it runs here.')
    ] = "",
    max_calls: Annotated[
        int | None, typer.Option(min=1, help="Those of the judge included.")
    ] = None,
    max_usd: Annotated[
        float | None, typer.Option(min=0, help="Of the answers, by the sizes' prices.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Calls at once, of each size.")
    ] = 2,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask again what was answered before.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path("var"),
    mlflow_wait: Annotated[
        float, typer.Option(min=0, help="Seconds for MLflow to get the report.")
    ] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Let every size answer your prompts while it is idle, so that the router knows the sizes.

    The answers are graded by the references in the file, by a judge where there is no reference, or by your own
    program. The same command goes on where an earlier one has stopped; answers that exist are not asked again.

    PROMPTS.jsonl has one JSON object a line. `grade` is exact (the default), regex, number or json. With --grader your
    program reads one line of JSON from stdin, {"prompt": …, "reference": …, "answer": …}, and prints a score from 0
    to 1.
    """
    from deployments.operations.calibrate import Command, Options

    options = Options(
        prompts=prompts,
        sample=sample,
        models=[name.strip() for name in models.split(",") if name.strip()] or None,
        grader=grader,
        max_calls=max_calls,
        max_usd=max_usd,
        concurrency=concurrency,
        fresh=fresh,
        out=out,
        mlflow_wait=mlflow_wait,
    )
    with reported(), gateway.connect(url) as client:
        client.headers.update(gateway.key_headers())
        found = Command(client, options, partial(typer.echo, err=as_json)).run()
    if as_json:
        show("", {"report": found.plain() if found is not None else None}, True)


@example("router demo --seed 2")
def demo(
    context: typer.Context,
    seed: Annotated[int, typer.Option(help="Another seed is another stream.")] = 1,
    url: Url = URL,
) -> None:
    """Watch the router learn, beside each fixed size and the static rules. It needs a checkout and a running system.

    Further options are those of benchmarks/demo.py: `--requests 100`, for example.
    """
    given = ["--seed", str(seed), "--url", url, *context.args]
    _start("demo", "benchmarks.demo", given)


@example("router report --journal sqlite:///var/journal.db")
def report(
    context: typer.Context,
    journal: Annotated[
        str,
        typer.Option(
            envvar="JOURNAL",
            help="URL, as sqlite:///var/journal.db; by default the bundled log.",
        ),
    ] = "",
) -> None:
    """Write the notebook on what was learned as HTML, and log it to MLflow. It needs a checkout.

    Further options are those of notebooks/report.py: `--mlflow ''`, for example, to log nothing.
    """
    environment = {"JOURNAL": journal} if journal else {}
    _start("report", "notebooks.report", context.args, environment)


def _start(
    command: str,
    module: str,
    given: list[str],
    environment: dict[str, str] | None = None,
) -> None:
    """Run a module of the checkout that has this file; its exit code is that of the command."""
    if not (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
        fail(
            f"`router {command}` needs a checkout of the project: {module} is not in the installed package",
            ExitCode.REFUSED,
        )
    done = subprocess.run(
        [sys.executable, "-m", module, *given],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    raise typer.Exit(done.returncode)
