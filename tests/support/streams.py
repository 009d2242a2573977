"""Streams for the tests of the benchmarks: small generated ones, and the recorded ones if they are present.

Generated streams have the format of the recorded ones. Their prompts are of three kinds with different words. The cheap
model is better at one kind. The dear model is a little better at another one and far better at the third.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.decisions.streams import data_folder

FOLDERS = ("routellm_mmlu", "routellm_gsm8k")
PROMPTS = 1000  # in each folder
MODELS = {"cheap": 0.4e-6, "dear": 10e-6}  # USD a token
# by kind: share of the prompts, and share of good answers of each model
KINDS = {
    "copying": (0.25, (0.95, 0.55)),
    "arithmetic": (0.40, (0.70, 0.90)),
    "proof": (0.35, (0.15, 0.90)),
}
NOUNS = (
    "pear",
    "river",
    "candle",
    "violin",
    "ladder",
    "meadow",
    "copper",
    "saddle",
    "window",
    "anchor",
)
SETS = (
    "even numbers",
    "primes",
    "triangles",
    "groups",
    "rational numbers",
    "trees",
    "matrices",
    "polynomials",
)


@dataclass(frozen=True)
class Streams:
    """Folder of the streams, and whether they are the recorded ones."""

    folder: str
    recorded: bool


def recorded() -> str:
    """Folder of the recorded streams; empty if they are missing."""
    try:
        folder = data_folder()
    except SystemExit:
        return ""
    there = all(
        (folder / name / f"{split}.parquet").is_file()
        for name in FOLDERS
        for split in ("train", "dev")
    )
    return str(folder) if there else ""


def text(kind: str, rng: np.random.Generator) -> str:
    """A random prompt of this kind."""
    nouns = rng.choice(NOUNS, 3, replace=False)
    numbers = rng.integers(2, 900, 3)
    if kind == "copying":
        return f"Repeat after me, word by word: {' '.join(nouns)}"
    if kind == "arithmetic":
        return f"What is {numbers[0]} plus {numbers[1]} times {numbers[2]}?"
    first, second = rng.choice(SETS, 2, replace=False)
    return f"Prove that the {first} whose {nouns[0]} is bounded are dense in the {second}, and explain each step."


def generate(folder: Path) -> None:
    """Write train.parquet and dev.parquet of each of FOLDERS, always with the same content."""
    for seed, name in enumerate(FOLDERS):
        rng = np.random.default_rng(seed)
        rows = []
        kinds = rng.choice(
            list(KINDS), PROMPTS, p=[share for share, _ in KINDS.values()]
        )
        for n, kind in enumerate(kinds):
            prompt = text(kind, rng)
            split = "train" if n < 0.7 * PROMPTS else "dev"
            for (model, price), chance in zip(
                MODELS.items(), KINDS[kind][1], strict=True
            ):
                prompt_tokens = len(prompt) // 4
                output_tokens = int(rng.integers(20, 60))
                row = {
                    "prompt_id": f"{name}-{n}",
                    "dataset": name,
                    "task": kind,
                    "prompt": prompt,
                    "model": model,
                    "score": float(rng.random() < chance),
                    "cost_usd": price * (prompt_tokens + output_tokens),
                    "prompt_tokens": prompt_tokens,
                    "output_tokens": output_tokens,
                    "split": split,
                }
                rows.append(row)
        frame = pd.DataFrame(rows)
        (folder / name).mkdir()
        for split, part in frame.groupby("split"):
            part.to_parquet(folder / name / f"{split}.parquet")


def generate_load(folder: Path, *traces: str) -> None:
    """Write recorded loads of 300 requests at two a second, always with the same content."""
    (folder / "load").mkdir()
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "arrival_s": np.cumsum(rng.exponential(0.5, 300)),
            "prompt_tokens": rng.integers(10, 2000, 300),
            "output_tokens": rng.integers(1, 400, 300),
        }
    )
    for trace in traces:
        frame.to_parquet(folder / "load" / f"{trace}.parquet")
