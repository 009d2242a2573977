"""Tests of the catalogue of faults: its quick checks hold their bars. `make test-faults` plays all of it.

`make test-full` plays others of its checks, and neither plays those with bars of milliseconds. T13's deadline is tested
in test_internal_errors.py, on a fake clock.
"""

from pathlib import Path

import pytest

from tests.faults.catalogue import NEEDS, TEST, TIERS, Fault, catalogue, update_table

CATALOGUE = catalogue()
QUICK = [fault for fault in CATALOGUE if fault.tier == TEST]


@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.id)
def test_a_quick_check_holds_its_bar(fault: Fault, tmp_path: Path) -> None:
    """Each quick check of the catalogue holds the bar of its row."""
    finding = fault.check(tmp_path)
    assert finding.held, f"{fault.what}: {finding.figure}; the bar is {fault.bar}"


def test_the_catalogue_is_complete() -> None:
    """The catalogue has at least one row for each of T1 to T31, and every row is complete."""
    assert {fault.id for fault in CATALOGUE} == {f"T{i}" for i in range(1, 32)}
    assert all(fault.needs in NEEDS and fault.bar and fault.what for fault in CATALOGUE)
    assert all(fault.tier in TIERS for fault in CATALOGUE)
    assert QUICK and not any(fault.needs for fault in QUICK)


def test_updating_the_table_keeps_other_rows(tmp_path: Path) -> None:
    """The table merges the rows of several runs in order and keeps the text below.

    A row that was not played, because it needs a running system, does not replace an earlier figure.
    """
    path = tmp_path / "FAULTS.md"
    names = {fault.id: fault.what for fault in reversed(CATALOGUE)}
    update_table(
        path,
        [
            ["T29", names["T29"], "old", "b", "NO", "1"],
            ["T9", names["T9"], "first", "b", "yes", "1"],
        ],
    )
    path.write_text(path.read_text() + "\nA remark.\n")
    update_table(
        path,
        [
            ["T29", names["T29"], "new", "b", "yes", "1"],
            ["T9", names["T9"], "needs --url", "b", "live", ""],
        ],
    )
    assert path.read_text().endswith("\n\nA remark.\n")
    rows = [line for line in path.read_text().splitlines() if line.startswith("| T")]
    assert len(rows) == 2 and "first" in rows[0] and "new" in rows[1]
