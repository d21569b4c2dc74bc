"""Universal neurons: those that have a double in a model trained from another seed.

    excess(i) = mean over other models m of   max_j corr(a_i, b_j)  -  max_j corr(a_i, (b R)_j)

a_i is a neuron's activation over a text, b the other model's, R a random rotation of each of its layers: what a basis
without meaning would give by chance, and by the size of the layer. Gurnee et al. 2024 (arXiv:2401.12181, eq. 2), who
call a neuron universal where the excess is above 0.5.

Only covariances are kept, so memory does not grow with the text, and the rotated ones follow from them exactly:
cov(a, b R) = cov(a, b) R and var(b R) = diag(R' cov(b) R). No second pass is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope import store
from mechscope.errors import UnitsError
from mechscope.models.stream import contexts
from mechscope.units.harvesting import batches, token_sites
from mechscope.units.which import which_unit

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.models.model import Model

UNIVERSAL = 0.5
"""The excess above which Gurnee et al. call a neuron universal."""


def universal(
    model: Model,
    others: Sequence[Model],
    texts: Iterable[str] | Tensor,
    at: str = "blocks.*.mlp_post",
    context: int = 128,
    batch: int = 16,
    seed: int = 0,
) -> Universal:
    """This is how well each unit of `model` is matched by the best unit of each other model, against rotated layers.

    The models must read the same ids; they may differ in size. One pass over the texts, in memory for a matrix
    [units, units of the other] for each other model. Raises UnitsError without other models or text, and where another
    model reads other ids.

    >>> found = universal(seeds[0], seeds[1:], texts)  # doctest: +SKIP
    >>> found.units()[:3]  # doctest: +SKIP
    ['blocks.0.mlp_post[17]', 'blocks.0.mlp_post[3]', 'blocks.2.mlp_post[90]']
    """
    if not others:
        raise UnitsError("to be universal a unit must be in another model too: give others=[a model of another seed]")
    for other in others:
        if other.d_vocab != model.d_vocab:
            raise UnitsError(f"{other.name} reads {other.d_vocab} ids and {model.name} {model.d_vocab}: not one text")
    mine, theirs = token_sites(model, at), [token_sites(other, at) for other in others]
    pairs: list[Correlations] = []
    for rows in batches(contexts(model, texts, context), batch):
        ids = torch.tensor(rows)
        a = [_activations(model, ids, mine)]
        for i, (other, sites) in enumerate(zip(others, theirs)):
            b = _activations(other, ids, sites)
            if len(pairs) <= i:
                pairs.append(Correlations([x.shape[1] for x in a[0]], [x.shape[1] for x in b]))
            pairs[i].add(a[0], b)
    if not pairs:
        raise UnitsError("there is no text to compare on")
    best, partner, chance = zip(*(pair.best(seed) for pair in pairs))
    names = [f"{site}[{unit}]" for site, size in zip(mine, pairs[0].sizes) for unit in range(size)]
    provenance = {**model.provenance(), "others": [other.provenance() for other in others]}
    provenance["choices"] = {
        "unit": which_unit(model, at),
        "baseline": "rotated layers",
        "universal": f"above {UNIVERSAL}",
    }
    options = {"at": at, "context": context, "batch": batch, "seed": seed, "tokens": pairs[0].count}
    return Universal(
        names, torch.stack(best), torch.stack(partner), torch.stack(chance), {**provenance, "options": options}
    )


@dataclass(frozen=True, eq=False)
class Universal:
    """This is how well each unit is matched in other models: `best`, `chance` and `partner` are [other unit].

    best: the highest correlation with any unit there, `partner` which one; chance: the same with rotated layers.
    """

    names: list[str]
    best: Tensor
    partner: Tensor
    chance: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)
    kind: str = field(default="universal-units", init=False)

    @property
    def choices(self) -> dict[str, str]:
        """This is what was chosen: which tensor a unit is, the baseline, and the excess from which it is universal."""
        return self.provenance.get("choices", {})

    @property
    def excess(self) -> Tensor:
        """This is each unit's mean excess correlation [unit]."""
        return (self.best - self.chance).mean(0)

    def units(self, above: float = UNIVERSAL) -> list[str]:
        """This is the units whose excess is above a threshold, the highest first."""
        order = self.excess.argsort(descending=True)
        return [self.names[i] for i in order.tolist() if float(self.excess[i]) > above]

    def share(self, above: float = UNIVERSAL) -> float:
        """This is the share of units that are universal."""
        return float((self.excess > above).float().mean())

    def to_frame(self) -> pd.DataFrame:
        """This is a row for every unit: its excess, and the least and greatest of its matches over the other models."""
        import pandas as pd

        columns = {"unit": self.names, "excess": self.excess, "chance": self.chance.mean(0)}
        return pd.DataFrame(columns | {"least": self.best.amin(0), "greatest": self.best.amax(0)})

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"best": self.best, "partner": self.partner, "chance": self.chance}
        return tensors, {"names": self.names, "provenance": self.provenance}

    @classmethod
    def from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Universal:
        return cls(header["names"], provenance=header["provenance"], **tensors)

    def save(self, path: str | Path) -> Path:
        """This writes the result to one file, which `ms.open` reads back."""
        return store.save(path, self.kind, *self.to_parts())

    def __repr__(self) -> str:
        return f"Universal({len(self.units())} of {len(self.names)} units, in {len(self.best)} other models)"


class Correlations:
    """This is the covariances of two models' units over a stream of tokens; `sizes`: the units of each layer."""

    def __init__(self, sizes: Sequence[int], other: Sequence[int]):
        self.sizes, self.other, self.count = list(sizes), list(other), 0
        self.sums = torch.zeros(sum(sizes)).double(), torch.zeros(sum(other)).double()
        self.squares = torch.zeros(sum(sizes)).double()
        self.products = torch.zeros(sum(sizes), sum(other)).double()
        self.within = [torch.zeros(size, size).double() for size in other]

    def add(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        """This takes in the activations [tokens units] of each layer of both models, on the same tokens."""
        x, y = torch.cat(list(a), 1), torch.cat(list(b), 1)
        self.count += len(x)
        self.sums[0].add_(x.sum(0))
        self.sums[1].add_(y.sum(0))
        self.squares += x.double().square().sum(0)
        self.products += x.T @ y
        for total, layer in zip(self.within, b):
            total += layer.T @ layer

    def best(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """This is each unit's highest correlation, with which unit, and its highest with the rotated layers."""
        n = self.count
        mean, mean_other = self.sums[0] / n, self.sums[1] / n
        spread = (self.squares / n - mean.square()).clamp_min(0).sqrt()
        covariance = self.products / n - mean[:, None] * mean_other
        generator = torch.Generator().manual_seed(seed)
        found, rotated, start = [], [], 0
        for size, within in zip(self.other, self.within):
            part = slice(start, start + size)
            own = within / n - mean_other[part, None] * mean_other[part]
            turn = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
            found.append(_correlation(covariance[:, part], spread, own.diagonal()))
            turned = _correlation(covariance[:, part] @ turn, spread, (turn * (own @ turn)).sum(0))
            rotated.append(turned.amax(1))
            start += size
        highest = torch.cat(found, 1).max(1)
        return highest.values.float(), highest.indices, torch.stack(rotated, 1).amax(1).float()


def _correlation(covariance: Tensor, spread: Tensor, variance: Tensor) -> Tensor:
    """This is correlations [units others]; a unit that never changes correlates with nothing."""
    scale = spread[:, None] * variance.clamp_min(0).sqrt()
    return torch.where(scale > 1e-12, covariance / scale.clamp_min(1e-12), torch.zeros_like(covariance))


def _activations(model: Model, ids: Tensor, sites: Sequence[str]) -> list[Tensor]:
    with torch.no_grad():
        out = model.run(ids, save=list(sites), stop_at=sites[-1])
    found = (out[site] for site in sites)
    return [(x.transpose(1, 2).flatten(2) if x.dim() == 4 else x).flatten(0, 1).float().cpu() for x in found]
