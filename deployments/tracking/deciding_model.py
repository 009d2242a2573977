"""A policy version as an MLflow model, which `mlflow.pyfunc.load_model` loads and which decides on a DataFrame.

MLflow calls `_load_pyfunc` of this module by its name in the version's MLmodel file; the version itself holds no code
and is not unpickled. As the router does, it refuses a version that the router's journal has not signed: JOURNAL names
the journal. Nothing is sent, and nothing is learned.
"""

import hmac
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa
import yaml

from deployments.journal.ids import IdFactory
from deployments.journal.snapshot import Snapshot
from deployments.journal.tables import METADATA
from deployments.settings import GatewaySettings, ProfilerSettings, Tuning
from deployments.tracking.version_files import CONTEXT, HEAD, load_policy
from policies.base import Policy
from policies.objectives import with_text_sensitivity
from policies.registry import make_policy
from policies.types import Arm, Objective, Request

if TYPE_CHECKING:
    import pandas as pd

JOURNAL_VARIABLE = "JOURNAL"  # URL of the router's journal
UNSIGNED_VARIABLE = "UNSIGNED_VERSIONS"  # "load": as the setting of that name
# columns with their types; an input column may be left out, and a row has a prompt or messages
INPUTS = {
    "prompt": "string",
    "messages": "string",
    "latency_weight": "double",
    "cost_weight": "double",
    "max_latency_s": "double",
    "max_cost_usd": "double",
}
OUTPUTS = {
    "arm": "string",
    "propensity": "double",
    "expected_score": "double",
    "expected_latency_s": "double",
    "expected_cost_usd": "double",
}
WEIGHTS = ("latency_weight", "cost_weight")
# limits of a row that gives none
NO_LIMITS = {"max_latency_s": inf, "max_cost_usd": inf}


def context_of(settings: GatewaySettings, tuning: Tuning | None) -> dict[str, object]:
    """What deciding needs beside the snapshot: the arms with their prices, the objective, the profiler's settings."""
    objective = (tuning or Tuning()).objective
    return {
        "models": {
            name: model.model_dump(mode="json")
            for name, model in settings.models.items()
        },
        "objective": objective.model_dump(),
        "profiler": settings.profiler.model_dump(),
    }


def example() -> "pd.DataFrame":
    """The input example of a version."""
    import pandas as pd

    messages = [{"role": "user", "content": "Write a python function that sorts."}]
    return pd.DataFrame(
        {
            "prompt": ["What is 3 plus 5?", None],
            "messages": [None, json.dumps(messages)],
            "latency_weight": [0.1, 0.1],
            "cost_weight": [100.0, 0.0],
        }
    )


def _load_pyfunc(data_path: str) -> "DecidingModel":
    """Check a version that MLflow has downloaded, and load it.

    Raises:
        ValueError: it is not signed, its files are others than the signed ones, or it was registered without what
            deciding needs.
    """
    folder = Path(data_path)
    model = yaml.safe_load(folder.parents[1].joinpath("MLmodel").read_text())
    metadata = model.get("metadata") or {}
    digest = str(metadata.get("sha256", ""))
    check_signature(
        digest,
        str(metadata.get("signature", "")),
        os.environ.get(JOURNAL_VARIABLE, ""),
        os.environ.get(UNSIGNED_VARIABLE, "refuse"),
    )
    snapshot = load_policy(folder, 0, digest)
    context = json.loads((folder / HEAD).read_text()).get(CONTEXT)
    if not context:
        raise ValueError(
            "this version was registered without prices and objective, which deciding needs; register a new one with "
            "`router versions register`"
        )
    settings = GatewaySettings.model_validate(
        {"models": context["models"], "profiler": context["profiler"]}
    )
    # the order of the arms is part of what was learned; JSON keeps none
    arms = {arm.name: arm for arm in settings.arms()}
    missing = set(snapshot.arms) - arms.keys()
    if missing:
        raise ValueError(
            f"this version has no prices of {', '.join(sorted(missing))}; register a new one"
        )
    return DecidingModel(
        snapshot,
        tuple(arms[name] for name in snapshot.arms),
        context["objective"],
        settings.profiler,
    )


def check_signature(
    digest: str, signature: str, journal_url: str, unsigned: str
) -> None:
    """Refuse a version that the journal has not signed, unless `unsigned` is "load".

    Args:
        digest: SHA-256 of the version's files.
        signature: the journal's signature of it.
        journal_url: URL of the journal; "" if it was not given.
        unsigned: "load" to load it all the same; its files must still have this digest.

    Raises:
        ValueError: the message says what to set.
    """
    if unsigned == "load":
        return
    advice = (
        f"set {JOURNAL_VARIABLE} to the URL of the router's journal, as sqlite:///var/journal.db; or "
        f"{UNSIGNED_VARIABLE}=load to load it unchecked"
    )
    if not journal_url:
        raise ValueError(f"the signature of this version cannot be checked: {advice}")
    signed = IdFactory(_salt(journal_url)).signature(digest)
    if not hmac.compare_digest(signed.encode(), signature.encode()):
        raise ValueError(
            "this version was not registered by this journal, so its files may be another's; "
            + advice
        )


def _salt(journal_url: str) -> bytes:
    """The secret of a journal, which is only read.

    Raises:
        ValueError: there is no journal at this URL.
    """
    url = sa.engine.make_url(journal_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise ValueError(f"there is no journal at {journal_url}")
    engine = sa.create_engine(url)
    query = sa.select(METADATA.c.value).where(METADATA.c.name == "salt")
    try:
        with engine.connect() as connection:
            return bytes(connection.execute(query).scalar_one())
    except sa.exc.SQLAlchemyError as error:
        raise ValueError(
            f"{journal_url} is not a journal that can be read ({type(error).__name__})"
        ) from None
    finally:
        engine.dispose()


@dataclass
class DecidingModel:
    """Decides on rows of a DataFrame, as the router would on an idle system for an answer that gets no score.

    snapshot: what was learned.
    arms: among which it chooses.
    objective: the default weights, by column.
    profiler: how texts are profiled.
    """

    snapshot: Snapshot
    arms: Sequence[Arm]
    objective: Mapping[str, float]
    profiler: ProfilerSettings

    def __post_init__(self) -> None:
        # loads the embedder, which the registry does not need
        from deployments.profiler.reader import TextProfiler

        self._profiler = TextProfiler(self.profiler)
        self._policy: Policy = make_policy(
            self.snapshot.policy, self.arms, self.snapshot.options
        )
        self._policy.restore(self.snapshot.state)

    def predict(
        self, model_input: "pd.DataFrame", params: Mapping[str, object] | None = None
    ) -> "pd.DataFrame":
        """The choice for each row, its propensity, and what is expected of it. The same rows have the same choices.

        A row that no arm can serve has the arm "", and no expectations.
        """
        import pandas as pd

        rows = model_input.to_dict("records")
        requests = with_text_sensitivity(self._requests(rows))
        decided = []
        if requests:
            decided = self._policy.decide(
                requests, {}, np.random.default_rng(0), self.snapshot.sequence
            )
        columns: dict[str, list[Any]] = {name: [] for name in OUTPUTS}
        for decision in decided:
            estimate = decision.estimate()
            known = bool(decision.arm)
            columns["arm"].append(decision.arm)
            columns["propensity"].append(estimate.propensity if known else nan)
            columns["expected_score"].append(estimate.quality if known else nan)
            columns["expected_latency_s"].append(estimate.latency_s if known else nan)
            columns["expected_cost_usd"].append(estimate.cost_usd if known else nan)
        return pd.DataFrame(columns, index=model_input.index)

    def _requests(self, rows: Sequence[Mapping[Any, Any]]) -> list[Request]:
        from deployments.profiler.reader import ProfileItem

        items = []
        for row in rows:
            asked, context, messages = _texts(row)
            items.append(ProfileItem(asked, context, messages, "chat", 0))
        weights = {name: self.objective[name] for name in WEIGHTS}
        defaults = {**weights, **NO_LIMITS}
        requests = []
        for i, (row, profile) in enumerate(
            zip(rows, self._profiler.profile(items), strict=True)
        ):
            latency_weight, cost_weight, max_latency_s, max_cost_usd = (
                _number(row.get(name), default) for name, default in defaults.items()
            )
            objective = Objective(
                latency_weight, cost_weight, max_latency_s, max_cost_usd
            )
            # the answer gets no score, so a choice for the sake of learning would be wasted
            request = Request(str(i), profile, objective, score_chance=0.0)
            requests.append(request)
        return requests


def _texts(row: Mapping[Any, Any]) -> tuple[str, str, int]:
    """What a row asks, everything that the model would read, and the number of messages.

    Raises:
        ValueError: a row has neither a prompt nor messages, or its messages are none.
    """
    messages = row.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            raise ValueError(
                "`messages` is no JSON; write a list of objects with `role` and `content`"
            ) from None
    if isinstance(messages, list) and messages:
        texts = [_content(message) for message in messages]
        asked = [
            text
            for message, text in zip(messages, texts, strict=True)
            if message.get("role") == "user"
        ]
        return (asked or texts)[-1], "".join(texts), len(texts)
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError("a row has neither `prompt` nor `messages`; give one of them")
    return prompt, prompt, 1


def _content(message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError("a message has no `content` that is text")
    return content


def _number(value: Any, default: float) -> float:
    """A number of a row, or the default if there is none."""
    return default if value is None or isnan(float(value)) else float(value)
