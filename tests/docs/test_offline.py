"""Tests of the check that pages load nothing from another host, and of the tables in Markdown."""

from docs.reference.markdown import table
from docs.reference.offline import loaded_from_elsewhere


def test_a_script_of_another_host_is_found() -> None:
    """Scripts, styles and pictures are found by their tags; a link that a reader follows is not."""
    page = (
        '<script src="https://cdn.example.com/x.js"></script>'
        '<link rel="stylesheet" href="//fonts.example.com/a.css"/>'
        '<a href="https://semver.org">versions</a> <img src="_images/demo.png"/>'
    )
    assert loaded_from_elsewhere(page) == [
        "https://cdn.example.com/x.js",
        "//fonts.example.com/a.css",
    ]


def test_a_cell_of_a_table_cannot_end_the_cell() -> None:
    """A bar is escaped, and a line break becomes a space."""
    assert table(("a",), [("x | y\nz",)]) == "| a |\n|---|\n| x \\| y z |\n"
