"""Whether latents are atoms: atoms that are split over several latents, and latents that are sums of two atoms.

    feature_splitting   how many latents each atom has, by the size of the dictionary
    composed_features   latents whose direction is a sum of two atoms, and which fire for the pair alone

A latent belongs to the atom that it is nearest to, where their cosine is at least a bound. A latent is composed where
one atom does not explain its direction and two together do, with weights of one sign and of like size. An absorbing
latent (`feature_absorption`) is a sum too: what tells it from a composed one is that the parent's own latent is silent
where it fires.

Sources: splitting, Bricken et al. 2023 (Towards Monosemanticity); Leask et al. 2025, "Sparse autoencoders do not find
canonical units of analysis" (arXiv:2502.04878), who compare sizes by decoder cosines above 0.7; composed, Anders et al.
2024, "Sparse autoencoders find composed features in small toy models".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.recovery import cosines, shuffled
from mechscope.dictionaries.evaluating.report import NAN, DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import directions, features
from mechscope.dictionaries.evaluating.tally import mean, share

BALANCE = 0.3
"""The smaller of two weights is at least this share of the greater in a latent that is composed."""


def feature_splitting(
    dictionaries: Mapping[int | str, Dictionary], atoms: Tensor, least: float = 0.7, seed: int = 0
) -> DictionaryReport:
    """This counts the latents of each atom in dictionaries of several sizes.

    atoms: [atom d], the true ones, or the decoder of a smaller dictionary whose features are followed into greater
    ones. least: the cosine from which a latent belongs to an atom. The tensors hold `counts.NAME` [atom].

    >>> from mechscope.dictionaries import TopK
    >>> one = TopK(16, 8, k=2)
    >>> feature_splitting({8: one}, one.W_dec.detach())["latents an atom", "8"].value
    1.0
    """
    measures, tensors = [], {}
    generator = torch.Generator().manual_seed(seed)
    for name, dictionary in dictionaries.items():
        found = directions(dictionary)
        counts = _owned(found, atoms, least)
        tensors[f"counts.{name}"] = counts
        control = _owned(shuffled(found, generator), atoms, least)
        measures += [
            Measure("latents an atom", *mean(counts.double()), of=str(name), about=f"of {len(found):,} latents"),
            Measure("split", *share(counts > 1), of=str(name), ideal=0.0, unit="share of atoms"),
            Measure("found", *share(counts > 0), of=str(name), ideal=1.0, unit="share of atoms"),
            Measure("latents an atom", *mean(control.double()), of=str(name), control=True),
        ]
    each = [m for m in measures if m.name == "latents an atom" and not m.control]
    return DictionaryReport(
        question=f"splitting of {len(atoms):,} atoms over {len(dictionaries)} dictionaries",
        verdict=", ".join(f"{m.value:.2f} latents an atom in {m.of}" for m in each),
        measures=tuple(measures),
        choices={
            "belongs": f"to the nearest atom, where their cosine is at least {least:g}",
            "control": "shuffled entries",
        },
        tensors=tensors,
        provenance={str(name): described(dictionary) for name, dictionary in dictionaries.items()},
    )


def _owned(found: Tensor, atoms: Tensor, least: float) -> Tensor:
    """This is how many latents belong to each atom [atom]."""
    best, owner = cosines(found, atoms).max(0)
    return torch.bincount(owner[best >= least], minlength=len(atoms)).cpu()


def composed_features(
    dictionary: Dictionary,
    atoms: Tensor,
    x: Tensor | None = None,
    codes: Tensor | None = None,
    least: float = 0.9,
    seed: int = 0,
) -> DictionaryReport:
    """This flags the latents whose direction is a sum of two true atoms [atom d], and those that fire for pairs alone.

    least: the cosine from which atoms explain a direction. x: [n, d] and codes: [n, atom], where they are known, say
    which atoms are active when a latent fires. The tensors hold, for each latent: `flagged`, `single` and `together`
    (the cosine with the nearest atom, and with the best sum of it and another), `first` and `second` (those atoms), and
    with codes `both` and `firings`: the share of its firings with both atoms active, and how many there were.

    >>> from mechscope.dictionaries import TopK
    >>> composed_features(TopK(16, 8, k=2), torch.eye(16))["composed"].value
    0.0
    """
    held = _explained(directions(dictionary), atoms, least)
    flagged = held["flagged"]
    control = _explained(shuffled(directions(dictionary), torch.Generator().manual_seed(seed)), atoms, least)["flagged"]
    measures = [
        Measure("composed", *share(flagged), ideal=0.0, unit="share of latents"),
        Measure("single atoms", *share(held["single"] >= least), ideal=1.0, unit="share of latents"),
        Measure("composed, shuffled", *share(control), control=True, unit="share of latents"),
    ]
    if x is not None and codes is not None:
        active = features(dictionary, x) > 0
        on = codes > 0
        pairs = (on[:, held["first"]] & on[:, held["second"]]).cpu()
        firings = active.sum(0).cpu()
        both = (active.cpu() & pairs).sum(0) / firings.clamp_min(1)
        held |= {"both": both, "firings": firings}
        only = (both > least)[flagged & (firings > 0)]
        measures.append(
            Measure(
                "for pairs alone",
                *share(only),
                unit="share of the composed",
                about=f"both atoms in {least:.0%} of firings",
            )
        )
        usual = float(pairs[:, flagged].double().mean()) if flagged.any() else NAN
        measures.append(Measure("pairs active", usual, control=True, about="how often those pairs are active at all"))
    return DictionaryReport(
        question=f"composed features of {type(dictionary).__name__} of {len(flagged):,} latents",
        verdict=f"{int(flagged.sum()):,} latents are sums of two atoms ({measures[0].value:.1%})",
        measures=tuple(measures),
        choices={
            "composed": f"cosine below {least:g} with every atom, at least {least:g} with a sum of two",
            "weights": f"both positive, the smaller at least {BALANCE:g} of the greater",
        },
        tensors=held,
        provenance=described(dictionary),
    )


def _explained(found: Tensor, atoms: Tensor, least: float) -> dict[str, Tensor]:
    """This is how far one atom, and the best sum of it and another, explain each direction [latent d]."""
    unit = found / found.norm(dim=1, keepdim=True).clamp_min(1e-12)
    true = atoms / atoms.norm(dim=1, keepdim=True)
    table = cosines(found, atoms).T  # [latent atom]
    single, first = table.max(1)
    between = true @ true.T
    # The best weights of `first` and each other atom, in closed form: the inverse of their 2 x 2 Gram matrix.
    g = between[first]
    rest = (1 - g.square()).clamp_min(1e-6)
    a, b = (single[:, None] - g * table) / rest, (table - g * single[:, None]) / rest
    squared = a * single[:, None] + b * table
    smaller, greater = torch.minimum(a, b), torch.maximum(a, b)
    fair = (smaller > 0) & (smaller >= BALANCE * greater)
    fair.scatter_(1, first[:, None], False)
    together, second = squared.masked_fill(~fair, 0.0).max(1)
    together = together.clamp(0, 1).sqrt()
    alive = unit.norm(dim=1) > 0.5
    held = {
        "flagged": alive & (single < least) & (together >= least),
        "single": single,
        "together": together,
        "first": first,
        "second": second,
    }
    return {name: tensor.cpu() for name, tensor in held.items()}
