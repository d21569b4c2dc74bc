"""Absorption: a concept's latent is silent where it should fire, and a more special latent has taken its part over.

A dictionary that pays for each active latent is cheaper if the latent of "short" also writes what the latent of
"starts with S" would have written, and the latter rests. For each row of a concept that a probe knows to be there:

    absorbed     every main latent is silent, and the latent that writes most along the probe p is aligned with p and
                 writes at least `least` of (x - b_dec) . p
    fraction     what up to three aligned other latents write along p, of what they and the main latents write, where it
                 is at least `least` of (x - b_dec) . p and the main latents do not write it all

The main latents are those of a k-sparse probe, taken in for as long as each raises its F1 by more than `split`: a
concept that is honestly split into a few parts is not absorbed. Where the concept's true direction is known they are
better found by it ("aligned"): the latents that point along p.

Sources: Chanin et al. 2024, "A is for Absorption" (arXiv:2409.14507), sections 3 and 4 (tau_fs = 0.03); the fraction
and the thresholds, Karvonen et al. 2025 (SAEBench, arXiv:2503.09532). Here x is taken without the decoder's bias, which
no latent writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.concepts import f1
from mechscope.dictionaries.evaluating.probes import Probe, balanced, fit, k_sparse
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import Labels, bias, directions, features, halves, named, usable
from mechscope.dictionaries.evaluating.tally import mean, share

SPLIT = 0.03
LEAST = 0.4
ALIGNED = 0.1
ABSORBERS = 3
MAIN = 10
"""At most so many main latents."""


def feature_absorption(
    dictionary: Dictionary,
    x: Tensor,
    labels: Labels,
    probes: Mapping[str, Tensor] | Tensor | None = None,
    main: Literal["sparse", "aligned"] = "sparse",
    split: float = SPLIT,
    least: float = LEAST,
    aligned: float = ALIGNED,
    seed: int = 0,
) -> DictionaryReport:
    """This measures how often each concept's latent is silent while another latent writes the concept.

    x: [n, d]. labels: {name: [n] bool}, or [n, concepts]. probes: each concept's direction, by name or [concepts, d];
    logistic probes are fitted on half of the rows unless given. main: how the main latents are chosen, see the module.
    split: what a further main latent must add to the F1. least: what share of x along the probe counts as taken over.
    aligned: the cosine from which a latent is aligned with the probe.

    The report's choices name each concept's main latents and absorbers. An interval of the whole is over concepts, of
    a concept over its rows. Raises DictionaryError where no concept is both present and absent.

    >>> from mechscope.dictionaries import TopK
    >>> x = torch.randn(400, 8)
    >>> 0 <= feature_absorption(TopK(8, 32, k=4), x, x[:, 0] > 0.5)["absorbed"].value <= 1
    True
    """
    choosing, judging = halves(len(x), seed)
    concepts = usable(named(labels, len(x)), (choosing, judging))
    given = _directions(probes, concepts)
    active, writers = features(dictionary, x), directions(dictionary)
    centred = x - bias(dictionary)
    measures, tensors = [], {}
    for name, held in concepts.items():
        on = held.to(x.device)
        rows = balanced(on, choosing, seed)
        if name in given:
            p = given[name].to(x) / given[name].norm()
            sees = centred @ p > 0
        else:
            probe: Probe = fit(x[rows], on[rows])
            p, sees = probe.direction.to(x), probe(x)
        cosine = torch.nn.functional.cosine_similarity(writers, p[None], dim=1, eps=1e-12)
        if main == "aligned":
            mains = _aligned(cosine)
        else:
            mains = _main(active[rows], on[rows], split)
        where = judging.to(x.device)
        where = where[on[where] & sees[where]]
        found = _absorbed(active[where], centred[where] @ p, writers @ p, cosine, mains, least, aligned)
        tensors |= {f"main.{name}": mains.cpu(), f"absorbers.{name}": found["absorber"][found["absorbed"]].cpu()}
        measures += [
            Measure(
                "absorbed",
                *share(found["absorbed"]),
                of=name,
                ideal=0.0,
                unit="share of its rows",
                about=_named(mains, found),
            ),
            Measure("fraction", *mean(found["fraction"]), of=name, ideal=0.0, unit="share of the projection"),
            Measure("main latents fire", *share(~found["silent"]), of=name, ideal=1.0, unit="share of its rows"),
            Measure("main latents", len(mains), of=name, ideal=1.0),
        ]
    whole = []
    for name, ideal, about in (
        ("absorbed", 0.0, "mean over concepts"),
        ("fraction", 0.0, "mean over concepts"),
        ("main latents fire", 1.0, "mean over concepts"),
    ):
        values = torch.tensor([m.value for m in measures if m.name == name])
        whole.append(Measure(name, *mean(values), ideal=ideal, about=about))
    return DictionaryReport(
        question=f"absorption of {len(concepts)} concepts in {type(dictionary).__name__}",
        verdict=f"{whole[0].value:.1%} of a concept's rows are absorbed; the fraction is {whole[1].value:.3f}",
        measures=(*whole, *measures),
        choices={
            "probes": "given" if given else "logistic, on half of the rows",
            "main latents": f"those of a k-sparse probe whose F1 each raises by more than {split:g}"
            if main == "sparse"
            else "those nearest to the probe",
            "absorbed": f"main latents silent, the strongest along the probe writes at least {least:g} of it",
            "aligned": f"cosine at least {aligned:g}",
        },
        tensors=tensors,
        provenance=described(dictionary),
    )


def _directions(probes: Mapping[str, Tensor] | Tensor | None, concepts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This is the directions that were given, by concept; a matrix [concepts, d] has them in the labels' order."""
    if probes is None:
        return {}
    if isinstance(probes, Mapping):
        return {str(name): p for name, p in probes.items() if str(name) in concepts}
    table = probes[None] if probes.ndim == 1 else probes
    return {name: table[int(name)] for name in concepts if name.isdigit() and int(name) < len(table)}


def _main(active: Tensor, on: Tensor, split: float) -> Tensor:
    """This is the latents of a k-sparse probe, of the least k from which one more adds at most `split` to its F1."""
    order = k_sparse(active, on, MAIN)
    best = 0.0
    for k in range(1, len(order) + 1):
        score = float(f1(fit(active[:, order[:k]], on)(active[:, order[:k]]), on))
        if k > 1 and score <= best + split:
            return order[: k - 1]
        best = score
    return order


def _aligned(cosine: Tensor) -> Tensor:
    """This is the latents nearest to a direction: the nearest, and those that are as near within a twentieth."""
    return (cosine >= 0.95 * cosine.max()).nonzero().flatten()[:MAIN]


def _absorbed(
    active: Tensor, along: Tensor, written: Tensor, cosine: Tensor, mains: Tensor, least: float, aligned: float
) -> dict[str, Tensor]:
    """This is, for each row [n]: whether it is absorbed and by which latent, whether the main are silent, the fraction.

    active: [n, n_latents]. along: x . p [n]. written: what a unit of each latent writes along p. cosine: with p.
    """
    silent = (active[:, mains] == 0).all(1)
    parts = active * written
    strongest, absorber = parts.max(1)
    there = along > 0
    absorbed = silent & there & (cosine[absorber] >= aligned) & (strongest >= least * along)

    others = parts.clone()
    others[:, mains] = 0
    others = others.masked_fill(cosine < aligned, 0).clamp_min(0)
    taken = others.topk(min(ABSORBERS, others.shape[1]), dim=1).values.sum(1)
    kept = parts[:, mains].sum(1)
    counted = there & (taken >= least * along) & (kept < along)
    missing = torch.minimum(taken, along - kept)
    fraction = torch.where(kept <= 0, 1.0, missing / (missing + kept.clamp_min(0)).clamp_min(1e-12))
    return {
        "absorbed": absorbed,
        "absorber": absorber,
        "silent": silent,
        "fraction": torch.where(counted, fraction.clamp(0, 1), 0.0),
    }


def _named(mains: Tensor, found: dict[str, Tensor], most: int = 3) -> str:
    """This says which latents are the main ones, and which absorb how many of the absorbed rows."""
    text = "main " + ", ".join(str(int(i)) for i in mains[:most]) + ("…" if len(mains) > most else "")
    absorbers = found["absorber"][found["absorbed"]]
    if not len(absorbers):
        return text
    names, counts = absorbers.unique(return_counts=True)
    order = counts.argsort(descending=True)[:most]
    shares = (f"{int(names[i])} ({int(counts[i]) / len(absorbers):.0%})" for i in order)
    return f"{text}; absorbed by {', '.join(shares)}"
