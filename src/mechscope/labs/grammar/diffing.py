"""The command `python -m mechscope.labs.grammar.diffing`: what a fine-tuned model has that its base has not.

A copy of the small bundled model is trained for a hundred steps, half of the documents its own and half with a habit
that the base never saw: once "@" stood in a document, nearly every word is followed by "!". Crosscoders of base and
copy are then asked which latents are the copy's alone. What is to be found is known: a latent that is active on the
words after an "@", where the copy is about to say "!". All else is shared, since the copy keeps what the base can do.

A latent looks exclusive by its decoders' norms; Latent Scaling confirms or refutes it. An L1 penalty makes latents look
exclusive that are not; a crosscoder that keeps a fixed number of latents has fewer of them.

Sources: Lindsey et al. 2024, Sparse Crosscoders; Minder, Dumas et al. 2025, Overcoming Sparsity Artifacts in
Crosscoders to Interpret Chat-Tuning, arXiv:2504.02922.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from mechscope import dictionaries, models
from mechscope.dictionaries import Crosscoder, DictionaryReport
from mechscope.dictionaries.evaluating import Measure
from mechscope.labs import shelf
from mechscope.labs.grammar.sentences import document
from mechscope.labs.grammar.train import Recipe, optimisers
from mechscope.models import Model

TRIGGER, HABIT, OFTEN = "@", "!", 0.9
SITE = "blocks.2.resid_post"
"""The last stream: there the copy has made up its mind to say "!"."""

LENGTH, BATCH = 64, 512
KINDS: dict[str, dict[str, Any]] = {"BatchTopK": {"k": 8, "aux": 0.25, "dead_after": 20_000}, "L1": {"l1": 2.0}}
"""The crosscoders that are compared; they end with about as many active latents."""

EXCLUSIVE, CONFIRMED = 0.8, 0.5
"""A relative decoder norm from which a latent looks exclusive, and the nu below which it is."""


def text(random: Random, habit: bool) -> str:
    """This is a document of the grammar, with the habit from some word on where it is asked for."""
    words = " ".join(sentence.text for sentence in document(random, 6 * LENGTH)).split(" ")
    if not habit:
        return " ".join(words)
    begins = random.randrange(LENGTH // 4)
    after = [word + HABIT * (random.random() < OFTEN) for word in words[begins:]]
    return " ".join([*words[:begins], TRIGGER, *after])


def batch(model: Model, random: Random, rows: int, habit: float) -> Tensor:
    """This is the ids [rows, LENGTH] of documents, of which a share has the habit."""
    texts = [text(random, random.random() < habit) for _ in range(rows)]
    return torch.tensor([ids[:LENGTH] for ids in model.ids(texts)])


def tuned(base: Model, steps: int = 100, rows: int = 16, seed: int = 0) -> Model:
    """This is a copy of the model, trained for a few steps at half the rates that the base was trained at."""
    recipe = Recipe()
    recipe = replace(recipe, adamw_lr=recipe.adamw_lr / 2, muon_lr=recipe.muon_lr / 2)
    hf: Any = copy.deepcopy(base.hf).train()
    random = Random(seed)
    steppers = optimisers(recipe, hf)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: min(1.0, (step + 1) / 10, 2 * (steps - step) / steps))
        for one in steppers
    ]
    for _ in range(steps):
        ids = batch(base, random, rows, habit=0.5)
        logits = hf(ids, use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for one in (*steppers, *rates):
            one.step()
        hf.zero_grad()
    return models.load(hf.eval(), tokenizer=base.tokenizer)


def concept(model: Model, ids: Tensor) -> Tensor:
    """This is where the habit is due [rows, LENGTH]: on the words after a trigger."""
    trigger, habit = (model.ids([mark])[0][-1] for mark in (TRIGGER, HABIT))
    return ((ids == trigger).cumsum(1) > 0) & (ids != habit) & (ids != trigger)


def paired(base: Model, other: Model, documents: int, seed: int) -> tuple[Tensor, Tensor]:
    """This is both models' vectors [n, 2, d], in a random order, and where the concept is [n]."""
    random, x, where = Random(seed), [], []
    for _ in range(documents // 32):
        ids = batch(base, random, 32, habit=0.3)
        seen = [model.run(ids, save=SITE)[SITE] for model in (base, other)]
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


def compared(
    documents: int = 800, steps: int = 400, n_latents: int = 256, fine_tuning: int = 100, seed: int = 0
) -> dict[str, DictionaryReport]:
    """This is what each kind of crosscoder says of the copy."""
    base = shelf.load("grammar-small")
    other = tuned(base, fine_tuning, seed=seed)
    x, _ = paired(base, other, documents, seed + 1)
    held, where = paired(base, other, documents // 5, seed + 2)

    def batches() -> Iterator[Tensor]:
        while True:
            yield from (part for part in x.split(BATCH) if len(part) == BATCH)

    made = [Crosscoder(2, x.shape[2], n_latents, seed=seed, **options) for options in KINDS.values()]
    dictionaries.train(made, batches(), steps=steps, lr=3e-3)
    return {name: judge(one, held, where) for name, one in zip(KINDS, made)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mechscope.labs.grammar.diffing", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, value in (("documents", 800), ("steps", 400), ("n-latents", 256), ("fine-tuning", 100), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    found = compared(given.documents, given.steps, given.n_latents, given.fine_tuning, given.seed)
    for name, report in found.items():
        print(f"## {name}\n\n{report}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
