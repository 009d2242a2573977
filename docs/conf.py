"""Settings of Sphinx: `make docs` builds the documentation, with warnings as errors."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs.reference import pages  # noqa: E402

pages.write()

project = "Adaptive LLM router"
author = "the authors of Adaptive LLM router"
project_copyright = "2026, the authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_parser", "docs.reference.mathml", "docs.reference.offline"]
html_math_renderer = "mathml"
root_doc = "index"
exclude_patterns = ["generated", "reference"]
nitpicky = True
highlight_language = "text"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
html_theme = "pydata_sphinx_theme"
html_title = "Adaptive LLM router"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_theme_options = {
    "navbar_center": [],
    "navbar_persistent": ["search-button"],
    "show_toc_level": 2,
}
html_sidebars = {"**": ["globaltoc.html"]}
html_copy_source = False
