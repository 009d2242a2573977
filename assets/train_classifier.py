"""Train the profiler's classifier on the requests of assets/request_templates.py: `python -m assets.train_classifier`.

The script draws requests from the templates, finds their n-grams (policies/profiling/ngrams.py) and fits the weights of
policies/profiling/classifier.py by maximum likelihood, with n-grams left out at random so that no single one decides.
It writes assets/classifier/: the weights as float16, and a card with the accuracy per language on templates and words
that training does not have. It takes a few minutes on one core; the same seed gives the same weights.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from assets.classifier_card import write_card
from assets.request_templates import TRAIN, LabelledRequest, draw, templates
from policies.profiling.classifier import (
    CARE,
    HEADS,
    LANGUAGE,
    LANGUAGES,
    Classifier,
)
from policies.profiling.features import KINDS
from policies.profiling.ngrams import BUCKETS, numbers_of

SEED = 1
DRAWS = 24  # of each template, where a language has ten of a kind
ENGLISH = 2  # times as many of English, in which most requests are
EPOCHS = 4
BATCH = 256
KEEP = 0.5  # share of a request's n-grams that one step of training sees
RATE = 0.1
DECAY = 3e-5  # of the weights of the kinds; the wishes have few words, whose weights must be large
FOLDER = Path(__file__).parent / "classifier"


def training_requests(
    chosen: Sequence[tuple[str, str, str]], draws: int, rng: random.Random
) -> list[LabelledRequest]:
    """Draw requests from these templates of the training part; every kind of a language has equally many."""
    counts: dict[tuple[str, str], int] = {}
    for language, kind, _ in chosen:
        counts[language, kind] = counts.get((language, kind), 0) + 1
    found = []
    for language, kind, template in chosen:
        times = draws * 10 / counts[language, kind]
        if language == "en":
            times *= ENGLISH
        for _ in range(round(times)):
            found.append(draw(rng, language, kind, template, TRAIN))
    rng.shuffle(found)
    return found


def fit(requests: Sequence[LabelledRequest]) -> tuple[np.ndarray, np.ndarray]:
    """The weights [BUCKETS, H] and the bias [H], in the order of HEADS."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    numbers = [torch.from_numpy(numbers_of(request.text)) for request in requests]
    kinds = torch.tensor([KINDS.index(request.kind) for request in requests])
    wishes = torch.tensor(
        [[request.care, request.haste] for request in requests]
    ).float()
    languages = torch.tensor([LANGUAGES.index(r.language) for r in requests])
    of_kinds = torch.zeros(BUCKETS, CARE, requires_grad=True)
    of_wishes = torch.zeros(BUCKETS, LANGUAGE - CARE, requires_grad=True)
    of_languages = torch.zeros(BUCKETS, len(LANGUAGES), requires_grad=True)
    bias = torch.zeros(len(HEADS), requires_grad=True)
    steps = EPOCHS * (len(requests) // BATCH)
    optimiser = torch.optim.Adam(
        [
            {"params": [of_kinds, of_languages], "weight_decay": DECAY},
            {"params": [of_wishes, bias], "lr": 2 * RATE},
        ],
        lr=RATE,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(requests))
        for rows in order.split(BATCH)[: len(requests) // BATCH]:
            bags = [numbers[row] for row in rows.tolist()]
            sizes = torch.tensor([len(bag) for bag in bags])
            ends = sizes.cumsum(0)
            scale = (1.0 / sizes.sqrt() / KEEP).repeat_interleave(sizes)
            kept = torch.rand(int(ends[-1])) < KEEP
            logits = bias + torch.nn.functional.embedding_bag(
                torch.cat(bags),
                torch.cat([of_kinds, of_wishes, of_languages], dim=1),
                ends - sizes,
                mode="sum",
                per_sample_weights=scale * kept,
            )
            loss = torch.nn.functional.cross_entropy(
                logits[:, :CARE], kinds[rows], label_smoothing=0.02
            ) + torch.nn.functional.binary_cross_entropy_with_logits(
                logits[:, CARE:LANGUAGE], wishes[rows]
            )
            loss += torch.nn.functional.cross_entropy(
                logits[:, LANGUAGE:], languages[rows], label_smoothing=0.02
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    weights = torch.cat([of_kinds, of_wishes, of_languages], dim=1)
    return weights.detach().numpy(), bias.detach().numpy()


def main() -> None:
    """Train the classifier and write its weights and its card."""
    requests = training_requests(templates(TRAIN), DRAWS, random.Random(SEED))
    weights, bias = fit(requests)
    FOLDER.mkdir(exist_ok=True)
    arrays = {"weights": weights.astype(np.float16), "bias": bias}
    save_file(arrays, FOLDER / "model.safetensors")
    classifier = Classifier(arrays["weights"], bias)
    write_card(classifier, FOLDER / "README.md")


if __name__ == "__main__":
    main()
