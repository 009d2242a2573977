"""Refuses pages that load a script, a style or a picture from another host: the documentation works without network."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

LOADED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\s(?:src|href)=\"((?:https?:)?//[^\"]+)\""
)


def loaded_from_elsewhere(html: str) -> list[str]:
    """The addresses of other hosts that a page loads when it is shown; links that a reader may follow do not count."""
    return LOADED.findall(html)


def check(app: "Sphinx", failure: Exception | None) -> None:
    """Check all pages after a build."""
    from sphinx.errors import ExtensionError

    if failure is not None or app.builder.format != "html":
        return
    for page in sorted(Path(app.outdir).rglob("*.html")):
        found = loaded_from_elsewhere(page.read_text())
        if found:
            raise ExtensionError(f"{page.name} loads {found[0]} from another host")


def setup(app: "Sphinx") -> dict[str, bool]:
    """Register the check with Sphinx."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
