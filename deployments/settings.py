"""The typed arguments of serve_config.yaml; a key that nobody reads is an error, not a surprise.

`GatewaySettings` is structure (a change restarts the gateway, not the models); `Tuning` is `user_config` (a change
takes effect at the next request and restarts nothing).
"""

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policies.types import Arm, Objective


class Strict(BaseModel):
    """A settings object that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModelSettings(Strict):
    """One arm as the gateway sees it; the application that serves it bears the same name.

    prior_quality: score that is expected before anything is known; left out, it goes by the price (policies/base.py).
    parent: the model whose place it takes, or from which it was made; it starts from what was learned of that.
    inherit: events that this counts for. The same goes for a model that is served with other weights or engine
        arguments than before under the same name; `revision` says so where its application does not.
    """

    tasks: tuple[str, ...] = ("chat", "completion")
    context_tokens: int = Field(4096, ge=1)
    prompt_price_usd_per_million: float = Field(0.0, ge=0)
    output_price_usd_per_million: float = Field(0.0, ge=0)
    prior_quality: float | None = Field(None, ge=0, le=1)
    parent: str = ""
    inherit: float = Field(50.0, gt=0)
    revision: str = ""

    def arm(self, name: str) -> Arm:
        """The same for the deciding half."""
        return Arm(
            name=name,
            tasks=self.tasks,
            context_tokens=self.context_tokens,
            prompt_price_usd=self.prompt_price_usd_per_million / 1e6,
            output_price_usd=self.output_price_usd_per_million / 1e6,
            prior_quality=self.prior_quality,
            parent=self.parent,
            inherit=self.inherit,
            revision=self.revision,
        )


class ProfilerSettings(Strict):
    """embedder: folder of a model2vec model. tokenizer: a tokenizer.json or hub name, to count prompt tokens."""

    embedder: str = "assets/embedder"
    tokenizer: str | None = None


class PolicySettings(Strict):
    """name: one of policies/registry.py. options: what that policy takes."""

    name: str = "thompson"
    options: dict[str, Any] = {}


class KeySettings(Strict):
    """API keys (deployments/keys.py) and what one of them may do, where its own entry does not say otherwise.

    file: where their hashes are; the same on every node that runs an ingress.
    requests_per_minute, concurrency: of one key, at one ingress replica.
    scores_per_minute: of one key that are taken as feedback; its influence on what is learned.
    cross_check: quarantine keys whose scores contradict all others' (policies/trust.py), but for trusted ones.
    """

    file: str = "var/keys.json"
    requests_per_minute: int = Field(600, ge=1)
    concurrency: int = Field(64, ge=1)
    scores_per_minute: int = Field(60, ge=1)
    cross_check: bool = True


class RolloutSettings(Strict):
    """How policy versions are tried, promoted and rolled back (deployments/rollout.py, policies/gate.py).

    share: of the traffic, that a challenger gets.
    margin: by how much it must beat the champion, in points of utility. level: of that interval.
    repeated: ask for a confidence sequence, which holds however often promotion is tried, but needs more decisions.
    watch_share: of the traffic, that the predecessor of a promoted version keeps, as long as it is watched.
    watch_margin: by how much the promoted version may be worse. watch_alpha: probability of a false rollback, ever.
    watch_rewards: after so many the watch is over.
    """

    share: float = Field(0.1, ge=0, le=1)
    margin: float = Field(0.0, ge=0)
    level: float = Field(0.95, gt=0, lt=1)
    repeated: bool = False
    watch_share: float = Field(0.2, gt=0, lt=1)
    watch_margin: float = Field(0.02, ge=0)
    watch_alpha: float = Field(0.05, gt=0, lt=1)
    watch_rewards: int = Field(10_000, ge=1)


class GatewaySettings(Strict):
    """All that the gateway, the router and the tracker are built from.

    max_mean_cost_usd: ceiling on the mean cost per routed request (policies/pacer.py); none if not given.
    journal: URL of a database, sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME; it keeps these settings, too.
    journal_keep_days, journal_max_rows: how old and how many its rows may get (a request makes about three, together
        3 kB); what was learned from those that go is kept.
    feedback_window_days: later than this, feedback for a decision is refused.
    store_text: write prompts and answers into the journal, not only features and a salted hash.
    trace_share: of the decisions, that MLflow shows as traces, with their feedback; all are in its figures.
    keys: none are asked for if not given, which is allowed on loopback only.
    max_body_bytes: of one request.
    """

    models: dict[str, ModelSettings] = Field(min_length=1)
    policy: PolicySettings = PolicySettings()
    profiler: ProfilerSettings = ProfilerSettings()
    journal: str = "sqlite:///var/journal.db"
    journal_keep_days: float = Field(90.0, gt=0)
    journal_max_rows: int = Field(3_000_000, ge=10_000)
    feedback_window_days: float = Field(30.0, gt=0)
    store_text: bool = False
    mlflow_uri: str | None = None
    experiment: str = "adaptive-router"
    publish_every_s: float = Field(300.0, gt=0)
    rollout: RolloutSettings = RolloutSettings()
    trace_share: float = Field(0.02, ge=0, le=1)
    max_mean_cost_usd: float | None = Field(None, gt=0)
    keys: KeySettings | None = None
    max_body_bytes: int = Field(2**20, ge=1024)

    def arms(self) -> tuple[Arm, ...]:
        """The models, smallest first as the file lists them."""
        return tuple(model.arm(name) for name, model in self.models.items())


def latest(kept: bytes | None, given: GatewaySettings) -> GatewaySettings:
    """The settings that a journal kept, as JSON; the given ones if it kept none, or such as are valid no more."""
    if kept is None:
        return given
    try:
        return GatewaySettings.model_validate_json(kept).model_copy(update={"journal": given.journal})
    except ValidationError:
        return given


class ObjectiveSettings(Strict):
    """What a request is worth: see policies/types.py, Objective."""

    latency_weight: float = Field(0.0, ge=0)
    cost_weight: float = Field(0.0, ge=0)

    def objective(self) -> Objective:
        """The same for the deciding half."""
        return Objective(self.latency_weight, self.cost_weight)


class AdmissionSettings(Strict):
    """How much one ingress replica takes on (deployments/admission.py); what is more gets a 429 at once.

    running: requests that a replica of a model is given at once. Those of all ingress replicas together must be above
        its target_ongoing_requests, or Serve never adds a replica, and not above its max_ongoing_requests and
        max_num_seqs, or they wait where priorities do not reach.
    waiting: places in the line in front of each model.
    wait_s: nobody waits longer in it, nor joins it when it would take longer.
    requests: running and waiting, over all models; below max_ongoing_requests of the Ingress.
    """

    running: int = Field(32, ge=1)
    waiting: int = Field(128, ge=0)
    wait_s: float = Field(30.0, gt=0)
    requests: int = Field(512, ge=1)


class BreakerSettings(Strict):
    """When an arm is left alone (deployments/breaker.py).

    failures: in a row, that open it.
    open_s: the first pause; doubled with each failed probe, up to max_open_s.
    """

    failures: int = Field(3, ge=1)
    open_s: float = Field(5.0, gt=0)
    max_open_s: float = Field(60.0, gt=0)


class JudgeSettings(Strict):
    """A judge of answers (deployments/judge.py), at each ingress replica.

    share: of the answers that the router chose.
    calls_per_hour: its budget. waiting: answers that may wait for it, in memory.
    model: who judges; the largest model, if not given. It must be able to follow instructions.
    url: of an OpenAI-compatible endpoint (".../v1", not this gateway) that has the model, instead of our own.
    key_env: environment variable with its API key.
    timeout_s: of a call. max_tokens: of its reply.
    """

    share: float = Field(0.05, gt=0, le=1)
    calls_per_hour: int = Field(100, ge=1)
    waiting: int = Field(50, ge=1)
    model: str = ""
    url: str = ""
    key_env: str = ""
    timeout_s: float = Field(30.0, gt=0)
    max_tokens: int = Field(16, ge=1)


class Tuning(Strict):
    """What operators tune while it runs.

    objective: of `model: auto`; presets: of `auto:NAME`.
    profile_here_chars: up to this length of all messages together, the ingress reads a text itself.
    decide_here_s: on a snapshot of what the router has learned that is no older, the ingress decides itself, and the
        router hears of it with the answer; 0 asks the router each time.
    profile_timeout_s, decide_timeout_s: after these the ingress goes on without the profiler, without the router.
    first_byte_timeout_s: of a stream; after this another arm is asked, once.
    answer_timeout_s: the same for an answer in one piece; and the longest that any stream may take, or take to be read.
    chunk_timeout_s: the longest pause in a stream; after it, it ends with an error event.
    hedge_after: share of max_latency_s after which a request that has one, and no first byte yet, is also given to the
        next best arm; the first to answer counts. Not given: never.
    judge: grades a share of the answers in the background. Not given: nobody does.
    """

    objective: ObjectiveSettings = ObjectiveSettings()
    presets: dict[str, ObjectiveSettings] = {}
    profile_here_chars: int = Field(4000, ge=0)
    decide_here_s: float = Field(0.0, ge=0)
    profile_timeout_s: float = Field(0.25, gt=0)
    decide_timeout_s: float = Field(0.25, gt=0)
    first_byte_timeout_s: float = Field(60.0, gt=0)
    answer_timeout_s: float = Field(600.0, gt=0)
    chunk_timeout_s: float = Field(60.0, gt=0)
    hedge_after: float | None = Field(None, gt=0, le=1)
    admission: AdmissionSettings = AdmissionSettings()
    breaker: BreakerSettings = BreakerSettings()
    judge: JudgeSettings | None = None


def explain(error: ValidationError) -> str:
    """A validation error in words: where, what is wrong, and the nearest valid key for a typo."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = get_close_matches(str(item["loc"][-1]), _all_keys(), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            lines.append(f"unknown key '{where}'{hint}")
        else:
            lines.append(f"{where}: {item['msg']}")
    return "; ".join(lines)


def _all_keys() -> list[str]:
    models: list[type[BaseModel]] = [ModelSettings, ProfilerSettings, PolicySettings, GatewaySettings, KeySettings]
    models += [RolloutSettings, ObjectiveSettings, Tuning, AdmissionSettings, BreakerSettings, JudgeSettings]
    return [key for model in models for key in model.model_fields]
