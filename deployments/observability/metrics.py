"""Ray metrics of the router and the tracker, which Prometheus has as `ray_router_...`.

deploy/prometheus has the alerts on these metrics, deploy/grafana the dashboard.
"""

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from policies.demand import Demand
from policies.evaluation.kind_figures import Counts, FigureTable, is_routed
from policies.events import (
    ACCEPTED,
    BACKGROUND,
    PENDING,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
    is_derived,
)
from policies.types import ModelState

# upper bounds of the histograms' buckets
SECONDS = [
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1,
    2,
    5,
    10,
    30,
    60,
    120,
    300,
]


# sources of feedback with a label of their own
SOURCES = ("user", "program", "judge", "calibration")
NUMBERS = ("answers", "votes")  # gauges by kind that are 0 without decisions
# further tags of gauges by kind
QUANTILES = {
    "latency_p50_s": {"quantile": "0.5"},
    "latency_p95_s": {"quantile": "0.95"},
}
CORRECTED = "corrected"  # status of a score that replaces the earlier one of its source
UNKNOWN = float("nan")  # of a gauge that had a value before


class Telemetry:
    """The router's metrics, with one method for each kind of event."""

    def __init__(self) -> None:
        self._decisions = Counter(
            "router_decisions", "Decisions by arm and fallback.", ("arm", "fallback")
        )
        self._decide = Histogram(
            "router_decide_seconds", "Time to decide a batch.", SECONDS
        )
        self._outcomes = Counter(
            "router_outcomes",
            "Answers, by how they ended.",
            ("arm", "status", "fallback"),
        )
        self._latency = Histogram(
            "router_latency_seconds", "Decision to last token.", SECONDS, ("arm",)
        )
        self._ttft = Histogram(
            "router_ttft_seconds", "Decision to first token.", SECONDS, ("arm",)
        )
        self._tokens = Counter(
            "router_tokens", "Tokens, of kind prompt or output.", ("arm", "kind")
        )
        self._cost = Counter("router_cost_usd", "What the answers cost.", ("arm",))
        self._feedback = Counter(
            "router_feedback",
            "Scores by source and what became of them; counted when they take effect or are refused.",
            ("source", "status"),
        )
        self._pending = Gauge(
            "router_feedback_pending", "Scores that wait for their decision."
        )
        self._scored = Counter(
            "router_scored_decisions", "Decisions that got their first score.", ("arm",)
        )
        self._share = Gauge(
            "router_share", "Share of the latest routed requests.", ("arm",)
        )
        self._quality = Gauge(
            "router_quality", "Expected score of the latest routed requests.", ("arm",)
        )
        self._in_flight = Gauge(
            "router_in_flight", "Requests being answered now.", ("arm",)
        )
        self._replicas = Gauge("router_replicas", "Ready replicas.", ("arm",))
        self._target_replicas = Gauge(
            "router_target_replicas",
            "Replicas that the model should have now; 0 if it is scaled to zero.",
            ("arm",),
        )
        self._price = Gauge(
            "router_scarcity_price",
            "Score points that a request pays for a thousand tokens of work at a scarce arm.",
            ("arm",),
        )
        self._demand = Gauge(
            "router_demand",
            "Requests that would be in flight beyond those that are, were the model warm and idle.",
            ("arm",),
        )
        self._lost = Gauge(
            "router_lost_utility",
            "Score points a minute that are lost because the model is cold or full.",
            ("arm",),
        )
        self._saved = Gauge(
            "router_saved_utility",
            "Score points a minute that would be lost without the model's last replica.",
            ("arm",),
        )
        self._balance = Gauge(
            "router_demand_balance",
            "Score points that the model's last replica has saved or would have saved, less its price.",
            ("arm",),
        )
        self._start = Gauge(
            "router_start_seconds",
            "From the wish for a first replica to its first token.",
            ("arm",),
        )
        self._score = Gauge(
            "router_score", "Mean score of its latest unflawed answers.", ("arm",)
        )
        self._kinds = KindGauges()
        self._routing = RoutingTelemetry()
        self._last_check = Gauge(
            "router_watch_timestamp_seconds",
            "When the router last looked after itself.",
        )
        self._waiting = Gauge(
            "router_journal_waiting_rows",
            "Rows of the journal that are not on disk yet.",
        )
        self._unrecorded = Counter(
            "router_decisions_unrecorded",
            "Decisions that the journal had no room for; an answer brings its decision again.",
        )
        self._version = Gauge(
            "router_policy_version", "The latest published version.", ("policy",)
        )
        self._row = Gauge(
            "router_journal_row",
            "The journal's last row that the gauges of this moment contain.",
        )
        self._keys = Gauge(
            "router_suspended_keys",
            "API keys whose scores do not count now: quarantined, or in doubt.",
            ("state",),
        )

    def decided(
        self, decisions: Sequence[Decision], seconds: float | None = None
    ) -> None:
        """Record a batch of decisions; `seconds` is the time it took, None if an ingress decided."""
        if seconds is not None:
            self._decide.observe(max(seconds, 1e-9))
        counts = Tally((d.arm or "none", d.fallback or "none") for d in decisions)
        for (arm, fallback), count in counts.items():
            self._decisions.inc(count, {"arm": arm, "fallback": fallback})

    def unrecorded(self, count: int) -> None:
        """Record decisions that the full journal did not take."""
        if count:
            self._unrecorded.inc(count)

    def observed(self, ended: Sequence[tuple[Decision, Outcome]]) -> None:
        """Record finished answers. The fallbacks that an ingress took without the router are counted only here.

        Each counter is increased once for all answers, as one call costs as much as learning from an answer.
        """
        outcomes = Tally[tuple[str, str, str]]()
        tokens = Tally[tuple[str, str]]()
        costs: defaultdict[str, float] = defaultdict(float)
        for decision, outcome in ended:
            arm = decision.arm
            outcomes[arm, outcome.status, decision.fallback or "none"] += 1
            tokens[arm, "prompt"] += outcome.prompt_tokens
            tokens[arm, "output"] += outcome.output_tokens
            costs[arm] += outcome.cost_usd
            # background answers wait for idle capacity, and clients never see their latency
            if outcome.status == "ok" and decision.fallback not in BACKGROUND:
                self._latency.observe(max(outcome.latency_s, 1e-9), {"arm": arm})
                if outcome.ttft_s > 0:
                    self._ttft.observe(outcome.ttft_s, {"arm": arm})
        for (arm, status, fallback), count in outcomes.items():
            self._outcomes.inc(
                count, {"arm": arm, "status": status, "fallback": fallback}
            )
        for (arm, kind), count in tokens.items():
            if count > 0:
                self._tokens.inc(count, {"arm": arm, "kind": kind})
        for arm, cost in costs.items():
            if cost > 0:
                self._cost.inc(cost, {"arm": arm})

    def scored(self, source: str, status: str) -> None:
        """Record one item of feedback that had no effect.

        Scores that take effect are counted by `score_counted`, because one that waits for its decision does so later.
        """
        if status not in (ACCEPTED, PENDING):
            self._feedback.inc(1, {"source": _label(source), "status": status})

    def score_counted(self, event: Feedback, record: Record) -> None:
        """Record a score that has just changed this decision record."""
        if is_derived(event.source, event.owner):
            return
        first = record.is_first_of_source(event)
        status = ACCEPTED if first else CORRECTED
        self._feedback.inc(1, {"source": _label(event.source), "status": status})
        if first and len(record.given_scores()) == 1:
            self._scored.inc(1, {"arm": record.decision.arm})

    def routed(self, event: Event, record: Record) -> None:
        """Count what an event that changed this decision record says about routing; `live` exports it."""
        self._routing.add(event, record)

    def roles(self, versions: Mapping[str, tuple[int, float]]) -> None:
        """Record the number of the version with each role, and its share of the traffic."""
        self._routing.set_roles(versions)

    def configured(self, time_s: float) -> None:
        """Record that the settings changed at this time."""
        self._routing.changed_s = time_s

    def suspended(self, quarantined: int, in_doubt: int) -> None:
        """Record the number of keys whose scores do not count."""
        self._keys.set(quarantined, {"state": "quarantined"})
        self._keys.set(in_doubt, {"state": "in_doubt"})

    def live(
        self,
        states: Mapping[str, ModelState],
        shares: Mapping[str, float | None],
        quality: Mapping[str, float | None],
        figures: FigureTable,
        routed: Mapping[str, float],
        variants: Collection[str] = (),
    ) -> None:
        """Record the current state of all arms. A gauge without a value is not set.

        Args:
            states: of each arm.
            shares: of each arm, of the latest routed decisions.
            quality: expected of each arm.
            figures: of the latest decisions.
            routed: metrics of the latest routed decisions (recent_metrics.py).
            variants: the arms whose load, replicas and price are those of another arm.
        """
        for arm, state in states.items():
            tags = {"arm": arm}
            if arm not in variants:
                self._in_flight.set(state.in_flight, tags)
                self._replicas.set(state.replicas, tags)
                self._target_replicas.set(state.target_replicas, tags)
                self._price.set(state.price, tags)
            self._share.set(shares.get(arm), tags)
            self._quality.set(quality.get(arm), tags)
            known = figures.arms.get(arm)
            self._score.set(known.score if known else None, tags)
        self._kinds.set(figures, states)
        self._routing.set(routed)

    def demand(self, demands: Mapping[str, Demand]) -> None:
        """Record the demand that the autoscaler does not see, by arm."""
        for arm, demand in demands.items():
            self._demand.set(demand.requests, {"arm": arm})
            self._lost.set(demand.loss, {"arm": arm})
            saved = UNKNOWN if demand.saved is None else demand.saved
            self._saved.set(saved, {"arm": arm})
            balance = UNKNOWN if demand.balance is None else demand.balance
            self._balance.set(balance, {"arm": arm})
            if demand.start_s:
                self._start.set(demand.start_s, {"arm": arm})

    def record_check(
        self,
        now_s: float,
        waiting_rows: int,
        policy: str,
        version: int,
        pending_scores: int = 0,
        row: int = 0,
    ) -> None:
        """Record a periodic self-check of the router.

        Args:
            now_s: seconds since the epoch.
            waiting_rows: rows of the journal that are not on disk yet.
            pending_scores: scores that wait for their decision.
            row: number of the journal's last row.
            policy: name of the champion's policy.
            version: its published version; 0 if it has none.
        """
        self._last_check.set(now_s)
        self._waiting.set(waiting_rows)
        self._version.set(version, {"policy": policy})
        self._pending.set(pending_scores)
        self._row.set(row)


class RoutingTelemetry:
    """Whether routing pays: reward, regret and estimated saving of the routed decisions, and who decides them.

    Attributes:
        changed_s: when the settings last changed, in seconds since the epoch; None if they have not since the start.
    """

    def __init__(self) -> None:
        self._tally = Counts()  # not exported yet
        self._counters = {
            "regret": Counter(
                "router_regret",
                "Utility that the routed decisions gave up, as the policy itself estimated it.",
            ),
            "cost_usd": Counter(
                "router_routed_cost_usd", "What the routed answers cost."
            ),
            "dearest_cost_usd": Counter(
                "router_estimated_dearest_cost_usd",
                "Estimate of what the routed answers would have cost with the dearest size that could answer.",
            ),
        }
        self._gauges = {
            "reward": Gauge(
                "router_reward",
                "Mean score of the latest routed answers less what their latency and cost are worth.",
            ),
            "votes": Gauge("router_reward_votes", "Scored answers behind the reward."),
            "regret": Gauge(
                "router_mean_regret",
                "Estimated regret of the latest routed decisions, per decision.",
            ),
            "estimated_saving": Gauge(
                "router_estimated_saving",
                "Estimated share of the dearest size's cost that the latest routed decisions saved.",
            ),
        }
        self._set: set[str] = set()  # gauges that have had a value
        self._role_version = Gauge(
            "router_role_version", "The policy version that has a role.", ("role",)
        )
        self._role_share = Gauge(
            "router_role_share", "Share of the traffic that a role decides.", ("role",)
        )
        self._roles: set[str] = set()
        self.changed_s: float | None = None
        self._changed = Gauge(
            "router_settings_timestamp_seconds", "When the settings last changed."
        )

    def add(self, event: Event, record: Record) -> None:
        """Count an event of a routed decision."""
        if is_routed(record.decision):
            self._tally.add(event, record)

    def set(self, routed: Mapping[str, float]) -> None:
        """Export what was counted since the last call, and the metrics of the latest routed decisions."""
        for name, counter in self._counters.items():
            value = getattr(self._tally, name)
            if value > 0:
                counter.inc(value)
        self._tally = Counts()
        # again and again: Ray does not export a gauge that was set before its agent was ready
        self._changed.set(self.changed_s)
        self._set |= self._gauges.keys() & routed.keys()
        for name in self._set:
            self._gauges[name].set(routed.get(name, UNKNOWN))

    def set_roles(self, versions: Mapping[str, tuple[int, float]]) -> None:
        """Export the version and the share of each role; one that no version has any more is NaN, with the share 0."""
        self._roles |= versions.keys()
        for role in self._roles:
            version, share = versions.get(role, (UNKNOWN, 0.0))
            self._role_version.set(version, {"role": role})
            self._role_share.set(share, {"role": role})


class KindGauges:
    """The figures of each arm by kind of work. The labels are bounded: the kinds are a fixed list."""

    def __init__(self) -> None:
        cell = ("arm", "kind")
        latency = Gauge(
            "router_kind_latency_seconds",
            "Quantiles of whole answers.",
            (*cell, "quantile"),
        )
        self._gauges = {
            "answers": Gauge(
                "router_kind_answers", "Answers among the latest decisions.", cell
            ),
            "availability": Gauge(
                "router_kind_availability", "Share without a visible flaw.", cell
            ),
            "votes": Gauge(
                "router_kind_votes", "Scored answers without a visible flaw.", cell
            ),
            "score": Gauge("router_kind_score", "Their mean score.", cell),
            "score_low": Gauge(
                "router_kind_score_low", "Lower end of its 95 % interval.", cell
            ),
            "score_high": Gauge(
                "router_kind_score_high", "Upper end of its 95 % interval.", cell
            ),
            "latency_p50_s": latency,
            "latency_p95_s": latency,
            "tokens_per_s": Gauge(
                "router_kind_tokens_per_second", "Output tokens of one answer.", cell
            ),
        }
        self._set: set[tuple[str, str, str]] = set()  # gauges that have had a value

    def set(self, figures: FigureTable, arms: Collection[str]) -> None:
        """Set the gauges of these arms; one that had a value which is unknown now becomes NaN."""
        values: dict[tuple[str, str, str], float] = {}
        for arm in arms:
            for kind, known in figures.kinds.get(arm, {}).items():
                for name in self._gauges:
                    value = getattr(known, name)
                    if value is not None:
                        values[name, arm, kind] = float(value)
        self._set |= values.keys()
        for cell in self._set:
            name, arm, kind = cell
            value = values.get(cell, 0.0 if name in NUMBERS else UNKNOWN)
            tags = {"arm": arm, "kind": kind} | QUANTILES.get(name, {})
            self._gauges[name].set(value, tags)


def _label(source: str) -> str:
    """Label of a source; clients choose the names of sources, so only a few have one of their own."""
    return source if source in SOURCES else "other"


class PairTelemetry:
    """An ingress's metrics of second answers in the background (judging/pairs.py)."""

    def __init__(self) -> None:
        self._pairs = Counter(
            "router_pairs",
            "Requests that were picked for a second answer, by what became of it.",
            ("result",),
        )

    def count(self, result: str) -> None:
        """Count one; `result` is one of a fixed list."""
        self._pairs.inc(1, {"result": result})


class TrackerTelemetry:
    """The tracker's metrics: successful and failed exports to MLflow."""

    def __init__(self) -> None:
        self._failures = Counter(
            "router_mlflow_failures", "Turns that did not get through to MLflow."
        )
        self._success = Gauge(
            "router_mlflow_success_timestamp_seconds", "When a turn last got through."
        )
        self._behind = Gauge(
            "router_mlflow_lag_rows", "Rows of the journal that MLflow does not have."
        )

    def record_export(self, now_s: float, success: bool) -> None:
        """Record an attempt to export to MLflow; `now_s` is in seconds since the epoch."""
        if success:
            self._success.set(now_s)
        else:
            self._failures.inc()

    def record_lag(self, rows: int) -> None:
        """Record how many rows of the journal are not exported."""
        self._behind.set(rows)
