"""Recorded public streams as portfolios of arms: prompts × models × scores × costs, with the product's features.

The environment variable ROUTER_DATA names the folder of the recordings; the project contains no copy of them.
docs/benchmarks/decisions.md, under "Streams", lists the sources, their licences and the columns. Prompts are
embedded and profiled by the same code as live requests.
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from deployments.profiler.reader import load_classifier
from policies.evaluation.simulate import Stream
from policies.profiling import features
from policies.types import TaskProfile, Vector

ROOT = Path(__file__).resolve().parents[2]
LAMBDAS = (0.0, 0.1, 0.3)
MMLUPRO = {
    "mmlupro_llama31": ("Meta-Llama-3_1-8B-Instruct", "Meta-Llama-3_1-70B-Instruct"),
    "mmlupro_qwen15": ("Qwen1.5-7B-Chat", "Qwen1.5-72B-Chat", "Qwen1.5-110B"),
    "mmlupro_mid4": (
        "Phi-3-mini-4k-instruct",
        "mathstral-7B",
        "Mixtral-8x7B-Instruct-v0.1",
        "Yi-34B",
    ),
}
# portfolios of tool calls
BFCL = {
    "bfcl_claude3": (
        "claude-3-haiku-20240307",
        "claude-3-sonnet-20240229",
        "claude-3-5-sonnet-20240620",
        "claude-3-opus-20240229",
    ),
    "bfcl_llama3": (
        "meta-llama_Meta-Llama-3-8B-Instruct",
        "meta-llama_Meta-Llama-3-70B-Instruct",
    ),
    "bfcl_xlam": ("Salesforce_xLAM-1b-fc-r", "Salesforce_xLAM-7b-fc-r"),
    "bfcl_mixed6": (
        "gemini-1.5-flash-preview-0514",
        "claude-3-haiku-20240307",
        "gpt-4o-mini-2024-07-18",
        "meetkai_functionary-medium-v3.1-FC",
        "mistral-medium-2312",
        "gpt-4-turbo-2024-04-09",
    ),
}
MODELS = MMLUPRO | BFCL  # by portfolio, the models of a source that has more
# by folder: repository and commit on GitHub
SOURCES = {
    "routellm_mmlu": "lm-sys/RouteLLM 0b64fda",
    "routellm_gsm8k": "lm-sys/RouteLLM 0b64fda",
    "mmlupro": "TIGER-AI-Lab/MMLU-Pro f418b11",
    "pareto_k4": "ParetoBandit/ParetoBandit 72ccbef",
    "llmrouter14": "ulab-uiuc/LLMRouter 4e7a796",
    "bfcl": "HuanzhiMao/BFCL-Result b4adfc9",
}
PORTFOLIOS = (
    "routellm_mmlu",
    "routellm_gsm8k",
    "mmlupro_llama31",
    "mmlupro_qwen15",
    "pareto_k4",
    "llmrouter14",
    "mmlupro_mid4",
)
ALL_PORTFOLIOS = (*PORTFOLIOS, *BFCL)


@dataclass(frozen=True)
class Portfolio:
    """Recorded outcomes of M prompts.

    arms: K names, cheapest first.
    scores: [M, K] in [0, 1].
    cost: [K] mean cost as a share of the dearest arm's.
    profiles: M profiles of the prompts.
    task: M names of the source's own tasks, which no policy sees.
    output_tokens: [M, K] tokens of the recorded answers; NaN if the source records none.
    paid: [M, K] recorded costs, as shares of the dearest arm's mean cost.
    """

    name: str
    arms: tuple[str, ...]
    scores: Vector
    cost: Vector
    profiles: tuple[TaskProfile, ...]
    task: tuple[str, ...]
    output_tokens: Vector
    paid: Vector

    @property
    def features(self) -> Vector:
        """[M, D] features of the profiles."""
        return np.stack([profile.features for profile in self.profiles])

    def stream(
        self, order: Vector, scores: Vector | None = None, costs: Vector | None = None
    ) -> Stream:
        """A stream of the prompts with these row numbers [N], in this order.

        Args:
            order: row numbers of the prompts.
            scores: [N, K], if other than the recorded ones.
            costs: [N, K], if other than the recorded ones.
        """
        n = len(order)
        return Stream(
            [self.profiles[i] for i in order],
            self.arms,
            self.scores[order] if scores is None else scores,
            np.broadcast_to(self.cost, (n, len(self.cost))) if costs is None else costs,
        )


def data_folder(given: str | None = None) -> Path:
    """Folder of the recorded streams.

    Raises:
        SystemExit: the folder contains none of SOURCES.
    """
    folder = Path(
        given or os.environ.get("ROUTER_DATA") or ROOT.parent / "shared" / "data"
    )
    if not any((folder / source / "train.parquet").is_file() for source in SOURCES):
        made_from = "".join(
            f"\n  {source}/train.parquet, dev.parquet: {of}"
            for source, of in SOURCES.items()
        )
        raise SystemExit(
            f"no recorded streams at {folder}; name their folder by --data or ROUTER_DATA. They come from these "
            f'public repositories (columns: docs/benchmarks/decisions.md, "Streams"):{made_from}'
        )
    return folder


@lru_cache(maxsize=16)
def load(
    name: str, splits: tuple[str, ...] = ("train", "dev"), data: str | None = None
) -> Portfolio:
    """Load one portfolio with the prompts of these splits.

    Raises:
        ValueError: no portfolio has this name.
    """
    if name not in ALL_PORTFOLIOS:
        raise ValueError(
            f"unknown portfolio '{name}'; choose one of: {', '.join(ALL_PORTFOLIOS)}"
        )
    source = name.partition("_")[0] if name in MODELS else name
    folder = data_folder(data) / source
    both = pd.concat(
        [pd.read_parquet(folder / f"{split}.parquet") for split in ("train", "dev")]
    )
    if name in MODELS:
        both = both[both.model.isin(MODELS[name])]
    cost = both.groupby("model").cost_usd.mean().sort_values()
    rows = both[both.split.isin(splits)]
    scores = rows.pivot(index="prompt_id", columns="model", values="score")[
        cost.index
    ].dropna()
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
        rows.pivot(index="prompt_id", columns="model", values="cost_usd")
        .loc[scores.index, cost.index]
        .to_numpy(float)
        / float(cost.max()),
    )


def profile(prompts: list[str], tokens: list[int]) -> list[TaskProfile]:
    """Profile prompts as the profiler does, for answers of one token (see policies.evaluation.simulate.Stream).

    Both sensitivities are 0. The product would weigh cost less for a prompt with the word "exactly", but the recorded
    utility has the same λ for every prompt.
    """
    classifier = load_classifier(str(ROOT / "assets" / "classifier"))
    embeddings = _embedder().encode(
        [text[-2 * features.READ_CHARS :] for text in prompts]
    )
    made = [
        features.profile(
            text, classifier.read(text), embedding, "chat", n, max_output_tokens=1
        )
        for text, embedding, n in zip(prompts, embeddings, tokens, strict=True)
    ]
    return [
        replace(profile, time_sensitivity=0.0, accuracy_sensitivity=0.0)
        for profile in made
    ]


@lru_cache(maxsize=1)
def _embedder() -> object:
    from model2vec import StaticModel

    return StaticModel.from_pretrained(str(ROOT / "assets" / "embedder"))
