"""The first day with real traffic: a policy takes over from the team's own rule in stages, each behind a gate.

    stage     who decides                                     the gate to the next stage asks for
    observe   the rule; the policy's choices are recorded     enough scores, and an expected loss of at most margin
    1 %       a coin gives 1 % of the requests to the policy  a measured loss of at most margin / 0.10
    10 %      a coin gives 10 % to the policy                 a measured loss of at most margin / 1.00
    100 %     the policy; the rule keeps a share as control   the end of the regression watch
    done      the policy alone

The margin is the loss per request, over all traffic, that the next stage may cost. So the policy may lose more on its
own requests while it has few of them. The measured loss is the lower bound of comparison.py, on the requests of the
present stage. In the stages of 1 and 10 % a regression test (regression_watch.py) runs on the requests for which the
two choose differently; if the policy earns less there, the rule decides again.

While it observes, the policy can be judged by its own estimates only, because the log has no choice but the rule's. A
policy that explores expects a small loss from that, so its expected gain may be below zero by the margin.
"""

from collections import deque
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isnan
from typing import Any

import msgspec

from policies.coverage import is_unflawed
from policies.evaluation.replay import utility
from policies.events import Decision, Event, Outcome, Record
from policies.rollout.comparison import Cell, Difference, RandomisedComparison
from policies.rollout.observation import (
    ExpectedDifference,
    Observation,
    leaves_choice,
)
from policies.rollout.regression_watch import RegressionTest
from policies.rollout.roles import CHALLENGER, CHAMPION, SHADOW

# values of Decision.fallback for decisions that the policies with a role made, and not a client or a fallback
RANDOMISED = ("", "profiler")
UTILITY_BOUNDS = (-1.0, 1.0)  # of policies.evaluation.replay.utility
MAX_SEEN = 1000  # latest decisions whose reward was counted; a corrected score does not count again


class Stage(StrEnum):
    """The stages, in their order."""

    OBSERVE = "observe"
    ONE = "1 %"
    TEN = "10 %"
    ALL = "100 %"
    DONE = "done"

    @property
    def share(self) -> float:
        """The policy's share of the traffic; at 100 % the rule keeps a part of it during the regression watch."""
        return {Stage.OBSERVE: 0.0, Stage.ONE: 0.01, Stage.TEN: 0.1}.get(self, 1.0)

    @property
    def next(self) -> "Stage":
        """The stage after this one."""
        stages = list(Stage)
        return stages[min(stages.index(self) + 1, len(stages) - 1)]

    @property
    def roles(self) -> tuple[str, str] | None:
        """The roles of the rule and of the policy; None once the rule has none."""
        if self is Stage.DONE:
            return None
        if self is Stage.ALL:
            return CHALLENGER, CHAMPION
        return CHAMPION, SHADOW if self is Stage.OBSERVE else CHALLENGER


@dataclass(frozen=True)
class GateSettings:
    """What the gate asks for; see deployments/settings.py, RolloutSettings.

    scores: answers with a score that the policy must have learned from before it gets traffic.
    margin: loss per request, over all traffic, that the next stage may cost, in units of the reward; and the loss that
        the policy may expect of itself before it gets any traffic.
    rewards: rewards of the policy and of the rule, where they differ, before a measured difference counts.
    level: confidence level of the measured difference.
    repeated: whether its interval must hold for any number of looks.
    watch_margin, watch_alpha: of the regression test.
    """

    scores: int
    margin: float
    rewards: int
    level: float
    repeated: bool
    watch_margin: float
    watch_alpha: float


@dataclass(frozen=True)
class Verdict:
    """Whether the next stage may begin, and what it waits for, in words."""

    passed: bool
    reason: str


class FirstDayState(msgspec.Struct, kw_only=True):
    """The stages as a snapshot stores them; see FirstDay for the meaning.

    `guard` is the state of the regression test with its margin and its alpha.
    """

    stage: Stage
    since: float
    held: str
    observation: Observation
    requests: int
    differed: int
    cells: list[Cell]
    seen: list[str]
    guard: dict[str, Any]
    guard_margin: float
    guard_alpha: float


@dataclass(frozen=True)
class FirstDaySummary:
    """The first day, for operators.

    stage: one of Stage. rule, policy: names of the two policies.
    since_s: start of the stage, in seconds since the epoch.
    requests, agreement: requests that left a choice, and the share of them for which both choose the same arm.
    chosen, by_rule: by arm, how often the policy and the rule chose it.
    scored: by arm, the number of answers with a score from which the policy has learned.
    expected: what the policy expects to change per request, by its own estimates.
    measured: what the requests of this stage show, by randomisation; None while observing, and after 100 %.
    next_stage: "" at the end. next_waits_for: what it waits for; `passed` says whether the gate would let it begin.
    held: why no stage begins by itself; "" if nothing prevents it.
    """

    stage: str
    rule: str
    policy: str
    since_s: float
    requests: int
    agreement: float | None
    chosen: Mapping[str, int]
    by_rule: Mapping[str, int]
    scored: Mapping[str, int]
    expected: ExpectedDifference
    measured: Difference | None
    next_stage: str
    passed: bool
    next_waits_for: str
    held: str

    def metrics(self) -> dict[str, float]:
        """The known figures by name; an unknown one is left out."""
        figures = {
            "requests": self.requests,
            "agreement": self.agreement,
            "scores": sum(self.scored.values()),
            "expected/requests": self.expected.requests,
            "expected/score": self.expected.score,
            "expected/latency_s": self.expected.latency_s,
            "expected/cost_usd": self.expected.cost_usd,
            "expected/utility": self.expected.utility,
        }
        if self.measured is not None:
            figures["measured/requests"] = self.measured.requests
            figures["measured/utility"] = self.measured.value
            figures["measured/lower"] = self.measured.lower
            figures["measured/upper"] = self.measured.upper
        return {
            f"first_day/{name}": float(value)
            for name, value in figures.items()
            if value is not None
        }

    def plain(self) -> dict[str, object]:
        """Plain data, which says of the expected and of the measured figures what they are."""
        plain = asdict(self)
        plain["expected"]["basis"] = "estimates of the policy itself"
        if self.measured is not None:
            plain["measured"]["basis"] = "requests that a coin gave to one of the two"
        return plain


class FirstDay:
    """The present stage, and what is known in it.

    Attributes:
        stage: the present stage.
        since_s: its start, in seconds since the epoch.
        held: why no stage begins by itself, after the policy was taken back; "" otherwise.
        observation: the choices of the policy and of the rule, since the policy last began to observe.
        comparison: the rewards of the present stage.
    """

    def __init__(self, settings: GateSettings, since_s: float):
        self.settings = settings
        self.held = ""
        self.observation = Observation()
        self._seen: deque[str] = deque(maxlen=MAX_SEEN)
        self.enter(Stage.OBSERVE, since_s)

    def enter(self, stage: Stage, since_s: float, held: str = "") -> None:
        """Begin a stage. A comparison never spans two stages, because their shares differ.

        Args:
            stage: the stage.
            since_s: the present time, in seconds since the epoch.
            held: see the attributes.
        """
        self.stage = stage
        self.since_s = since_s
        self.held = held
        self.comparison = RandomisedComparison()
        self._guard = RegressionTest(
            margin=self.settings.watch_margin,
            alpha=self.settings.watch_alpha,
            bounds=UTILITY_BOUNDS,
        )
        if stage is Stage.OBSERVE:
            self.observation = Observation(scored=self.observation.scored)

    @property
    def randomised(self) -> bool:
        """Whether a coin decides between rule and policy, and no promotion is watched yet."""
        return self.stage in (Stage.ONE, Stage.TEN)

    def record(self, event: Event, record: Record, flaw_sampled: bool = True) -> str:
        """Take in an event.

        Args:
            event: a decision, an outcome or a score.
            record: the record that it changed.
            flaw_sampled: for a flawed answer, whether it belongs to the sample of flaws that has the rate of scores;
                the regression test has no other flaws.

        Returns:
            Why the rule must decide again; "" if it need not.
        """
        decision = record.decision
        counts = decision.fallback in RANDOMISED and leaves_choice(decision)
        current = counts and decision.time_s >= self.since_s
        differs = decision.rule != decision.shadow
        if isinstance(event, Decision):
            if counts:
                self.observation.add(decision)
            if current:
                self.comparison.add_request(differs)
            return ""
        finished = is_unflawed(record) or record.flaw != ""
        measured = current and differs and finished and self.randomised
        tried = decision.arm == decision.shadow
        if measured and isinstance(event, Outcome):
            self.comparison.add_answer(record, tried)
        reward = utility(record)
        if isnan(reward) or not finished or decision.id in self._seen:
            return ""
        self._seen.append(decision.id)
        if record.vote is not None:
            self.observation.add_score(decision.arm)
        if not measured:
            return ""
        self.comparison.add_reward(record, tried, reward)
        if record.flaw and not flaw_sampled:
            return ""
        if self._guard.observe(reward, predecessor=not tried):
            return str(self._guard.report()["reason"])
        return ""

    # --- the gate -----------------------------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        """Whether the next stage may begin."""
        if self.stage is Stage.OBSERVE:
            return self._observed()
        if self.randomised:
            return self._measured()
        if self.stage is Stage.ALL:
            return Verdict(False, "the end of the regression watch")
        return Verdict(False, "")

    def _observed(self) -> Verdict:
        seen = self.observation.scores
        wanted = self.settings.scores
        if seen < wanted:
            return Verdict(
                False,
                f"{wanted - seen} more answers with a score ({seen} of {wanted})",
            )
        expected = self.observation.expected()
        if expected.utility is None:
            return Verdict(False, "requests that leave a choice between two arms")
        found = (
            f"by its own estimates the policy changes utility by {expected.utility:+.4f} a request "
            f"({expected.requests} requests)"
        )
        if expected.utility < -self.settings.margin:
            allowed = f"an expected loss of at most {self.settings.margin:g}"
            return Verdict(False, f"{allowed}: {found}")
        return Verdict(True, found)

    def _measured(self) -> Verdict:
        after = self.stage.next
        allowed = self.settings.margin / after.share
        found = self.measured()
        text = (
            f"the policy's utility is between {found.lower:+.4f} and {found.upper:+.4f} beside the rule's, and may be "
            f"{allowed:g} lower ({found.rewards} and {found.rule_rewards} rewards where they choose differently, in "
            f"{found.requests} requests)"
        )
        # Whatever the rewards: the two may differ so rarely that the policy cannot lose as much.
        acted = found.requests * self.stage.share
        if acted >= self.settings.rewards and found.most < allowed:
            return Verdict(True, f"their choices hardly differ: {text}")
        missing = self.settings.rewards - min(found.rewards, found.rule_rewards)
        if missing > 0:
            wanted = f"{missing} more rewards where policy and rule differ"
            return Verdict(False, f"{wanted}: {text}")
        if found.lower <= -allowed:
            return Verdict(False, f"a better or a narrower difference: {text}")
        return Verdict(True, text)

    def measured(self) -> Difference:
        """The measured difference in the present stage."""
        settings = self.settings
        return self.comparison.difference(settings.level, settings.repeated)

    def summary(self, rule: str, policy: str) -> FirstDaySummary:
        """The summary for operators, with the names of the two policies."""
        verdict = self.verdict()
        seen = self.observation
        return FirstDaySummary(
            stage=self.stage.value,
            rule=rule,
            policy=policy,
            since_s=self.since_s,
            requests=seen.requests,
            agreement=seen.agreement,
            chosen=dict(seen.chosen),
            by_rule=dict(seen.by_rule),
            scored=dict(seen.scored),
            expected=seen.expected(),
            measured=self.measured() if self.randomised else None,
            next_stage="" if self.stage is Stage.DONE else self.stage.next.value,
            passed=verdict.passed,
            next_waits_for=verdict.reason,
            held=self.held,
        )

    # --- snapshots ----------------------------------------------------------------------------------------------

    def state(self) -> FirstDayState:
        """Everything but the settings, for `restore`."""
        return FirstDayState(
            stage=self.stage,
            since=self.since_s,
            held=self.held,
            observation=self.observation,
            requests=self.comparison.requests,
            differed=self.comparison.differed,
            cells=self.comparison.state(),
            seen=list(self._seen),
            guard=self._guard.state(),
            guard_margin=self._guard.margin,
            guard_alpha=self._guard.alpha,
        )

    def forget_decisions(self, gone: Container[str]) -> None:
        """Remove these decisions; their rewards stay counted."""
        seen = [name for name in self._seen if name not in gone]
        self._seen = deque(seen, maxlen=MAX_SEEN)

    def restore(self, state: FirstDayState) -> None:
        """Continue from the state of another first day; the regression test keeps its margin and its alpha."""
        self.stage = state.stage
        self.since_s = state.since
        self.held = state.held
        self.observation = state.observation
        self.comparison.restore(state.requests, state.differed, state.cells)
        self._seen = deque(state.seen, maxlen=MAX_SEEN)
        self._guard = RegressionTest(
            margin=state.guard_margin,
            alpha=state.guard_alpha,
            bounds=UTILITY_BOUNDS,
        )
        self._guard.restore(state.guard)
