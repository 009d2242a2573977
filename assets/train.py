"""Train the default portfolio from scratch: `python -m assets.train [nano small large]`.

The three chat models have the Llama architecture. They differ in capacity and in the number of steps that they write.
Each character is a token, so the vocabulary is tiny and the model sees every digit.

`large` has a second stage. It teaches the model to answer at once where a variable of the chat template asks for it,
and step by step elsewhere, as before. `python -m assets.train --refine` does the second stage alone, on the weights in
assets/models/large.

The seed is fixed. On two CPU cores all three models take less than three hours. The script writes assets/models/SIZE/
in the Hugging Face layout that vLLM loads.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from assets.tasks import EASY, HARD, MEDIUM, make_task, reply

HERE = Path(__file__).parent
SPECIAL = ("<unk>", "<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# What a worked reply ends with, before its answer. With `enable_thinking: false` the prompt has it already, so that the
# answer comes at once.
AT_ONCE = "so "
SWITCHED_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ '<|assistant|>' }}",
    "{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '"
    + AT_ONCE
    + "' }}{% endif %}",
)
CONTEXT = 512  # tokens
ROW = 256  # tokens of a training row, which is packed with whole examples


@dataclass(frozen=True)
class Refinement:
    """The second stage of a model that also answers at once.

    share: of the examples whose reply is the answer alone; the others are those of the first stage.
    practice: shares of easy, medium and hard tasks among these examples.
    """

    steps: int
    peak_rate: float
    share: float
    practice: tuple[float, float, float]


@dataclass(frozen=True)
class Size:
    """Shape and training of a model. Its worked replies are in assets/tasks.py.

    rows: packed rows in a step.
    rope_theta: base of the rotary position embedding.
    spread: standard deviation of the initial weights. With the usual values of 10,000 and 0.02 the two small models
        take several times as long to learn to attend to the previous character, which copying needs. `large` learns it
        anyway, since its worked replies contain much copying.
    practice: shares of easy, medium and hard tasks. Tasks that a size cannot learn are mostly noise in its training.
    refinement: the second stage; None for a model without one.
    """

    width: int
    layers: int
    steps: int
    rows: int
    peak_rate: float
    rope_theta: float
    spread: float
    practice: tuple[float, float, float]
    refinement: Refinement | None = None


SIZES = {
    "nano": Size(
        width=64,
        layers=2,
        steps=12000,
        rows=8,
        peak_rate=4e-3,
        rope_theta=100.0,
        spread=0.12,
        practice=(0.6, 0.3, 0.1),
    ),
    "small": Size(
        width=128,
        layers=3,
        steps=10000,
        rows=8,
        peak_rate=2.5e-3,
        rope_theta=100.0,
        spread=0.09,
        practice=(0.3, 0.6, 0.1),
    ),
    "large": Size(
        width=192,
        layers=4,
        steps=7000,
        rows=16,
        peak_rate=1.5e-3,
        rope_theta=10000.0,
        spread=0.02,
        practice=(0.25, 0.25, 0.5),
        refinement=Refinement(
            steps=2000, peak_rate=5e-4, share=0.5, practice=(0.2, 0.6, 0.2)
        ),
    ),
}


def make_tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character, plus the special tokens of a chat."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *ALPHABET))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        extra_special_tokens=list(SPECIAL[3:]),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = SWITCHED_TEMPLATE if size.refinement else CHAT_TEMPLATE
    return tokenizer


def make_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama with heads of 32, the smallest that vLLM's CPU attention supports."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3 // 32 * 32,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // 32,
            num_key_value_heads=size.width // 32,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
            initializer_range=size.spread,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def example(
    name: str, rng: random.Random, ids: dict[str, int], refine: bool = False
) -> tuple[list[int], int]:
    """Token ids of one example, and the number of those of the question, which have no loss.

    With `refine`, it is one of the second stage.
    """
    second = SIZES[name].refinement if refine else None
    if second is not None and rng.random() < second.share:
        return _answered_at_once(second, rng, ids)
    (kinds,) = rng.choices((EASY, MEDIUM, HARD), SIZES[name].practice)
    task = make_task(rng, rng.choice(kinds))
    answer = [ids[c] for c in reply(task, name)] + [ids["<|end|>"]]
    question = [ids[c] for c in task.question]
    if rng.random() < 0.1:  # as a plain completion
        prompt = [*question, ids["\n"]]
    elif rng.random() < 0.05:
        system = [ids[c] for c in "You are a helpful assistant."]
        prompt = [
            ids["<|system|>"],
            *system,
            ids["<|user|>"],
            *question,
            ids["<|assistant|>"],
        ]
    else:
        prompt = [ids["<|user|>"], *question, ids["<|assistant|>"]]
    return prompt + answer, len(prompt)


def _answered_at_once(
    second: Refinement, rng: random.Random, ids: dict[str, int]
) -> tuple[list[int], int]:
    """An example as `example` returns it, of a chat with `enable_thinking: false`."""
    (kinds,) = rng.choices((EASY, MEDIUM, HARD), second.practice)
    task = make_task(rng, rng.choice(kinds))
    prompt = [ids["<|user|>"], *(ids[c] for c in task.question), ids["<|assistant|>"]]
    if rng.random() < 0.05:
        system = [ids[c] for c in "You are a helpful assistant."]
        prompt = [ids["<|system|>"], *system, *prompt]
    prompt += [ids[c] for c in AT_ONCE]
    return [*prompt, *(ids[c] for c in task.answer), ids["<|end|>"]], len(prompt)


def batches(
    name: str, rng: random.Random, tokenizer: PreTrainedTokenizerFast, refine: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of rows [rows, ROW], packed with whole examples.

    An example cannot attend to another one, and its positions start at 0.
    """
    ids = tokenizer.get_vocab()
    rows = SIZES[name].rows
    waiting = example(name, rng, ids, refine)
    while True:
        tokens = torch.full((rows, ROW), ids["<pad>"])
        labels = torch.full((rows, ROW), -100)
        owner = torch.zeros(rows, ROW, dtype=torch.long)
        positions = torch.arange(ROW).repeat(rows, 1)
        for row in range(rows):
            start = 0
            count = 0
            while start + len(waiting[0]) <= ROW:
                sequence, asked = waiting
                end = start + len(sequence)
                tokens[row, start:end] = torch.tensor(sequence)
                labels[row, start + asked : end] = tokens[row, start + asked : end]
                owner[row, start:end] = count = count + 1
                positions[row, start:end] = torch.arange(end - start)
                start = end
                waiting = example(name, rng, ids, refine)
        same = owner[:, None, :, None] == owner[:, None, None, :]
        mask = same & torch.ones(ROW, ROW, dtype=torch.bool).tril()
        yield {
            "input_ids": tokens,
            "labels": labels,
            "position_ids": positions,
            "attention_mask": mask,
        }


def rate(step: int, stage: Size | Refinement) -> float:
    """Learning rate: linear warm-up over 100 steps, then a cosine down to a hundredth."""
    if step < 100:
        return stage.peak_rate * (step + 1) / 100
    share = (step - 100) / max(1, stage.steps - 100)
    return stage.peak_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def train(name: str, seed: int, refine: bool = False) -> None:
    """Train one model and save it. Every 100 steps print the loss and the remaining time.

    With `refine`, the second stage is done on the weights that were saved.
    """
    size = SIZES[name]
    stage: Size | Refinement = size
    if refine and size.refinement is not None:
        stage = size.refinement
    folder = HERE / "models" / name
    tokenizer = make_tokenizer(size)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(size, tokenizer)
    if refine:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.peak_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{name}: {count:,} parameters, {stage.steps} steps of {size.rows * ROW} tokens on {device}",
        flush=True,
    )
    began = time.monotonic()
    total = 0.0
    for step, batch in zip(
        range(stage.steps), batches(name, random.Random(seed), tokenizer, refine)
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, stage)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 100 == 0:
            spent = time.monotonic() - began
            left = spent / (step + 1) * (stage.steps - step - 1)
            print(
                f"{name} step {step + 1}: loss {total / 100:.4f}, {spent:.0f} s, {left:.0f} s left",
                flush=True,
            )
            total = 0.0
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{name}: saved", flush=True)


def main() -> None:
    """Train the sizes named on the command line, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", choices=[*SIZES, []], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--refine",
        action="store_true",
        help="only the second stage of those that have one, on the weights in assets/models",
    )
    arguments = parser.parse_args()
    for name in arguments.sizes or SIZES:
        if not arguments.refine:
            train(name, arguments.seed)
        if SIZES[name].refinement is not None:
            train(name, arguments.seed, refine=True)


if __name__ == "__main__":
    main()
