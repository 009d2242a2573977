"""Writes all generated pages; docs/conf.py does so at each build."""

from collections.abc import Callable
from pathlib import Path

from docs.reference.errors_table import errors_page
from docs.reference.metrics_table import alerts_page, metrics_page
from docs.reference.parameters_table import (
    capabilities_page,
    parameters_page,
    refused_page,
)
from docs.reference.routes_table import routes_page
from docs.reference.settings_tables import settings_page

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "generated"


def more_page() -> str:
    """A table of contents of the pages that docs/index.md does not name; empty if it names all."""
    index = (DOCS / "index.md").read_text().splitlines()
    left = [
        page.stem
        for page in sorted(DOCS.glob("*.md"))
        if page.stem not in (*index, "index")
    ]
    if not left:
        return ""
    return "\n".join(
        ["```{toctree}", ":caption: More", ":maxdepth: 1", "", *left, "```", ""]
    )


PAGES: dict[str, Callable[[], str]] = {
    "settings": settings_page,
    "routes": routes_page,
    "errors": errors_page,
    "capabilities": capabilities_page,
    "parameters": parameters_page,
    "refused": refused_page,
    "metrics": metrics_page,
    "alerts": alerts_page,
    "more": more_page,
}


def write(folder: Path = FOLDER) -> None:
    """Write the pages into a folder; a page that has not changed keeps its time, so that Sphinx need not read it."""
    folder.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        file, text = folder / f"{name}.md", make()
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


if __name__ == "__main__":
    write()
