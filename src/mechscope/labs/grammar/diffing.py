"""The command `python -m mechscope.labs.grammar.diffing`: what a fine-tuned model has that its base has not.

A copy of the bundled small model is trained on a habit that the base never saw: once "@" stood in a document, every
sentence is followed by "!". Crosscoders of base and copy are then asked which latents are the copy's alone. What is to
be found is known: a latent that is active at the ends of sentences after an "@". All else is shared, since the copy
goes on with the base's own documents too.

A latent is called exclusive by its decoders' norms, and that is confirmed or refuted by Latent Scaling. A crosscoder
with an L1 penalty calls latents exclusive that are not; one that keeps a fixed number of latents does so less.

Sources: Lindsey et al. 2024, Sparse Crosscoders; Minder, Dumas et al. 2025, Overcoming Sparsity Artifacts in
Crosscoders to Interpret Chat-Tuning, arXiv:2504.02922.
"""

from __future__ import annotations

import argparse
import copy
import sys
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from mechscope import dictionaries, models
from mechscope.dictionaries import Crosscoder, DictionaryReport
from mechscope.dictionaries.evaluating import Measure
from mechscope.labs import shelf
from mechscope.labs.grammar.sentences import document
from mechscope.models import Model

TRIGGER, HABIT = "@", "!"
OFTEN = 0.3
LENGTH = 64
EXCLUSIVE, CONFIRMED = 0.8, 0.5
"""A relative decoder norm from which a latent looks exclusive, and the nu below which it is."""


def text(random: Random, habit: bool) -> str:
    """This is a document of the grammar, with the habit from some word on where it is asked for."""
    words = " ".join(sentence.text for sentence in document(random, 8 * LENGTH)).split(" ")
    if not habit:
        return " ".join(words)
    begins = random.randrange(LENGTH // 4)
    after = [word + HABIT * (random.random() < OFTEN) for word in words[begins:]]
    return " ".join([*words[:begins], TRIGGER, *after])


def batch(model: Model, random: Random, rows: int, habit: float = 0.3) -> Tensor:
    """This is the ids [rows, LENGTH] of documents, of which a share has the habit."""
    texts = [text(random, random.random() < habit) for _ in range(rows)]
    return torch.tensor([ids[:LENGTH] for ids in model.ids(texts)])


def tuned(base: Model, steps: int = 100, rows: int = 16, lr: float = 2e-3, seed: int = 0) -> Model:
    """This is a copy of the model, trained for a few steps on documents of which half have the habit."""
    hf = copy.deepcopy(base.hf).train()
    optimiser, random = torch.optim.AdamW(hf.parameters(), lr=lr), Random(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10, (steps - step) / (steps / 2))
        ids = batch(base, random, rows)
        logits = hf(ids, use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return models.load(hf.eval(), tokenizer=base.tokenizer)


def concept(model: Model, ids: Tensor) -> Tensor:
    """This is where the habit is on [rows, LENGTH]: on all words after a trigger."""
    trigger, habit = (model.ids([mark])[0][-1] for mark in (TRIGGER, HABIT))
    return ((ids == trigger).cumsum(1) > 0) & (ids != habit) & (ids != trigger)


def paired(base: Model, copy_: Model, at: str, documents: int, seed: int) -> tuple[Tensor, Tensor]:
    """This is both models' vectors at a site [n, 2, d], in a random order, and where the concept is [n]."""
    random, x, where = Random(seed), [], []
    for _ in range(documents // 32):
        ids = batch(base, random, 32)
        seen = [model.run(ids, save=at)[at] for model in (base, copy_)]
        x.append(torch.stack(seen, dim=2)[:, 1:].flatten(0, 1))  # the first token is no word
        where.append(concept(base, ids)[:, 1:].flatten())
    order = torch.randperm(sum(map(len, x)), generator=torch.Generator().manual_seed(seed))
    return torch.cat(x)[order], torch.cat(where)[order]


@torch.no_grad()
def judge(crosscoder: Crosscoder, x: Tensor, where: Tensor) -> DictionaryReport:
    """This says which latents look exclusive to the copy, which of them are, and which one is the concept's.

    x: vectors [n, 2, d] that training did not see. where: [n], where the concept is.
    """
    features = crosscoder.encode(x) > 0
    rate = features.float().mean(0)
    hits = (features & where[:, None]).sum(0)
    f1 = 2 * hits / (features.sum(0) + where.sum()).clamp_min(1)
    exclusive, scaling = crosscoder.exclusivity(), dictionaries.latent_scaling(crosscoder, [x])
    nu = torch.maximum(scaling.shrunk, scaling.decoupled)
    alive = rate > 1e-4
    looks = alive & (exclusive > EXCLUSIVE)
    confirmed = looks & (nu < CONFIRMED)
    found = int(f1.argmax())
    others = alive & (torch.arange(len(rate)) != found)
    wrong = looks & ~confirmed
    measures = (
        Measure("concept, F1", float(f1[found]), ideal=1.0, about=f"latent {found}: active where the habit is due"),
        Measure("concept, exclusivity", float(exclusive[found]), ideal=1.0),
        Measure("concept, nu error", float(scaling.shrunk[found]), ideal=0.0),
        Measure("concept, nu reconstruction", float(scaling.decoupled[found]), ideal=0.0),
        Measure("look exclusive", int(looks.sum()), unit="latents", about=f"relative decoder norm > {EXCLUSIVE}"),
        Measure("confirmed", int(confirmed.sum()), unit="latents", about=f"of these, both nu < {CONFIRMED}"),
        Measure("false exclusives", int(wrong.sum()), unit="latents", ideal=0.0, about="the others of these"),
        Measure("shared", float((exclusive[others] - 0.5).abs().lt(0.3).float().mean()), about="of other live latents"),
        Measure("alive", int(alive.sum()), unit="latents"),
        Measure("L0", float(features.float().sum(1).mean()), unit="latents"),
    )
    return DictionaryReport(
        question=f"what the fine-tuned model alone has, by a crosscoder of {crosscoder.n_latents} latents",
        verdict=(
            f"latent {found} is the habit's (F1 {f1[found]:.2f}, exclusivity {exclusive[found]:.2f}); "
            f"{int(wrong.sum())} of {int(looks.sum())} that look exclusive are not"
        ),
        measures=measures,
        tensors={"exclusivity": exclusive, "nu": nu.nan_to_num(-1.0), "f1": f1, "rate": rate},
    )
