"""OutcomeReporter: outcomes are queued, sent in batches, and sent again while the router is away."""

import asyncio
from typing import Any

import pytest

from deployments.dispatch import outcome_reporter
from deployments.dispatch.outcome_reporter import OutcomeReporter
from deployments.observability import logs
from policies.events import Decision, Outcome
from policies.types import Objective, TaskProfile
from tests.support import clock
from tests.support.requests import make_profile


def decision(number: int) -> Decision:
    return Decision(f"d{number}", "small", number, "", make_profile(), Objective())


class FakeRouter:
    """Keeps the ids of each batch; refuses batches while `away`."""

    def __init__(self) -> None:
        self.away = False
        self.attempts = 0
        self.batches: list[list[str]] = []

    async def observe(self, batch: list[Any]) -> None:
        self.attempts += 1
        if self.away:
            raise ConnectionError
        self.batches.append([outcome.decision_id for _, outcome in batch])


def unchanged(profiles: list[TaskProfile]) -> list[TaskProfile]:
    return profiles


def report(reporter: OutcomeReporter, *numbers: int) -> None:
    for number in numbers:
        reporter.report(decision(number), Outcome(f"d{number}"))


def test_outcomes_are_sent_together_and_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outcome_reporter, "BATCH_SIZE", 3)
    router = FakeRouter()

    async def run() -> None:
        reporter = OutcomeReporter(router.observe, unchanged)
        report(reporter, 1, 2, 3, 4)
        await reporter.drain(60.0)
        assert not reporter.unsent

    clock.run(run())
    assert router.batches == [["d1", "d2", "d3"], ["d4"]]


def test_a_batch_is_sent_again_until_the_router_takes_it() -> None:
    """Outcomes reported meanwhile follow in the next batch, and the log does not wait for the router."""
    router = FakeRouter()
    router.away = True

    async def run() -> None:
        reporter = OutcomeReporter(router.observe, unchanged)
        report(reporter, 1)
        await reporter.drain(10.0)
        assert router.attempts > 2 and len(reporter.unsent) == 1
        report(reporter, 2)
        await asyncio.sleep(outcome_reporter.LONGEST_PAUSE_S)
        assert not reporter._unlogged
        router.away = False
        await reporter.drain(60.0)

    clock.run(run())
    assert router.batches == [["d1"], ["d2"]]


def test_a_batch_is_given_up_after_a_long_outage() -> None:
    """Later outcomes are sent when the router is back."""
    router = FakeRouter()
    router.away = True

    async def run() -> None:
        reporter = OutcomeReporter(router.observe, unchanged)
        report(reporter, 1)
        await reporter.drain(2 * outcome_reporter.GIVE_UP_AFTER_S)
        assert not reporter.unsent
        router.away = False
        report(reporter, 2)
        await reporter.drain(60.0)

    clock.run(run())
    assert router.batches == [["d2"]]


def test_a_full_queue_drops_its_oldest_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while that outcome is being sent."""
    monkeypatch.setattr(outcome_reporter, "MAX_UNSENT", 2)
    router = FakeRouter()
    router.away = True

    async def run() -> None:
        reporter = OutcomeReporter(router.observe, unchanged)
        report(reporter, 1, 2)
        await asyncio.sleep(1.0)
        report(reporter, 3)
        router.away = False
        await reporter.drain(60.0)

    clock.run(run())
    assert router.batches == [["d1", "d2"], ["d3"]]


def test_forecasts_are_added_before_an_outcome_is_sent() -> None:
    """They do not influence the decision, so a local decision has none."""
    forecast = make_profile("another text")
    sent: list[Any] = []

    async def observe(batch: list[Any]) -> None:
        sent.extend(batch)

    async def run() -> None:
        reporter = OutcomeReporter(observe, lambda profiles: [forecast] * len(profiles))
        report(reporter, 1)
        await reporter.drain(60.0)

    clock.run(run())
    assert [sent_decision.profile for sent_decision, _ in sent] == [forecast]


def test_log_lines_of_an_outcome_have_the_id_of_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several requests report to one task, which must not carry the id of the first."""
    lines: list[tuple[str, str, str]] = []

    def finished(_: Decision, outcome: Outcome, request_id: str) -> None:
        lines.append((outcome.decision_id, request_id, logs.REQUEST_ID.get()))

    monkeypatch.setattr(logs, "finished", finished)
    router = FakeRouter()

    async def run() -> None:
        reporter = OutcomeReporter(router.observe, unchanged)
        for number in (1, 2):
            token = logs.REQUEST_ID.set(f"req-{number}")
            report(reporter, number)
            logs.REQUEST_ID.reset(token)
        await reporter.drain(60.0)

    clock.run(run())
    assert lines == [("d1", "req-1", ""), ("d2", "req-2", "")]
