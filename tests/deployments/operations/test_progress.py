"""The lines about a step that takes long."""

import pytest

from deployments.operations.progress import QUIET_S, Progress


def test_a_long_wait_is_not_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """A line says what is awaited once a while, and not after each question."""
    now = [100.0]
    progress = Progress(lambda: now[0])
    progress.say("deploying nano")
    for _ in range(int(2.5 * QUIET_S)):
        now[0] += 1.0
        progress.waiting("nano")
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == [
        "[    0 s] deploying nano",
        "[   15 s]   still waiting for nano",
        "[   30 s]   still waiting for nano",
    ]
