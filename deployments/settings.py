"""The typed arguments of serve_config.yaml. Unknown keys are errors.

`GatewaySettings` are the application's `args`: a change restarts the gateway, but not the models. `Tuning` is the
ingress's `user_config`: a change takes effect at the next request and restarts nothing.
"""

import re
from difflib import get_close_matches
from typing import Literal, get_args
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from deployments.model_settings import (
    CapabilitySettings,
    ModelSettings,
    StrictModel,
    VariantSettings,
)
from policies.registry import RULES, make_policy
from policies.types import Arm, Objective

ORIGIN = re.compile(r"https?://[a-z0-9.\[\]:-]+")
SECRET_PARAMETERS = ("password", "sslpassword")  # of a PostgreSQL URL
# what clients send as `model` and get in a header: visible ASCII without commas, quotes and white space
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
AUTO = "auto"  # the router's own name; its presets are auto:NAME
# keys that release 0.1.0 knew under another name, each with its section: the name now (CHANGELOG.md, "Renamed")
RENAMED = {
    ("", "journal_keep_days"): "journal_retention_days",
    ("", "publish_every_s"): "publish_interval_s",
    ("", "trace_share"): "trace_sample_rate",
    ("models", "inherit"): "inherited_events",
    ("rollout", "share"): "challenger_share",
    ("rollout", "level"): "confidence_level",
    ("rollout", "repeated"): "anytime_valid",
    ("", "profile_here_chars"): "local_profile_max_chars",
    ("", "decide_here_s"): "snapshot_max_age_s",
    ("", "hedge_after"): "hedge_after_fraction",
    ("admission", "running"): "max_running",
    ("admission", "waiting"): "max_queued",
    ("admission", "wait_s"): "max_queue_wait_s",
    ("admission", "requests"): "max_in_flight",
    ("breaker", "failures"): "failure_threshold",
    ("breaker", "open_s"): "cooldown_s",
    ("breaker", "max_open_s"): "max_cooldown_s",
    ("judge", "share"): "sample_rate",
    ("judge", "waiting"): "max_queued",
}


class ProfilerSettings(StrictModel):
    """How texts are profiled.

    embedder: folder of a model2vec model.
    classifier: folder of the classifier that reads what a text asks for (`make train-classifier`).
    tokenizer: a tokenizer.json or a hub name, to count prompt tokens. Default: they are estimated.
    """

    embedder: str = "assets/embedder"
    classifier: str = "assets/classifier"
    tokenizer: str | None = None


class PolicySettings(StrictModel):
    """The policy that decides.

    name: one of policies/registry.py.
    options: parameters of that policy.
    """

    name: str = "thompson"
    options: dict[str, object] = Field({})


class KeySettings(StrictModel):
    """API keys (deployments/access/api_keys.py), and the limits of a key that has none of its own.

    file: holds the hashes of the keys; the same on every node that runs an ingress.
    requests_per_minute, concurrency: of one key, at one ingress replica.
    scores_per_minute: of one key, accepted as feedback; this bounds its influence on what is learned.
    cross_check: quarantine keys whose scores contradict those of all others (policies/feedback/reputation.py). Trusted
        keys are never quarantined.
    """

    file: str = "var/keys.json"
    requests_per_minute: int = Field(600, ge=1)
    concurrency: int = Field(64, ge=1)
    scores_per_minute: int = Field(60, ge=1)
    cross_check: bool = True


class RuleSettings(StrictModel):
    """The team's own rule, which decides until the policy has proved itself.

    policy: a policy of policies/registry.py that does not learn.
    options: parameters of that policy, as {arm: large} of `always`.
    """

    policy: Literal["static", "always", "uniform"] = "static"
    options: dict[str, object] = Field({})


class RolloutSettings(StrictModel):
    """How policy versions are tried, promoted and rolled back.

    See deployments/router/rollout.py, policies/rollout/promotion_gate.py and policies/rollout/first_day.py.

    start: "policy" gives all traffic to the policy at once. "observe" gives it to the `rule`, and records for each
        request what the policy would have done; then the policy gets 1, 10 and 100 % of the traffic, stage by stage.
    rule: decides until the policy has proved itself. Default: the static rules.
    advance: "operator" begins a stage when an operator asks for it, "auto" as soon as the gate lets it begin.
    first_scores: number of answers with a score that the policy must have learned from before it gets 1 %.
    first_margin: utility per request, over all traffic, that the next stage may cost; so with 10 % of the traffic the
        policy may be ten times as much worse than the rule.
    first_rewards: number of rewards of the policy, and of the rule, on requests that they decide differently, before a
        measured difference counts.

    challenger_share: share of the traffic that a challenger gets.
    margin: by how much a challenger must beat the champion, in points of utility.
    confidence_level: of that comparison.
    anytime_valid: use a confidence sequence. It is valid however often promotion is tried, but needs more decisions.
    watch_share: share of the traffic that the predecessor of a promoted version keeps while the version is watched.
    watch_margin: by how much the promoted version may be worse than its predecessor.
    watch_alpha: probability of a false rollback, over the whole watch.
    watch_rewards: number of rewards after which the watch ends.
    """

    start: Literal["policy", "observe"] = "policy"
    rule: RuleSettings | None = None
    advance: Literal["operator", "auto"] = "operator"
    first_scores: int = Field(200, ge=0)
    first_margin: float = Field(0.02, gt=0)
    first_rewards: int = Field(30, ge=2)
    challenger_share: float = Field(0.1, ge=0, le=1)
    margin: float = Field(0.0, ge=0)
    confidence_level: float = Field(0.95, gt=0, lt=1)
    anytime_valid: bool = False
    watch_share: float = Field(0.2, gt=0, lt=1)
    watch_margin: float = Field(0.02, ge=0)
    watch_alpha: float = Field(0.05, gt=0, lt=1)
    watch_rewards: int = Field(10_000, ge=1)

    @model_validator(mode="after")
    def _check_start(self) -> "RolloutSettings":
        # Not model_fields_set: the journal stores all fields.
        given = []
        if self.rule is not None:
            given.append("rule")
        if self.advance != "operator":
            given.append("advance")
        if self.start != "observe" and given:
            raise ValueError(
                f"without `start: observe`, {' and '.join(given)} would change nothing; write `start: observe`, or "
                "take it out"
            )
        return self

    @property
    def observed_rule(self) -> RuleSettings | None:
        """The rule that decides at first; None if the policy gets all traffic at once."""
        if self.start != "observe":
            return None
        return self.rule or RuleSettings()


def has_password(url: str) -> bool:
    """Whether a URL holds a password, before its host or among its parameters."""
    try:
        parts = urlsplit(url)
        return bool(parts.password) or any(
            name.lower() in SECRET_PARAMETERS for name, _ in parse_qsl(parts.query)
        )
    except ValueError:  # not a URL, which its user will find out
        return "@" in url


class GatewaySettings(StrictModel):
    """Settings of the gateway, the router and the tracker.

    models: by name, smallest first. A name may be that of a hub, as Qwen/Qwen3-4B.
    retired: names of models that are no longer served and that a model's `parent` names.
    policy: the policy that decides.
    profiler: how texts are profiled.
    journal: URL of a database, sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME, without a password. The database
        also stores these settings.
    journal_retention_days, journal_max_rows: maximum age and number of the journal's rows. A request makes about three
        rows, together 3 kB. What was learned from deleted rows is kept.
    feedback_window_days: feedback for an older decision is refused.
    store_text: write prompts and answers to the journal, not only features and a salted hash.
    mlflow_uri: URL of MLflow, without a password. Default: nothing is exported, and there are no policy versions.
    unsigned_versions: what to do with a policy version in MLflow that this journal has not registered: "refuse" it, or
        "load" it, for example after the journal was lost, or if it is older than the signatures, which came with 0.1.0.
    experiment: name of the experiment in MLflow.
    publish_interval_s: time between two policy versions that are registered in MLflow.
    rollout: how policy versions are tried, promoted and rolled back, and the first day.
    keep_versions: number of the newest policy versions that stay in MLflow. Older ones are removed, except for those
        with an alias, an evaluation report, or a role that was given in the last 30 days. The default is 41 hours or
        more.
    trace_sample_rate: share of the decisions that MLflow shows as traces, with their feedback. MLflow's metrics count
        all.
    max_mean_cost_usd: maximum of the mean cost of a routed request (policies/budget.py). Default: none.
    keys: API keys and their limits. Default: the gateway asks for no API keys, which is allowed on loopback only.
    max_body_bytes: maximum size of a request, with its images, audio and videos.
    media_hosts: hosts from which the engines may fetch images, audio and videos that messages name by URL, as
        media.example.com. Default: none, so that they are data URLs.
    cors_origins: origins of the web pages that may use the gateway from a browser, as https://chat.example.com; "*" for
        all, which needs keys. Default: none.
    """

    models: dict[str, ModelSettings] = Field(min_length=1)
    retired: tuple[str, ...] = ()
    policy: PolicySettings = PolicySettings()
    profiler: ProfilerSettings = ProfilerSettings()
    journal: str = "sqlite:///var/journal.db"
    journal_retention_days: float = Field(90.0, gt=0)
    journal_max_rows: int = Field(3_000_000, ge=10_000)
    feedback_window_days: float = Field(30.0, gt=0)
    store_text: bool = False
    mlflow_uri: str | None = None
    unsigned_versions: Literal["refuse", "load"] = "refuse"
    experiment: str = "adaptive-router"
    publish_interval_s: float = Field(300.0, gt=0)
    keep_versions: int = Field(500, ge=1)
    rollout: RolloutSettings = RolloutSettings()
    trace_sample_rate: float = Field(0.02, ge=0, le=1)
    max_mean_cost_usd: float | None = Field(None, gt=0)
    keys: KeySettings | None = None
    max_body_bytes: int = Field(2**20, ge=1024)
    media_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def arms(self) -> tuple[Arm, ...]:
        """All arms in the order of the file, which is smallest first; each model is followed by its variants."""
        return tuple(
            arm for name, model in self.models.items() for arm in model.arms(name)
        )

    @field_validator("journal", "mlflow_uri")
    @classmethod
    def _check_password(cls, url: str | None) -> str | None:
        """Refuse a password in a URL: the settings are shown in Ray's dashboard, and stored in the journal."""
        if url is not None and has_password(url):
            raise ValueError(
                "holds a password, which Ray's dashboard would show; take it out, and give it in the environment of "
                "every node or in a file: PGPASSWORD or PGPASSFILE for PostgreSQL, MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD for MLflow"
            )
        return url

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"'{origin}' is no origin; write scheme, host and port in small letters and without a path, as "
                    "https://chat.example.com"
                )
        return origins

    @model_validator(mode="after")
    def _check_open_pages(self) -> "GatewaySettings":
        if "*" in self.cors_origins and self.keys is None:
            raise ValueError(
                'cors_origins: without keys, "*" would open the gateway to all web pages; name the origins, or set keys'
            )
        return self

    @model_validator(mode="after")
    def _check_models(self) -> "GatewaySettings":
        taken: dict[str, str] = {}
        for name in self.models:
            self._check_arm(name, f"models.{name!r}", taken)
        for name, model in self.models.items():
            for variant in model.variants:
                self._check_arm(variant, f"models.{name!r}.variants.{variant!r}", taken)
        for name, model in self.models.items():
            where = f"models.{name!r}"
            if model.parent and model.parent not in (*self.models, *self.retired):
                raise ValueError(
                    f"{where}.parent: there is no model '{model.parent}'; choose one of: {', '.join(self.models)}; "
                    "or, if it is no longer served, add it to retired"
                )
            self._check_ancestors(name)
        return self

    def _check_arm(self, name: str, where: str, taken: dict[str, str]) -> None:
        """Refuse a name that no client could send, or that stands for something else; `taken` has where."""
        _check_name(name, where)
        if name.partition(":")[0] == AUTO:
            raise ValueError(
                f"{where}: '{AUTO}' and '{AUTO}:...' are the router's own names; choose another name"
            )
        if name in self.retired:
            raise ValueError(f"{where} is among retired, too; take it out of one")
        if name in taken:
            raise ValueError(
                f"{where}: {taken[name]} has this name, too; choose another name"
            )
        taken[name] = where

    def _check_ancestors(self, name: str) -> None:
        """Refuse a model that descends from itself."""
        line = [name]
        while (parent := self._parent(line[-1])) and parent not in line:
            line.append(parent)
        if parent == name:
            raise ValueError(
                f"models.{name!r}.parent: {' -> '.join([*line, name])} is a circle; a model cannot descend from itself"
            )

    def _parent(self, name: str) -> str:
        return self.models[name].parent if name in self.models else ""

    @model_validator(mode="after")
    def _check_rule(self) -> "GatewaySettings":
        rule = self.rollout.observed_rule
        if rule is None:
            return self
        if self.policy.name in RULES:
            raise ValueError(
                f"rollout.start is observe, but the policy '{self.policy.name}' learns nothing from what it observes; "
                "choose a policy that learns, as thompson, and write the rule under rollout.rule"
            )
        try:
            make_policy(rule.policy, self.arms(), rule.options)
        except ValueError as error:
            raise ValueError(f"rollout.rule: {error}") from None
        return self


def _check_name(name: str, where: str) -> None:
    """Refuse a name that a client could not send, or that would not fit into a header."""
    if NAME.fullmatch(name) is None:
        raise ValueError(
            f"{where}: a name has letters and digits of ASCII and any of . _ : / @ + -, begins with a letter or digit, "
            "and has at most 128 characters, because it is sent in headers; choose another name"
        )


def latest(kept: bytes | None, given: GatewaySettings) -> GatewaySettings:
    """The settings that a journal stored as JSON; the given ones if it stored none, or if they are no longer valid."""
    if kept is None:
        return given
    try:
        return GatewaySettings.model_validate_json(kept).model_copy(
            update={"journal": given.journal}
        )
    except ValidationError:
        return given


def encoded(settings: GatewaySettings) -> bytes:
    """Settings as JSON, as the journal stores them: without its own URL, of which a part may be secret."""
    return settings.model_dump_json(exclude={"journal"}).encode()


class ObjectiveSettings(StrictModel):
    """Weights of latency and cost against the score (policies/types.py, Objective).

    latency_weight: score points that are given up to save a second.
    cost_weight: score points that are given up to save a US dollar.
    """

    latency_weight: float = Field(0.0, ge=0)
    cost_weight: float = Field(0.0, ge=0)

    def objective(self) -> Objective:
        """The objective as policies/ knows it."""
        return Objective(self.latency_weight, self.cost_weight)


class AdmissionSettings(StrictModel):
    """How many requests one ingress replica admits (deployments/dispatch/admission.py). Others get a 429 at once.

    max_running: requests sent to a replica of a model at once. Times the number of ingress replicas, it must be above
        the model's target_ongoing_requests, or Serve never adds a replica. It must not be above max_ongoing_requests
        and max_num_seqs, or requests wait where priorities have no effect. While clients' requests have less than half
        of it, the model is idle, and gets the calls of a calibration (deployments/dispatch/background.py).
    max_queued: maximum length of the queue in front of each model.
    max_queue_wait_s: maximum wait in a queue. A request whose expected wait is longer is refused.
    max_in_flight: maximum of running and waiting requests over all models; below max_ongoing_requests of the Ingress.
    """

    max_running: int = Field(32, ge=1)
    max_queued: int = Field(128, ge=0)
    max_queue_wait_s: float = Field(30.0, gt=0)
    max_in_flight: int = Field(512, ge=1)


class BreakerSettings(StrictModel):
    """When the circuit breaker of an arm opens (deployments/dispatch/circuit_breaker.py).

    failure_threshold: number of failures in a row after which the arm is checked.
    cooldown_s: how long the breaker stays open. Each failed probe doubles it.
    max_cooldown_s: maximum of that time.
    """

    failure_threshold: int = Field(3, ge=1)
    cooldown_s: float = Field(5.0, gt=0)
    max_cooldown_s: float = Field(60.0, gt=0)


class JudgeSettings(StrictModel):
    """A model that grades answers in the background (deployments/judging/judge.py), for each ingress replica.

    A calibration uses it, too, for answers without a reference; its calls are bounded by the calibration's own budget.

    sample_rate: share of the answers that are graded, among those that the router chose the model for.
    first: until so many decisions have a score, every answer is graded, as far as the calls suffice. The first scores
        teach most.
    explore: probability with which the model of a graded answer is drawn uniformly, if few answers are graded: it is
        multiplied by the share that is not graded. It keeps every model's estimate fresh at little cost.
    pair_rate: share of the requests to which a second model answers in the background while it is idle; both answers
        are graded, and the client gets the first (deployments/judging/pairs.py). A pair takes two calls.
    calls_per_hour: maximum number of calls.
    max_queued: maximum number of answers that wait to be graded, in memory.
    model: the judge; it must be able to follow instructions. Default: the largest model.
    url: an OpenAI-compatible endpoint (".../v1", not this gateway) that serves the judge. Default: this system.
    key_env: environment variable with the endpoint's API key.
    timeout_s: of a call.
    max_tokens: of a reply. A judge of this system does not think; give one with a url that thinks more tokens.
    """

    sample_rate: float = Field(0.05, ge=0, le=1)
    first: int = Field(50, ge=0)
    explore: float = Field(0.2, ge=0, le=1)
    pair_rate: float = Field(0.0, ge=0, le=1)
    calls_per_hour: int = Field(100, ge=1)
    max_queued: int = Field(50, ge=1)
    model: str = ""
    url: str = ""
    key_env: str = ""
    timeout_s: float = Field(30.0, gt=0)
    max_tokens: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _check_rates(self) -> "JudgeSettings":
        if not self.sample_rate and not self.pair_rate:
            raise ValueError(
                "sample_rate and pair_rate are both 0, so only the first answers would be graded; raise one of them, "
                "or take `judge` out"
            )
        if self.pair_rate and min(self.calls_per_hour, self.max_queued) < 2:
            raise ValueError(
                "pair_rate needs two grades a pair; set calls_per_hour and max_queued to 2 or more"
            )
        return self

    @field_validator("url")
    @classmethod
    def _check_password(cls, url: str) -> str:
        """Refuse a password in the URL, which Ray's dashboard would show."""
        if has_password(url):
            raise ValueError(
                "holds a password, which Ray's dashboard would show; give the key in an environment variable, and its "
                "name as key_env"
            )
        return url


class Tuning(StrictModel):
    """Settings that operators may change while the system runs.

    objective: of `model: auto`.
    presets: objectives of `auto:NAME`.
    local_profile_max_chars: the ingress profiles a request itself if its messages have at most so many characters
        together.
    snapshot_max_age_s: the ingress decides itself if its snapshot of what the router has learned is no older. The
        decision reaches the router with the outcome. 0: the router decides.
    profile_timeout_s: the ingress goes on without the profiler after this time.
    decide_timeout_s: the ingress goes on without the router after this time.
    first_byte_timeout_s: time until the first byte of a stream, after which one other arm is asked.
    answer_timeout_s: the same for an answer in one piece. Also the maximum duration of a stream, and of reading it.
    chunk_timeout_s: maximum pause in a stream, after which the stream ends with an error event.
    hedge_after_fraction: fraction of `max_latency_s` after which a second model is asked if no byte has arrived; the
        first to answer wins. Default: never.
    admission: how many requests one ingress replica admits.
    scarcity_price: requests pay for a place at a model that has too many of them, so those that gain little from it
        leave it first (policies/scarcity.py). Requests of high priority pay nothing.
    demand_autoscaling: the router's demand for a model that is cold or full counts for its autoscaling, if its
        application names the policy (deployments/models/autoscaling.py). Without it, a model at zero replicas is never
        started.
    breaker: when the circuit breaker of an arm opens.
    judge: grades a share of the answers in the background. Default: none.
    """

    objective: ObjectiveSettings = ObjectiveSettings()
    presets: dict[str, ObjectiveSettings] = Field({})
    local_profile_max_chars: int = Field(4000, ge=0)
    snapshot_max_age_s: float = Field(0.0, ge=0)
    profile_timeout_s: float = Field(0.25, gt=0)
    decide_timeout_s: float = Field(0.25, gt=0)
    first_byte_timeout_s: float = Field(60.0, gt=0)
    answer_timeout_s: float = Field(600.0, gt=0)
    chunk_timeout_s: float = Field(60.0, gt=0)
    hedge_after_fraction: float | None = Field(None, gt=0, le=1)
    admission: AdmissionSettings = AdmissionSettings()
    scarcity_price: bool = True
    demand_autoscaling: bool = True
    breaker: BreakerSettings = BreakerSettings()
    judge: JudgeSettings | None = None

    @property
    def priced_slots(self) -> float:
        """Requests of one ingress that a replica may have at once, from which the prices follow; 0 without prices."""
        return self.admission.max_running if self.scarcity_price else 0.0

    @model_validator(mode="after")
    def _check_presets(self) -> "Tuning":
        for name in self.presets:
            _check_name(name, f"presets.{name!r}")
        return self


def explain(error: ValidationError) -> str:
    """A validation error as text: the place, the problem, and the nearest valid key for a typo."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            section = str(item["loc"][0]) if len(item["loc"]) > 1 else ""
            if (now := RENAMED.get((section, key))) is not None:
                renamed = where.removesuffix(key) + now
                lines.append(f"'{where}' is now '{renamed}'; rename it")
                continue
            near = get_close_matches(key, _all_keys(), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            if near == [key]:
                hint = "".join(f"; it belongs under '{name}'" for name in _under(key))
            lines.append(f"unknown key '{where}'{hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)


def _under(key: str) -> list[str]:
    """The section to which a key of user_config or args belongs."""
    found = []
    for model in (Tuning, GatewaySettings):
        for name, field in model.model_fields.items():
            kinds = get_args(field.annotation) or (field.annotation,)
            if any(key in getattr(kind, "model_fields", ()) for kind in kinds):
                found.append(name)
    return found[:1]


def _all_keys() -> list[str]:
    models: list[type[BaseModel]] = [
        ModelSettings,
        VariantSettings,
        CapabilitySettings,
        ProfilerSettings,
        PolicySettings,
        GatewaySettings,
        KeySettings,
        RolloutSettings,
        RuleSettings,
        ObjectiveSettings,
        Tuning,
        AdmissionSettings,
        BreakerSettings,
        JudgeSettings,
    ]
    return [key for model in models for key in model.model_fields]
