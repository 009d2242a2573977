"""What MLflow shows beside the numbers: the parameters of the runs, and texts that say what each metric means."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import policies
from deployments.journal.snapshot import Snapshot
from deployments.settings import GatewaySettings, Tuning

NOTE = "mlflow.note.content"  # tag that MLflow shows as the description of a run or an experiment
PACKAGES = ("ray", "vllm", "mlflow", "numpy", "msgspec")
LONGEST = 6000  # characters of a parameter's value that MLflow takes

WORDS = """
| word | meaning |
|---|---|
| reward | mean score of the latest 200 scored answers, times availability, less what latency and cost are worth under \
each request's objective |
| regret | expected utility of the best size less that of the chosen one, both as the policy itself estimated them: \
what it gives up to explore. A choice that is wrong because an estimate is wrong has none |
| share/ARM | share of the latest 500 routed decisions |
| score, score/ARM | mean score in [0, 1]; `votes` is the number of scored answers behind it |
| availability | share of the answers without a visible flaw (error, empty, malformed, cut off) |
| estimated_saving | 1 - cost / cost with the dearest size, for the same requests; the latter is the policy's estimate |
| …_total | since the journal began; a step of the x axis is one decision |
| forced/… | requests that named a model; no policy version is responsible for them |
| kind/KIND/ARM/… | by kind of work, over the latest 2,000 decisions |
"""
EXPERIMENT = (
    """Routing of requests over models of several sizes. Each start of the system, and each change of its settings, has
a run (`kind = live`) and a run for each size (`kind = arm`). Below the former there is a run for each policy version
that decided (`kind = version`).

- **Compare sizes:** filter `tags.kind = "arm"` and choose *Chart view*: every metric is one chart with a line for each
size.
- **Compare versions:** filter `tags.kind = "version"`.
- **What changed?** *Compare* shows the parameters that differ.
- `tags.journal` names the journal from which all figures come; policy versions carry the same id.
"""
    + WORDS
)
LIVE = (
    "All decisions of one start of the system, with these settings. Runs below it: one for each policy version. "
    "Every five seconds of traffic have one point.\n" + WORDS
)
VERSION = (
    "Decisions that this policy version routed: requests that named a model are not among them. Its learned state is "
    "the artifact `policy`. The run ends when the version decides no more.\n" + WORDS
)
ARM = """One size, over the latest 2,000 decisions, with a point every minute. Filter the runs by
`tags.kind = "arm"` and choose *Chart view* to see all sizes in one chart.

share: of the latest 500 routed decisions. score: mean score of answers without a visible flaw, with its 95 % interval
from score_low to score_high and the number `votes`. availability: share of the `answers` without a visible flaw.
latency_p50_s, latency_p95_s: whole answers. cost_usd: of all these decisions together. tokens_per_s: of one answer.

These are observations: a size that was chosen for easy requests looks better than it is.
"""
DEMO = """`make demo`: one stream of tasks, answered by `auto`, by each size, and by the sizes that static rules choose.
A program checks each answer.

utility: right (1) or wrong (0), less what latency and cost are worth under the server's objective. accuracy: share of
right answers. share_last_third/ARM: share of the last third of the requests. …_by_third: step 1, 2, 3 are the thirds.
"""
MODEL = """What the router has learned: policies as data, without code. The router signs each version with a secret of
its journal, and loads no other.

- Aliases `champion`, `challenger` and `shadow` follow the roles in the router.
- `mlflow.pyfunc.load_model("models:/router-policy@champion")` decides on a DataFrame, in the project's environment; see
docs/mlflow.md.
- Old versions are removed beyond `keep_versions`, except for those with an alias, a report, or a role that was given in
the last 30 days.
"""


def parameters(settings: GatewaySettings, tuning: Tuning | None) -> dict[str, str]:
    """The parameters of a run: what decides, at which prices, and which code.

    Args:
        settings: of the gateway.
        tuning: of the ingresses; None if they have reported none.
    """
    found: dict[str, object] = {
        "policy": settings.policy.name,
        "policy.options": settings.policy.options,
        "arms": ",".join(arm.name for arm in settings.arms()),
        "max_mean_cost_usd": settings.max_mean_cost_usd,
        "rollout.start": settings.rollout.start,
        "rollout.challenger_share": settings.rollout.challenger_share,
        "trace_sample_rate": settings.trace_sample_rate,
        "keys": settings.keys is not None,
        "seed": "none: a restarted router must not repeat its draws",
        "code": code_digest(),
        "commit": commit(),
    }
    for name, model in settings.models.items():
        found[f"prompt_price_usd_per_million/{name}"] = (
            model.prompt_price_usd_per_million
        )
        found[f"output_price_usd_per_million/{name}"] = (
            model.output_price_usd_per_million
        )
        found[f"prior_quality/{name}"] = model.prior_quality
        for variant, own in model.variants.items():
            found[f"variant/{variant}"] = own.model_dump(exclude_defaults=True)
    if tuning is not None:
        found["objective.latency_weight"] = tuning.objective.latency_weight
        found["objective.cost_weight"] = tuning.objective.cost_weight
        found["presets"] = {
            name: preset.model_dump() for name, preset in tuning.presets.items()
        }
        found["snapshot_max_age_s"] = tuning.snapshot_max_age_s
        found["hedge_after_fraction"] = tuning.hedge_after_fraction
        judge = tuning.judge
        found["judge.sample_rate"] = 0.0 if judge is None else judge.sample_rate
        found["judge.pair_rate"] = 0.0 if judge is None else judge.pair_rate
    for package in PACKAGES:
        found[f"version/{package}"] = _installed(package)
    return {name: _text(value)[:LONGEST] for name, value in found.items()}


def digest(values: Mapping[str, str]) -> str:
    """Names a set of parameters; equal ones have the same name."""
    text = json.dumps(dict(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def version_text(snapshot: Snapshot) -> str:
    """The description of a policy version."""
    options = json.dumps(snapshot.options, sort_keys=True) if snapshot.options else "{}"
    parent = f"version {snapshot.version}" if snapshot.version else "none"
    return (
        f"Learned from the first {snapshot.row:,} rows of the journal {snapshot.journal or 'of an unknown system'}, "
        f"with {snapshot.sequence:,} decisions. Policy {snapshot.policy} with options {options}, over "
        f"{', '.join(snapshot.arms)}. Parent: {parent}.\n\n"
        "Its source run has the metrics of the requests that it routed: reward, regret, shares and cost. Tags "
        "`evaluation.…` say what the promotion gate found, `…_since` and `…_by` who gave it a role and when."
    )


@cache
def code_digest() -> str:
    """SHA-256 of the code that decides and learns: every Python file of policies/."""
    found = hashlib.sha256()
    folder = Path(policies.__path__[0])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        found.update(name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


@cache
def commit() -> str:
    """The commit of this checkout, with "+" if files differ from it; "unknown" where there is no git."""
    folder = Path(policies.__path__[0]).parent
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for command in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}+" if changed else head


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True)
