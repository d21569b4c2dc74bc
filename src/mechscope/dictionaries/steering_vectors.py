"""Steering vectors and features: a vector made of features, and a vector taken apart into them.

    steering_vector   v = sum over features of a_i W_dec[i], in the site's own units
    decompose         v ~ sum over few features of a_i W_dec[i], a_i of either sign
    feature_change    what adding v does to the features of activations x: mean over x of encode(x + v) - encode(x)

A dictionary's encoder is not the way to take a vector apart. It was trained on activations, and a steering vector is a
difference of two: its norm and its lack of the mean put it outside that distribution, and an encoder can give no
feature a negative share (Mayne et al. 2024, "Can sparse autoencoders be used to decompose and interpret steering
vectors?", arXiv:2411.08790). What remains are a sparse fit of the decoder's rows, here by gradient pursuit (Blumensath
and Davies 2008, "Gradient pursuits", section III; on dictionaries: Smith et al. 2024, the Google DeepMind team's
"Progress Update #1", whose part on activation steering also makes vectors of features), and the encoder on activations
with the vector added, which are where it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope import store
from mechscope.errors import DictionaryError

if TYPE_CHECKING:
    from mechscope.dictionaries.dictionary import Dictionary


@dataclass(frozen=True)
class Decomposition:
    """This is a vector as a sparse sum of what latents write, the greatest share of its norm first.

    latents, coefficients: [k], the coefficients of decoder rows in the dictionary's own (scaled) units. rebuilt:
    [d_out], their sum in the site's units. explained: 1 - |v - rebuilt|^2 / |v|^2. chance: the same, on average, for
    random vectors taken apart in the same way: what a vector that is none of the dictionary's business would reach.
    """

    latents: Tensor
    coefficients: Tensor
    vector: Tensor
    rebuilt: Tensor
    explained: float
    chance: float

    kind = "decomposition"

    @property
    def cosine(self) -> float:
        """This is the cosine of the vector and what was rebuilt of it."""
        return float(torch.nn.functional.cosine_similarity(self.vector, self.rebuilt, dim=0))

    def features(self) -> dict[int, float]:
        """This is {latent: coefficient}, which `steering_vector` and `splice(features=...)` take."""
        return dict(zip(self.latents.tolist(), self.coefficients.tolist()))

    def save(self, path: str | Path) -> Path:
        """This writes the decomposition; `ms.open(path)` is the inverse."""
        return store.save(path, self.kind, *self.to_parts())

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: getattr(self, name) for name in ("latents", "coefficients", "vector", "rebuilt")}
        return tensors, {"explained": self.explained, "chance": self.chance}

    @classmethod
    def from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Decomposition:
        return cls(**tensors, explained=header["explained"], chance=header["chance"])

    def __str__(self) -> str:
        terms = "\n".join(f"  {latent:>7}  {value:+.4g}" for latent, value in self.features().items())
        return (
            f"{len(self.latents)} latents explain {self.explained:.1%} of the vector's norm squared "
            f"(random vectors: {self.chance:.1%}), cosine {self.cosine:.3f}\n{terms}"
        )


def steering_vector(dictionary: Dictionary, features: Mapping[int, float]) -> Tensor:
    """This is the steering vector [d_out] that features stand for: what they add to the site, in its own units.

    features: {latent: coefficient}, in the units of `encode`. Use it as `ms.add(vector, scale=...)`; a vector of one
    feature is a multiple of `dictionary.direction(latent)`. Raises DictionaryError for a latent that is not there.

    >>> sae = ms.dictionaries.TopK(64, 512, k=8)
    >>> torch.allclose(steering_vector(sae, {3: 2.0}), 2 * sae.direction(3), atol=1e-6)
    True
    """
    weights = torch.zeros(dictionary.n_latents)
    for latent, value in features.items():
        if not -dictionary.n_latents <= latent < dictionary.n_latents:
            raise DictionaryError(f"there is no latent {latent}: this dictionary has {dictionary.n_latents}, from 0")
        weights[latent] = value
    return _written(dictionary, weights[None])[0]


@torch.no_grad()
def decompose(
    dictionary: Dictionary, vector: Tensor, k: int = 10, signed: bool = True, draws: int = 8, seed: int = 0
) -> Decomposition:
    """This takes a vector [d_out] apart into at most k of what the latents write, by gradient pursuit.

    Each step adds the row that goes best with what is left, and moves all coefficients along the gradient; the chosen
    rows' coefficients are then fitted by least squares. signed: whether coefficients may be negative, as those of a
    difference of two activations are. draws: random vectors taken apart besides, for `chance`.

    Raises DictionaryError for a vector of another width, or of zeros.

    >>> sae = ms.dictionaries.TopK(64, 512, k=8)
    >>> found = decompose(sae, 3 * sae.direction(5) - 2 * sae.direction(40), k=2)
    >>> {latent: round(value, 3) for latent, value in found.features().items()}
    {5: 3.0, 40: -2.0}
    """
    rows = _rows(dictionary)
    vector = torch.as_tensor(vector).detach()
    if vector.shape != (rows.shape[1],):
        raise DictionaryError(
            f"a vector of {tuple(vector.shape)} cannot be taken apart by latents that write ({rows.shape[1]},)"
        )
    v = vector.to(rows)
    if not bool(v.norm() > 0):
        raise DictionaryError("the vector is zero everywhere, so there is nothing to take apart")
    latents, coefficients = _fit(rows, v, k, signed)
    rebuilt = coefficients @ rows[latents]
    # Far from the seeds of dictionaries, whose rows may be such draws. (A seed is taken modulo 2^32.)
    random = torch.randn(draws, len(v), generator=torch.Generator().manual_seed(2**31 + seed)).to(v)
    chance = [_explained(r, *_fit(rows, r, k, signed), rows) for r in random]
    order = (coefficients.abs() * rows[latents].norm(dim=1)).argsort(descending=True)
    return Decomposition(
        latents[order].cpu(),
        coefficients[order].cpu(),
        vector,
        rebuilt.to(vector),
        _explained(v, latents, coefficients, rows),
        sum(chance) / len(chance) if chance else float("nan"),
    )


@torch.no_grad()
def feature_change(dictionary: Dictionary, vector: Tensor, at: Tensor) -> Tensor:
    """This is what adding a vector [d_in] to activations `at` [..., d_in] changes of the features, on average [latent].

    Changes are of either sign, and the encoder is given what it was trained on.
    """
    given = at.reshape(-1, at.shape[-1])
    return (dictionary.encode(given + vector.to(given)) - dictionary.encode(given)).mean(0)


def pursue(rows: Tensor, vector: Tensor, k: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    """This is gradient pursuit: at most k rows [m, d] and the coefficients that add up to nearly `vector` [d].

    rows: of any norm; they are compared at norm 1.
    """
    norms = rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
    left = vector.clone()
    weights = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
    chosen: list[int] = []
    for _ in range(min(k, len(rows))):
        fit = rows @ left / norms
        fit[chosen] = 0.0
        best = int((fit.abs() if signed else fit).argmax())
        if not abs(float(fit[best])) > 1e-6 * float(vector.norm()) or (not signed and fit[best] <= 0):
            break
        chosen.append(best)
        here = rows[chosen] / norms[chosen, None]
        uphill = here @ left
        step = uphill @ here
        weights[chosen] += uphill * (left @ step) / (step @ step)
        if not signed:
            weights.clamp_(min=0)
        left = vector - weights[chosen] @ here
    kept = torch.tensor(chosen, dtype=torch.long, device=rows.device)
    return kept, weights[kept] / norms[kept]


def _fit(rows: Tensor, vector: Tensor, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """This is gradient pursuit's choice, with the coefficients that fit best."""
    latents, coefficients = pursue(rows, vector, k, signed)
    if not len(latents):
        return latents, coefficients
    if signed:
        return latents, torch.linalg.lstsq(rows[latents].T.double(), vector.double()[:, None]).solution[:, 0].to(rows)
    from scipy.optimize import nnls

    fitted = nnls(rows[latents].T.double().cpu().numpy(), vector.double().cpu().numpy())[0]
    return latents, torch.from_numpy(fitted).to(rows)


def _explained(vector: Tensor, latents: Tensor, coefficients: Tensor, rows: Tensor) -> float:
    left = vector - coefficients @ rows[latents]
    return 1.0 - float(left.square().sum() / vector.square().sum())


@torch.no_grad()
def _rows(dictionary: Dictionary) -> Tensor:
    """This is what each latent writes, [latent d_out], in the site's units."""
    rows = getattr(dictionary, "W_dec", None)
    if not isinstance(rows, Tensor) or rows.dim() != 2:
        raise DictionaryError(
            f"a {type(dictionary).__name__} does not write at one site by one matrix W_dec [latent d_out], so vectors "
            "cannot be taken apart by it"
        )
    return rows.detach().float() / getattr(dictionary, "scale_out", 1.0)


def _written(dictionary: Dictionary, weights: Tensor) -> Tensor:
    rows = _rows(dictionary)
    return weights.to(rows) @ rows


__all__ = ["Decomposition", "decompose", "feature_change", "pursue", "steering_vector"]
