"""Commands that measure: calibrate on your prompts, the demo, and, in a checkout, the report."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deployments import paths
from deployments.commands import gateway
from deployments.commands.gateway import URL, Url
from deployments.commands.output import AsJson, ExitCode, example, fail, reported, show

OUT = paths.home() / "var"  # of pictures
# options that this command does not know go to what it starts
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
    out: Annotated[Path, typer.Option(help="Folder of the picture.")] = OUT,
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
    to 1. assets/prompts.jsonl, which is in the package, has prompts for the default models.
    """
    from deployments.operations.calibrate import Command, Options

    options = Options(
        prompts=Path(paths.bundled(str(prompts))),
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
    seed: Annotated[int, typer.Option(help="Another seed is another stream.")] = 1,
    url: Url = URL,
    mlflow: Annotated[
        str, typer.Option(help="URL of MLflow; '' logs nothing.")
    ] = "http://127.0.0.1:5000",
    requests: Annotated[
        int, typer.Option(min=9, help="Length of the stream; each strategy gets it.")
    ] = 600,
    scored: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of auto's answers that get a score."),
    ] = 1.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    threshold: Annotated[
        float,
        typer.Option(help="Complexity from which the static rules take the largest."),
    ] = 0.5,
    out: Annotated[Path, typer.Option(help="Folder of the picture.")] = OUT,
    as_json: AsJson = False,
) -> None:
    """Watch the router learn, beside each fixed size and the static rules; the system must be running.

    The questions are those that the default models can answer, and a program checks the answers.
    """
    from deployments.demonstration.run import Options, demonstrate

    options = Options(
        url=url,
        mlflow=mlflow,
        seed=seed,
        requests=requests,
        scored=scored,
        concurrency=concurrency,
        threshold=threshold,
        out=out,
        headers=gateway.key_headers(),
    )
    with reported():
        figures = demonstrate(options, partial(typer.echo, err=as_json))
    if as_json:
        show("", {"strategies": figures}, True)


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
    if not (paths.ROOT / module.replace(".", "/")).with_suffix(".py").exists():
        fail(
            f"`router {command}` needs a checkout of the project: {module} is not in the installed package",
            ExitCode.REFUSED,
        )
    done = subprocess.run(
        [sys.executable, "-m", module, *given],
        cwd=paths.ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    raise typer.Exit(done.returncode)
