"""Plays the policy on a recording, as the router and its ingress run it during the demo.

The questions come in the demo's order, one at a time. The ingress decides on a snapshot of what the router has learned.
The outcome reaches the router with the ingress's next report, the score as soon as the client has checked the answer,
and both reach the ingress with the next snapshot. A clock that runs by the recorded latencies says when that is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import pandas as pd

from benchmarks.replay.recording import RecordedAnswer, RecordedStream
from deployments.demonstration.run import static_rule
from deployments.dispatch.outcome_reporter import SEND_EVERY_S
from deployments.dispatch.router_client import REFRESH_EVERY_S
from deployments.profiler.reader import ProfileItem, TextProfiler
from deployments.settings import GatewaySettings, Tuning
from policies.events import ANY_OWNER, Decision, Event, Feedback, Outcome
from policies.feedback.decision_records import DecisionRecords, History
from policies.feedback.scoring_rates import ScoringRates
from policies.objectives import with_text_sensitivity
from policies.registry import make_policy
from policies.types import Arm, ModelState, Request, TaskProfile

LIMIT = 200  # `max_tokens` of the demo's requests
AUTO = "auto"
STATIC = "static rules"


@dataclass(frozen=True)
class Delays:
    """When an event takes effect.

    report_s: pause between two reports of an ingress to the router.
    refresh_s: pause between two snapshots.
    feedback_s: duration of a client's call of /v1/feedback, before it asks the next question.
    """

    report_s: float = SEND_EVERY_S
    refresh_s: float = REFRESH_EVERY_S
    feedback_s: float = 0.01


class Player:
    """Plays one stream after another, each with a policy that has learned nothing.

    Args:
        settings: of the gateway: the models with their prices, and the policy.
        tuning: of the ingress: the objective.
        delays: see Delays.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        tuning: Tuning,
        delays: Delays | None = None,
    ):
        self.objective = tuning.objective.objective()
        self._settings = settings
        self._delays = delays or Delays()
        self._arms = settings.arms()
        self._arm = {arm.name: arm for arm in self._arms}
        self._profiler = TextProfiler(settings.profiler)

    def play(self, stream: RecordedStream, seed: int) -> pd.DataFrame:
        """A row for each answer of `auto`, of each model by name and of the static rules."""
        column = {model: k for k, model in enumerate(stream.models)}
        given = {
            model: [row[k] for row in stream.answers] for model, k in column.items()
        }
        given[AUTO] = self._auto(stream, column, seed)
        variants = {arm.name for arm in self._arms if arm.variant_of}
        choose = static_rule([m for m in stream.models if m not in variants], 0.5)
        given[STATIC] = [
            row[column[choose(task)]]
            for task, row in zip(stream.tasks, stream.answers, strict=True)
        ]
        parts = [self._frame(name, answers) for name, answers in given.items()]
        return pd.concat(parts, ignore_index=True).assign(seed=seed)

    def _auto(
        self, stream: RecordedStream, column: dict[str, int], seed: int
    ) -> list[RecordedAnswer]:
        router = _Router(self._settings, self._arms)
        rng = np.random.default_rng(seed)
        states = {arm.name: ModelState() for arm in self._arms}
        now_s = 0.0
        chosen = []
        for number, task in enumerate(stream.tasks):
            router.refresh(now_s, self._delays.refresh_s)
            request = Request(
                str(number),
                self._profile(task.question),
                replace(self.objective, models=stream.models),
                score_chance=router.scoring_rate,
            )
            (decision,) = router.snapshot.decide(
                with_text_sensitivity([request]), states, rng, number
            )
            decision = decision.made(request, f"{decision.policy_version}-v0", now_s)
            answer = stream.answers[number][column[decision.arm]]
            chosen.append(answer)
            now_s += answer.latency_s
            reported_s = _next_tick(now_s, self._delays.report_s)
            router.send(reported_s, decision)
            router.send(reported_s, self._outcome(decision, answer))
            score = float(answer.right)
            # as the gateway records it without API keys
            given = Feedback(decision.id, score, "program", owner=ANY_OWNER)
            router.send(now_s, given)
            now_s += self._delays.feedback_s
        return chosen

    def _profile(self, question: str) -> TaskProfile:
        item = ProfileItem(question, question, 1, "chat", LIMIT)
        return self._profiler.profile([item])[0]

    def _outcome(self, decision: Decision, answer: RecordedAnswer) -> Outcome:
        return Outcome(
            decision.id,
            ttft_s=answer.ttft_s,
            latency_s=answer.latency_s,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            cost_usd=self.cost_usd(answer),
            finish_reason="length" if answer.output_tokens >= LIMIT else "stop",
            streamed=True,
        )

    def cost_usd(self, answer: RecordedAnswer) -> float:
        """Cost of an answer at the prices of the settings."""
        arm = self._arm[answer.model]
        return (
            answer.prompt_tokens * arm.prompt_price_usd
            + answer.output_tokens * arm.output_price_usd
        )

    def _frame(self, strategy: str, answers: Sequence[RecordedAnswer]) -> pd.DataFrame:
        rows = []
        for number, answer in enumerate(answers):
            score = float(answer.right)
            cost_usd = self.cost_usd(answer)
            rows.append(
                {
                    "strategy": strategy,
                    "number": number,
                    "third": 1 + 3 * number // len(answers),
                    "kind": answer.kind,
                    "model": answer.model,
                    "score": score,
                    "utility": self.objective.utility(
                        score, answer.latency_s, cost_usd
                    ),
                    "latency_s": answer.latency_s,
                    "cost_usd": cost_usd,
                }
            )
        return pd.DataFrame(rows)


class _Router:
    """The router's policy, which learns, and the ingress's snapshot of it, which decides."""

    def __init__(self, settings: GatewaySettings, arms: Sequence[Arm]):
        kind = settings.policy
        self._policy = make_policy(kind.name, arms, kind.options)
        self.snapshot = make_policy(kind.name, arms, kind.options)
        self.scoring_rate = 1.0
        self._rates = ScoringRates()
        self._records = DecisionRecords(
            history=History(keeps_unknown=True), projection=self._rates
        )
        self._waiting: list[tuple[float, Event]] = []
        self._decisions = 0
        self._taken_s = 0.0
        self._take_snapshot()

    def send(self, at_s: float, event: Event) -> None:
        """Let the router take an event in at this time."""
        self._waiting.append((at_s, event))

    def refresh(self, now_s: float, every_s: float) -> None:
        """Take a snapshot if one is due; it has the events up to its own time."""
        due_s = now_s if every_s <= 0 else now_s // every_s * every_s
        if due_s <= self._taken_s:
            return
        self._taken_s = due_s
        later = []
        for at_s, event in sorted(self._waiting, key=lambda item: item[0]):
            if at_s > due_s:
                later.append((at_s, event))
                continue
            self._decisions += isinstance(event, Decision)
            self._records.apply(event, self._policy)
            self._policy.advance(self._decisions, self._records.scored)
        self._waiting = later
        self._take_snapshot()

    def _take_snapshot(self) -> None:
        self.snapshot.restore(self._policy.state())
        self.scoring_rate = self._rates.rates().get("", 1.0)


def _next_tick(now_s: float, every_s: float) -> float:
    """The next time that is a multiple of a pause."""
    return now_s if every_s <= 0 else ceil(now_s / every_s) * every_s
