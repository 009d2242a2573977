"""The quick part of the catalogue of faults, held to its bars at every change; `make test-faults` plays all of it.

What is about milliseconds is only there: T13's deadline is tested in test_faults.py, on a clock of the test's own.
"""

from pathlib import Path

import pytest

from tests.faults import NEEDS, Fault, catalogue, keep

CATALOGUE = catalogue()
QUICK = [fault for fault in CATALOGUE if not fault.needs and fault.id in ("T8", "T9", "T18", "T24", "T27", "T28")]


@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.id)
def test_it_holds(fault: Fault, tmp_path: Path) -> None:
    """At the bar of the table."""
    finding = fault.check(tmp_path)
    assert finding.held, f"{fault.what}: {finding.figure}; the bar is {fault.bar}"


def test_the_catalogue_is_whole() -> None:
    """T1 to T30, each in at least one row, and every row says what it needs."""
    assert {fault.id for fault in CATALOGUE} == {f"T{i}" for i in range(1, 31)}
    assert all(fault.needs in NEEDS and fault.bar and fault.what for fault in CATALOGUE)


def test_the_table_keeps_what_was_not_played_now(tmp_path: Path) -> None:
    """Rows of several runs come together, in order; a row that needs a running system does not replace its figure; what
    somebody wrote below stays.
    """
    path, names = tmp_path / "FAULTS.md", {fault.id: fault.what for fault in reversed(CATALOGUE)}
    keep(path, [["T29", names["T29"], "old", "b", "NO", "1"], ["T9", names["T9"], "first", "b", "yes", "1"]])
    path.write_text(path.read_text() + "\nA remark.\n")
    keep(path, [["T29", names["T29"], "new", "b", "yes", "1"], ["T9", names["T9"], "needs --url", "b", "live", ""]])
    assert path.read_text().endswith("\n\nA remark.\n")
    rows = [line for line in path.read_text().splitlines() if line.startswith("| T")]
    assert len(rows) == 2 and "first" in rows[0] and "new" in rows[1]
