"""How well a found dictionary matches the true one: cosines, with the control that says what chance gives.

    mean_max_cosine(found, true)     the mean over true atoms of the best cosine with any found one
    matched_cosine(found, true)      the same, each found atom used once (Hungarian): duplicates do not count twice
    chance(found, true)              what found atoms with their entries shuffled reach
    atom_recovery(dictionary, atoms) all of them, both ways, as a report

All take [atom d] matrices of any two numbers of atoms, of any lengths. A direction and its negative differ: codes are
nonnegative, so that a feature has a sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import directions
from mechscope.dictionaries.evaluating.tally import mean, share
from mechscope.errors import DictionaryError


def cosines(found: Tensor, true: Tensor) -> Tensor:
    """This is the cosine of every true atom with every found one, [true found]; 0 with a found atom of length 0.

    Raises DictionaryError where the two live in different dimensions, or one is empty.
    """
    if found.ndim != 2 or true.ndim != 2 or found.shape[1] != true.shape[1] or not len(found) or not len(true):
        raise DictionaryError(
            f"found atoms {list(found.shape)} do not compare with true atoms {list(true.shape)}; "
            "give two matrices [atom d] of one d (a decoder's weight [d atom] is to be transposed)"
        )
    unit = [atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-12) for atoms in (found, true)]
    return unit[1] @ unit[0].T


def mean_max_cosine(found: Tensor, true: Tensor) -> float:
    """This is the mean over true atoms of the largest cosine with any found atom (MMCS, Sharkey et al. 2022).

    >>> mean_max_cosine(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.eye(2))
    1.0
    """
    return float(cosines(found, true).amax(1).mean())


@dataclass(frozen=True)
class Match:
    """This is the best one-to-one matching of found atoms with true ones.

    cosine: [true], 0 for a true atom left without a partner. partner: [true], the index of the found atom, or -1.
    """

    cosine: Tensor
    partner: Tensor

    @property
    def mean(self) -> float:
        """This is the mean cosine over all true atoms."""
        return float(self.cosine.mean())

    def recovered(self, least: float = 0.9) -> float:
        """This is the share of true atoms whose partner is within a cosine of `least`."""
        return float((self.cosine >= least).float().mean())


def matched_cosine(found: Tensor, true: Tensor) -> Match:
    """This matches each true atom with at most one found atom, and the other way round, for the largest total cosine.

    >>> twice = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # one atom found twice
    >>> mean_max_cosine(twice, torch.eye(2)), matched_cosine(twice, torch.eye(2)).cosine.tolist()
    (0.5, [1.0, 0.0])
    """
    from scipy.optimize import linear_sum_assignment

    table = cosines(found, true).detach().cpu()
    rows, columns = (torch.as_tensor(index) for index in linear_sum_assignment(table.numpy(), maximize=True))
    cosine, partner = torch.zeros(len(true)), torch.full((len(true),), -1)
    cosine[rows], partner[rows] = table[rows, columns].float(), columns
    return Match(cosine, partner)


def chance(found: Tensor, true: Tensor, seed: int = 0, times: int = 5) -> float:
    """This is the mean `mean_max_cosine` of found atoms each of whose entries were shuffled: the control.

    >>> 0.2 < chance(torch.eye(64), torch.eye(64)) < 0.9  # eyes stay eyes, so that some meet by chance
    True
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(times):
        values.append(mean_max_cosine(shuffled(found, generator), true))
    return sum(values) / times


def shuffled(found: Tensor, generator: torch.Generator) -> Tensor:
    """This is found atoms [atom d] each of whose entries were shuffled."""
    return found.detach().gather(1, torch.rand(found.shape, generator=generator).argsort(1).to(found.device))


def atom_recovery(
    dictionary: Dictionary,
    atoms: Tensor,
    side: Literal["writes", "reads"] = "writes",
    least: float = 0.9,
    latents: Tensor | None = None,
    seed: int = 0,
) -> DictionaryReport:
    """This compares a dictionary's directions with the true atoms [atom d], both ways, with the shuffled control.

    side: the decoder's rows, or the encoder's (what a transcoder reads). least: the cosine from which an atom counts as
    recovered. latents: those to compare, such as those that fired; all unless given. Intervals are over atoms, or over
    latents. The report's tensors hold `best` [atom], each atom's largest cosine, and `latent` [atom], whose it is.

    Source: mean max cosine similarity, Sharkey et al. 2022, "Taking features out of superposition with sparse
    autoencoders"; both ways, as recall and precision.

    >>> from mechscope.dictionaries import TopK
    >>> sae = TopK(16, 32, k=2)
    >>> report = atom_recovery(sae, sae.W_dec.detach())
    >>> round(report["mean max cosine"].value, 3), report["mean max cosine, shuffled"].value < 0.8
    (1.0, True)
    """
    found = directions(dictionary) if side == "writes" else _readers(dictionary)
    found = found if latents is None else found[latents]
    table = cosines(found, atoms)
    best, which = table.max(1)
    matched = matched_cosine(found, atoms)
    generator = torch.Generator().manual_seed(seed)
    control = cosines(shuffled(found, generator), atoms).amax(1)
    measures = (
        Measure("mean max cosine", *mean(best), ideal=1.0, about="over atoms, of the nearest latent"),
        Measure("mean max cosine, latents", *mean(table.amax(0)), ideal=1.0, about="over latents, of the nearest atom"),
        Measure("matched cosine", *mean(matched.cosine), ideal=1.0, about="over atoms, each latent used once"),
        Measure("recovered", *share(matched.cosine >= least), ideal=1.0, about=f"atoms matched within {least:g}"),
        Measure("mean max cosine, shuffled", *mean(control), control=True, about="of latents with shuffled entries"),
    )
    return DictionaryReport(
        question=f"{len(atoms):,} true atoms in {type(dictionary).__name__} of {len(found):,} latents",
        verdict=(
            f"mean max cosine {measures[0].value:.3f} (shuffled: {measures[-1].value:.3f}); "
            f"{measures[3].value:.1%} of the atoms recovered"
        ),
        measures=measures,
        choices={
            "directions": "decoder rows" if side == "writes" else "encoder rows",
            "recovered": f"cosine >= {least:g}",
        },
        tensors={"best": best, "latent": which},
        provenance=described(dictionary),
    )


def _readers(dictionary: Dictionary) -> Tensor:
    encoder = getattr(dictionary, "W_enc", None)
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        raise DictionaryError(f"a {type(dictionary).__name__} has no encoder [n_latents, d_in]; ask for side='writes'")
    return encoder.detach()
