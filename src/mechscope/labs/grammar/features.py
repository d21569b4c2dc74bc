"""The command `python -m mechscope.labs.grammar.features`: dictionaries of several sizes on the small bundled model.

    law            held-out FVU as a law of features and of steps, over five sizes and three lengths of training
    search         the latents of some words found by those words
    clamping       a latent at several times its maximum raises the words that it fires on; another latent does not
    neighbours     latents that point the same way fire on the same kind of word, more than by chance
    completeness   which words have a latent of their own, by how frequent they are and how large the dictionary is

The texts are the grammar's own; every vector that is judged on is of documents that training did not see. The site is
the stream before the last block reads it.
"""

from __future__ import annotations

import argparse
import sys
from random import Random

import torch
from torch import Tensor

from mechscope import dictionaries
from mechscope.dictionaries import BatchTopK, Dictionary, DictionaryReport, evaluating
from mechscope.dictionaries.evaluating.report import Measure
from mechscope.dictionaries.evaluating.rows import features
from mechscope.dictionaries.evaluating.tally import mean, share
from mechscope.labs import shelf
from mechscope.labs.grammar.sentences import EVERY, document
from mechscope.models import Model

SITE = "blocks.0.resid_post"
SIZES, STEPS, K = (16, 32, 64, 128, 256), (100, 300, 900), 4
"""Of the law. Beyond these sizes nothing is left to gain: the texts have few features, and steps are what is short."""

STUDIED, LONG, MORE = (128, 256, 512), 450, 8
"""The sizes, steps and active latents of the dictionaries that are looked into."""

KINDS: dict[str, tuple[str, ...]] = {
    "male names": EVERY.male,
    "female names": EVERY.female,
    "singular nouns": tuple(one for one, _ in EVERY.nouns),
    "plural nouns": tuple(many for _, many in EVERY.nouns),
    "years": EVERY.years,
    "arguments": EVERY.arguments,
}
SEARCHED = ("Mary", "Sarah", "Lisa", "Emily", "Anna", "Lucy")
TIMES = 5.0
"""How many times its maximum a latent is clamped to."""


def vectors(model: Model, documents: int, seed: int, context: int = 64) -> tuple[Tensor, Tensor]:
    """This is the site's vectors [n, d] of documents, in a random order, and the token of each [n]."""
    random, x, tokens = Random(seed), [], []
    for _ in range(max(1, documents // 32)):
        texts = [" ".join(s.text for s in document(random, 8 * context)) for _ in range(32)]
        ids = torch.tensor([row[:context] for row in model.ids(texts)])
        x.append(model.run(ids, save=SITE)[SITE][:, 1:].flatten(0, 1))  # the first token is no word
        tokens.append(ids[:, 1:].flatten())
    order = torch.randperm(sum(map(len, x)), generator=torch.Generator().manual_seed(seed))
    return torch.cat(x)[order], torch.cat(tokens)[order]


def trained(x: Tensor, sizes: tuple[int, ...], steps: int, k: int, seed: int = 0) -> list[Dictionary]:
    """This is dictionaries of all sizes, trained on the same batches."""
    made: list[Dictionary] = [
        BatchTopK(x.shape[1], n, k=k, aux=0.25, dead_after=20_000, reads=SITE, seed=seed) for n in sizes
    ]
    batches = [x[start : start + 512] for start in range(0, len(x) - 511, 512)]
    return dictionaries.train(made, (batches[step % len(batches)] for step in range(10**9)), steps=steps, lr=4e-3)


def law(x: Tensor, held: Tensor) -> DictionaryReport:
    """This is the law, of dictionaries that were each trained anew for their number of steps."""
    losses = []
    for steps in STEPS:
        reports = evaluating.evaluate(trained(x, SIZES, steps, K), held.split(1024))
        assert isinstance(reports, list)
        losses += [report["fvu"].value for report in reports]
    lengths = [steps for steps in STEPS for _ in SIZES]
    return evaluating.scaling_law({"features": [*SIZES] * len(STEPS), "steps": lengths}, losses)


def words(model: Model, kinds: dict[str, tuple[str, ...]]) -> Tensor:
    """This is the number of the kind that each token is of [vocab], -1 where it is of none."""
    kind = torch.full((model.d_vocab,), -1)
    for number, of in enumerate(kinds.values()):
        for row in model.ids([f" {word}" for word in of]):
            kind[row[-1]] = number
    return kind


def search(model: Model, dictionary: Dictionary, x: Tensor, tokens: Tensor) -> DictionaryReport:
    """This finds latents of a few words: those that are active on them and not on other tokens."""
    on = torch.isin(tokens, torch.tensor([row[-1] for row in model.ids([f" {word}" for word in SEARCHED])]))
    return evaluating.feature_search(dictionary, x[on], x[~on], top=3)


def clamping(
    model: Model, dictionary: Dictionary, x: Tensor, tokens: Tensor, n: int = 24, seed: int = 0
) -> DictionaryReport:
    """This clamps latents to a multiple of their maximum, and compares the words that they fire on with other latents'.

    A latent's words are the three tokens that hold most of its activation. Their mean logit, less that of all tokens,
    should rise; the control is what clamping the next latent, at a multiple of its own maximum, does to them.
    """
    found = features(dictionary, x)
    sums = torch.zeros(model.d_vocab, found.shape[1]).index_add_(0, tokens, found)
    top = sums.topk(3, dim=0)
    narrow = (top.values.sum(0) / sums.sum(0).clamp_min(1e-9)) > 0.5
    chosen = narrow.nonzero().flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))][:n]
    random = Random(10**6 + seed)
    texts = [" ".join(s.text for s in document(random, 256)) for _ in range(16)]
    ids = torch.tensor([row[:32] for row in model.ids(texts)])
    clamps = {int(latent): TIMES * float(found[:, latent].max()) for latent in chosen}
    moved = evaluating.clamp_effects(model, dictionary, ids, clamps)
    moved = moved - moved.mean(1, keepdim=True)
    own = torch.stack([row[top.indices[:, latent]].mean() for row, latent in zip(moved, chosen)])
    other = torch.stack([row[top.indices[:, latent]].mean() for row, latent in zip(moved.roll(1, 0), chosen)])
    measures = (
        Measure("own words", *mean(own), unit="logits", about=f"{len(chosen)} latents at {TIMES:g} x maximum"),
        Measure("own words, another clamped", *mean(other), unit="logits", control=True),
        Measure("raised more than by another", *share(own > other), ideal=1.0, about="of latents"),
    )
    return DictionaryReport(
        question=f"latents of {SITE} clamped to {TIMES:g} times their maximum",
        verdict=f"their own words rise by {measures[0]} logits; when another latent is clamped, by {measures[1]}",
        measures=measures,
        tensors={"latents": chosen, "own": own, "other": other},
    )


def labels(dictionary: Dictionary, x: Tensor, tokens: Tensor, kind: Tensor) -> Tensor:
    """This is the kind of word that most of a latent's activation is on [n_latents], -1 for others and dead ones."""
    found = features(dictionary, x)
    sums = torch.zeros(int(kind.max()) + 2, found.shape[1]).index_add_(0, kind[tokens] + 1, found)
    return torch.where(sums[1:].sum(0) > 0.5 * sums.sum(0).clamp_min(1e-9), sums[1:].argmax(0), -1)


def complete(dictionary: Dictionary, x: Tensor, tokens: Tensor, kind: Tensor) -> DictionaryReport:
    """This is which words of any kind have a latent of their own."""
    return evaluating.completeness(dictionary, x, torch.where(kind[tokens] >= 0, tokens, -1))


def run(documents: int = 1600, seed: int = 0) -> dict[str, DictionaryReport]:
    """This makes every report, by what it is of."""
    model = shelf.load("grammar-small")
    x, _ = vectors(model, documents, seed)
    held, tokens = vectors(model, max(256, documents // 5), seed + 1000)
    reports = {"law": law(x, held)}
    made = trained(x, STUDIED, LONG, MORE)
    largest, kind = made[-1], words(model, KINDS)
    reports["search"] = search(model, largest, held, tokens)
    reports["clamping"] = clamping(model, largest, held, tokens)
    reports["neighbours"] = evaluating.neighbours_share(largest, labels(largest, held, tokens, kind), k=3)
    for one in made:
        reports[f"completeness at {one.n_latents}"] = complete(one, held, tokens, kind)
    return reports


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mechscope.labs.grammar.features", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, value in (("documents", 1600), ("seed", 0), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    for name, report in run(given.documents, seed=given.seed).items():
        print(f"## {name}\n\n{report}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
