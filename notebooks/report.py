"""Executes the notebook, writes it as one HTML file and logs the file to MLflow: `make report`.

JOURNAL=sqlite:///var/journal.db analyses that journal; the default is the bundled log. CONFIG=FILE names the
configuration with the prices of its arms, if that is not serve_config.yaml.
"""

import argparse
import html
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client.manager import AsyncKernelManager
from markdown_it import MarkdownIt
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks/policy_analysis.ipynb"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Policy analysis</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ max-width: 100% }} table {{ border-collapse: collapse; font-size: 13px }} td, th {{ padding: 2px 8px }}
tr {{ border-bottom: 1px solid #ddd }} td, th {{ vertical-align: top; text-align: left }}
pre {{ background: #f6f6f6; padding: .5em 1em; white-space: pre-wrap }}
</style>{body}</html>
"""


def execute(notebook: Path = NOTEBOOK) -> NotebookNode:
    """Run all cells in a fresh kernel.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    content = nbformat.read(notebook, as_version=4)
    # the kernel's sockets are in this folder, so that no other user can connect to them
    with TemporaryDirectory() as folder:
        kernel = AsyncKernelManager(
            kernel_name="python3", transport="ipc", ip=f"{folder}/kernel"
        )
        NotebookClient(
            content, km=kernel, timeout=600, resources={"metadata": {"path": str(ROOT)}}
        ).execute()
    return content


def to_html(notebook: NotebookNode) -> str:
    """The notebook's text, figures and tables as HTML. Of the code, only cells of one line are shown."""
    markdown = MarkdownIt().enable("table")
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(markdown.render(cell.source))
            continue
        if "\n" not in cell.source:
            parts.append(f"<pre>{html.escape(cell.source)}</pre>")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(
                    f'<img alt="{html.escape(cell.source)}" src="data:image/png;base64,{data["image/png"]}">'
                )
            elif "text/html" in data:
                parts.append(data["text/html"])
            elif output.output_type == "stream" and output.name == "stdout":
                parts.append(f"<pre>{html.escape(output.text)}</pre>")
    return PAGE.format(body="\n".join(parts))


def log_to_mlflow(uri: str, experiment: str, files: list[Path]) -> str:
    """Create an MLflow run with some files; returns its id."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    experiment_id = (
        found.experiment_id if found else client.create_experiment(experiment)
    )
    tags = {"kind": "report", "journal": os.environ.get("JOURNAL", "the bundled log")}
    run = client.create_run(
        experiment_id, run_name="policy analysis", tags=tags
    ).info.run_id
    for file in files:
        client.log_artifact(run, str(file))
    client.set_terminated(run)
    return str(run)


def main() -> None:
    """Make the report, from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("var/policy_analysis.html"))
    parser.add_argument(
        "--mlflow", default="http://127.0.0.1:5000", help="'' to log nothing"
    )
    parser.add_argument("--experiment", default="adaptive-router")
    arguments = parser.parse_args()
    notebook = execute()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(to_html(notebook))
    executed = arguments.out.with_suffix(".ipynb")
    nbformat.write(notebook, executed)
    print(f"report: {arguments.out}")
    if arguments.mlflow:
        run = log_to_mlflow(
            arguments.mlflow, arguments.experiment, [arguments.out, executed]
        )
        print(f"in MLflow: run {run} of {arguments.experiment}")


if __name__ == "__main__":
    main()
