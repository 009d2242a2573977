"""How often a trained model is right by kind of task, and with how many tokens: `python -m assets.accuracy large`.

No server is needed. A model that also answers at once (assets/train.py) has a second pair of columns for it.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from assets.tasks import KINDS, SIZES, Task, check, make_task

HERE = Path(__file__).parent
LONGEST = 110  # tokens of an answer
BATCH = 100


def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tasks: list[Task],
    thinking: bool,
) -> list[tuple[str, int]]:
    """The most probable answer to each task, and its number of tokens with the last one.

    Args:
        model: is in memory.
        tokenizer: has the chat template.
        tasks: questions.
        thinking: the template's `enable_thinking`.
    """
    end = tokenizer.eos_token_id
    found: list[tuple[str, int]] = []
    for start in range(0, len(tasks), BATCH):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": task.question}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinking,
            )
            for task in tasks[start : start + BATCH]
        ]
        given = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left"
        )
        with torch.inference_mode():
            made = model.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=LONGEST,
                do_sample=False,
            )
        for row in made[:, given["input_ids"].shape[1] :].tolist():
            written = row.index(end) if end in row else len(row)
            text = tokenizer.decode(row[:written])
            found.append((text, min(written + 1, len(row))))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--folder", type=Path, help="default: assets/models/SIZE")
    parser.add_argument("--each", type=int, default=200, help="tasks of each kind")
    parser.add_argument("--seed", type=int, default=987654321)
    arguments = parser.parse_args()
    folder = arguments.folder or HERE / "models" / arguments.size
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(arguments.seed)
    tasks = [make_task(rng, kind) for kind in KINDS for _ in range(arguments.each)]
    ways = [True]
    if "enable_thinking" in str(tokenizer.chat_template):
        ways.append(False)
    given = [answers(model, tokenizer, tasks, thinking) for thinking in ways]
    print("| kind |" + " right | tokens |" * len(ways))
    print("|---|" + "---:|---:|" * len(ways))
    for kind in (*KINDS, "all"):
        cells = []
        for way in given:
            own = [
                (check(task, text), tokens)
                for task, (text, tokens) in zip(tasks, way, strict=True)
                if kind in (task.kind, "all")
            ]
            right = sum(one for one, _ in own) / len(own)
            tokens = sum(count for _, count in own) / len(own)
            cells.append(f"{right:.1%} | {tokens:.1f}")
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
