"""Looking features up: by a prompt, by what they do when clamped, by their neighbours, and which words have one.

    feature_search(sae, vectors, others)             the latents that are active there and not elsewhere
    clamp_effects(model, sae, ids, {12: 0.0})        how much every logit moves where a latent is clamped
    neighbours_share(sae, labels)                    do latents that point the same way mean the same?
    completeness(sae, vectors, items)                which items of a category have a latent, by how frequent they are

Source: Templeton et al. 2024, Scaling Monosemanticity: "Searching for specific features", "Assessing feature
completeness", "Feature neighborhoods", "Influence on behavior" (clamping to a multiple of the greatest activation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import chunks, directions, features
from mechscope.dictionaries.evaluating.tally import mean, share
from mechscope.errors import DictionaryError

if TYPE_CHECKING:
    from mechscope.models.model import Model


def feature_search(dictionary: Dictionary, vectors: Tensor, others: Tensor, top: int = 10) -> DictionaryReport:
    """This ranks latents by their mean activation on some tokens' vectors [n, d] above that on others' [m, d].

    Both means are in units of the latent's greatest activation on either, so that a latent that is active everywhere
    comes no higher for being large. The tensors hold `order`, all latents from first to last, and `score` [n_latents].

    >>> from mechscope.dictionaries import TopK
    >>> sae = TopK(8, 16, k=1)
    >>> int(feature_search(sae, sae.W_dec[3:4].detach(), sae.W_dec[8:].detach()).tensors["order"][0])
    3
    """
    if not len(vectors) or not len(others):
        raise DictionaryError("a search needs vectors to find features of, and other vectors to find them against")
    here, there = features(dictionary, vectors), features(dictionary, others)
    most = torch.maximum(here.amax(0), there.amax(0)).clamp_min(1e-12)
    score = (here.mean(0) - there.mean(0)) / most
    order = score.argsort(descending=True)
    measures = []
    for latent in order[:top].tolist():
        measures.append(Measure("score", float(score[latent]), of=f"latent {latent}", ideal=1.0))
        measures.append(Measure("active here", *share(here[:, latent] > 0), of=f"latent {latent}"))
        measures.append(Measure("active elsewhere", *share(there[:, latent] > 0), of=f"latent {latent}"))
    first = int(order[0])
    return DictionaryReport(
        question=f"latents of {len(vectors):,} tokens against {len(others):,} others",
        verdict=f"latent {first}: {measures[1].value:.0%} of these tokens, {measures[2].value:.1%} of the others",
        measures=tuple(measures),
        choices={"score": "difference of mean activations, in units of the greatest"},
        tensors={"order": order, "score": score},
        provenance=described(dictionary),
    )


@torch.no_grad()
def clamp_effects(
    model: Model, dictionary: Dictionary, ids: Any, clamps: Mapping[int, float], active: bool = False
) -> Tensor:
    """This is how much each logit moves, [len(clamps), vocab], where one latent at a time is clamped to a value.

    ids: [rows, pos], or texts of one length in tokens. clamps: {latent: value}, in the dictionary's own units; 0
    ablates. active: whether the mean is over positions where the latent is active in the model's own run, else over
    all. What the dictionary misses of a site is kept. A latent that is nowhere active moves nothing.
    """
    if not isinstance(dictionary.reads, str):
        raise DictionaryError("this dictionary does not say which site it reads: set dictionary.reads")
    out = model.run(ids, save=dictionary.reads)
    before, found = out.logits, features(dictionary, out[dictionary.reads].flatten(0, -2))
    moved = []
    for latent, value in clamps.items():
        after = model.run(ids, edits=dictionary.splices(features={latent: value})).logits
        change = (after - before).flatten(0, -2)
        chosen = found[:, latent] > 0 if active else torch.ones(len(change), dtype=torch.bool)
        moved.append(change[chosen].sum(0) / chosen.sum().clamp_min(1))
    return torch.stack(moved)


def neighbours_share(
    dictionary: Dictionary, labels: Tensor, k: int = 5, draws: int = 20, seed: int = 0
) -> DictionaryReport:
    """This is how often the k latents whose decoders are nearest by cosine bear a latent's own label.

    labels: [n_latents] int64, negative where a latent has none and is left out. The control is the same with the labels
    in a random order, which keeps how frequent each is.

    >>> from mechscope.dictionaries import TopK
    >>> neighbours_share(TopK(8, 32, k=2), torch.zeros(32, dtype=torch.int64))["share"].value
    1.0
    """
    kept = (labels >= 0).nonzero().flatten()
    if len(kept) <= k:
        raise DictionaryError(f"{len(kept)} labelled latents have no {k} neighbours each; label more, or lower k")
    rows = nn.functional.normalize(directions(dictionary)[kept], dim=1)
    near = (rows @ rows.T).fill_diagonal_(-2).topk(k, dim=1).indices
    own = labels[kept]
    generator = torch.Generator().manual_seed(seed)
    same = (own[near] == own[:, None]).double().mean(1)
    chance = []
    for _ in range(draws):
        mixed = own[torch.randperm(len(own), generator=generator)]
        chance.append(float((mixed[near] == mixed[:, None]).double().mean()))
    control = torch.tensor(chance)
    measures = (
        Measure("share", *mean(same), ideal=1.0, about=f"of {k} neighbours, over {len(kept)} latents"),
        Measure("share, permuted", *mean(control), control=True, about="labels in a random order"),
    )
    return DictionaryReport(
        question=f"labels of the {k} nearest of {len(kept):,} latents",
        verdict=f"{measures[0].value:.1%} share a latent's label (labels permuted: {measures[1].value:.1%})",
        measures=measures,
        tensors={"latents": kept, "near": kept[near], "same": same},
        provenance=described(dictionary),
    )


@torch.no_grad()
def completeness(
    dictionary: Dictionary, vectors: Tensor, items: Tensor, least: float = 0.5, parts: int = 4, seed: int = 0
) -> DictionaryReport:
    """This is which items of a category have a latent of their own, and how that depends on how frequent they are.

    vectors: [n, d]. items: [n] int64, the item that a vector is of, negative where it is of none. An item has a latent
    where one fires on it and on little else: its F1 as a detector is at least `least`. Measures: the share of items
    that have one, in all and for `parts` equally many items from the rarest to the most frequent. The control permutes
    items among vectors. The tensors hold `items`, `counts`, `f1` and `latent`, all [items].

    >>> from mechscope.dictionaries import TopK
    >>> sae = TopK(8, 16, k=1)
    >>> completeness(sae, sae.W_dec.detach(), torch.arange(16))["have a latent"].value > 0.9
    True
    """
    known = items[items >= 0].unique()
    if not len(known):
        raise DictionaryError("no vector is of an item; give items [n] with numbers from 0 for those that are")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.stack([(items == item).sum() for item in known])
    score, latent = _detect(dictionary, vectors, items, known)
    control, _ = _detect(dictionary, vectors, items[torch.randperm(len(items), generator=generator)], known)
    has = score >= least
    measures = [
        Measure("have a latent", *share(has), ideal=1.0, about=f"of {len(known)} items, F1 at least {least:g}"),
        Measure("have a latent, permuted", *share(control >= least), control=True, about="items permuted"),
    ]
    for part in counts.argsort().chunk(parts):
        of = f"{int(counts[part].min())} to {int(counts[part].max())} times"
        measures.append(Measure("have a latent", *share(has[part]), of=of, ideal=1.0))
        measures.append(Measure("F1", *mean(score[part]), of=of, ideal=1.0))
    return DictionaryReport(
        question=f"{len(known):,} items in latents of {type(dictionary).__name__} of {dictionary.n_latents:,}",
        verdict=f"{measures[0].value:.1%} have a latent of their own (items permuted: {measures[1].value:.1%})",
        measures=tuple(measures),
        choices={"has a latent": f"F1 >= {least:g} of firing at all"},
        tensors={"items": known, "counts": counts, "f1": score, "latent": latent},
        provenance=described(dictionary),
    )


def _detect(dictionary: Dictionary, vectors: Tensor, items: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """This is the F1 of the best latent for each item, and which latent it is."""
    place = torch.full((len(items),), len(known))
    place[items >= 0] = torch.searchsorted(known, items[items >= 0])
    hits = torch.zeros(len(known) + 1, dictionary.n_latents)
    for part in chunks(len(vectors)):
        hits.index_add_(0, place[part], (features(dictionary, vectors[part]) > 0).float())
    fired = hits.sum(0)
    counts = torch.bincount(place, minlength=len(known) + 1)[:-1]
    best = (2 * hits[:-1] / (fired + counts[:, None])).max(1)
    return best.values, best.indices
