"""The recorded public streams as portfolios of arms: prompts × models × scores × costs, with the product's features.

Read from the folder that the setting ROUTER_DATA names; nothing of it is copied into the project. README.md, under
"Decisions, beside other routers", has the sources, their licences and the columns. Embeddings and texts go through the
same code as live requests.
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from policies import features
from policies.evaluate import Stream
from policies.types import TaskProfile, Vector

ROOT = Path(__file__).resolve().parent.parent
LAMBDAS = (0.0, 0.1, 0.3)
MMLUPRO = {
    "mmlupro_llama31": ("Meta-Llama-3_1-8B-Instruct", "Meta-Llama-3_1-70B-Instruct"),
    "mmlupro_qwen15": ("Qwen1.5-7B-Chat", "Qwen1.5-72B-Chat", "Qwen1.5-110B"),
    "mmlupro_mid4": ("Phi-3-mini-4k-instruct", "mathstral-7B", "Mixtral-8x7B-Instruct-v0.1", "Yi-34B"),
}
SOURCES = {  # folder: repository and commit on GitHub
    "routellm_mmlu": "lm-sys/RouteLLM 0b64fda",
    "routellm_gsm8k": "lm-sys/RouteLLM 0b64fda",
    "mmlupro": "TIGER-AI-Lab/MMLU-Pro f418b11",
    "pareto_k4": "ParetoBandit/ParetoBandit 72ccbef",
    "llmrouter14": "ulab-uiuc/LLMRouter 4e7a796",
}
PORTFOLIOS = (
    *("routellm_mmlu", "routellm_gsm8k", "mmlupro_llama31", "mmlupro_qwen15"),
    *("pareto_k4", "llmrouter14", "mmlupro_mid4"),
)


@dataclass(frozen=True)
class Portfolio:
    """Recorded outcomes of M prompts.

    arms: K names, cheapest first. scores: [M, K] in [0, 1]. cost: [K] mean cost as a share of the dearest arm's.
    profiles: M. task: M names of the source's own task, which no policy sees.
    output_tokens: [M, K] of the recorded answers; not a number where the source records none.
    """

    name: str
    arms: tuple[str, ...]
    scores: Vector
    cost: Vector
    profiles: tuple[TaskProfile, ...]
    task: tuple[str, ...]
    output_tokens: Vector

    @property
    def features(self) -> Vector:
        """[M, D] of the profiles."""
        return np.stack([profile.features for profile in self.profiles])

    def stream(self, order: Vector, scores: Vector | None = None, costs: Vector | None = None) -> Stream:
        """The prompts of these row numbers, in this order, with other scores or costs [N, K] if given."""
        n = len(order)
        return Stream(
            [self.profiles[i] for i in order],
            self.arms,
            self.scores[order] if scores is None else scores,
            np.broadcast_to(self.cost, (n, len(self.cost))) if costs is None else costs,
        )


def data_folder(given: str | None = None) -> Path:
    """Where the streams lie.

    Raises:
        SystemExit: they are not there.
    """
    folder = Path(given or os.environ.get("ROUTER_DATA") or ROOT.parent / "shared" / "data")
    if not any((folder / source / "train.parquet").is_file() for source in SOURCES):
        made_from = "".join(f"\n  {source}/train.parquet, dev.parquet: {of}" for source, of in SOURCES.items())
        raise SystemExit(
            f"no recorded streams at {folder}; name their folder by --data or ROUTER_DATA. They are made of what these "
            f'public repositories recorded (columns: README.md, "Decisions, beside other routers"):{made_from}'
        )
    return folder


@lru_cache(maxsize=16)
def load(name: str, splits: tuple[str, ...] = ("train", "dev"), data: str | None = None) -> Portfolio:
    """One portfolio, with the prompts of these splits.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PORTFOLIOS:
        raise ValueError(f"unknown portfolio '{name}'; choose one of: {', '.join(PORTFOLIOS)}")
    folder = data_folder(data) / name.partition("_")[0] if name in MMLUPRO else data_folder(data) / name
    both = pd.concat([pd.read_parquet(folder / f"{split}.parquet") for split in ("train", "dev")])
    if name in MMLUPRO:
        both = both[both.model.isin(MMLUPRO[name])]
    cost = both.groupby("model").cost_usd.mean().sort_values()
    rows = both[both.split.isin(splits)]
    scores = rows.pivot(index="prompt_id", columns="model", values="score")[cost.index].dropna()
    first = rows.drop_duplicates("prompt_id").set_index("prompt_id").loc[scores.index]
    profiles = profile(list(first.prompt), [int(n) for n in first.prompt_tokens])
    return Portfolio(
        name,
        tuple(cost.index),
        scores.to_numpy(float),
        (cost / cost.max()).to_numpy(float),
        tuple(profiles),
        tuple(first.task.astype(str)),
        rows.pivot(index="prompt_id", columns="model", values="output_tokens")
        .loc[scores.index, cost.index]
        .to_numpy(float),
    )


def profile(prompts: list[str], tokens: list[int]) -> list[TaskProfile]:
    """The profiles of prompts, as the profiler makes them, for answers of one token (see evaluate.Stream).

    But without haste and care: to a user who writes "exactly" the product makes money weigh less, while the recorded
    utility has the same λ for everybody.
    """
    embeddings = _embedder().encode([text[-2 * features.READ_CHARS :] for text in prompts])
    made = [
        features.profile(text, embedding, "chat", n, max_output_tokens=1)
        for text, embedding, n in zip(prompts, embeddings, tokens, strict=True)
    ]
    return [replace(profile, time_sensitivity=0.0, accuracy_sensitivity=0.0) for profile in made]


@lru_cache(maxsize=1)
def _embedder() -> object:
    from model2vec import StaticModel

    return StaticModel.from_pretrained(str(ROOT / "assets" / "embedder"))
