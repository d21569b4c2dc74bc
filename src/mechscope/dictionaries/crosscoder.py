"""The crosscoder: one set of latents that reads several layers, or several models, and writes each of them.

    f       = activation(sum over sites of W_enc_s (x_s - b_s) + b_enc)
    x_hat_s = f W_dec_s + b_s
    loss    = sum over sites of |x_s - x_hat_s|^2 + sparsity

    l1      l1 * sum_i f_i sum_s |W_dec_s,i|         Lindsey et al. 2024
    k       none: the n * k greatest f_i sum_s |W_dec_s,i| of the batch are kept     Minder et al. 2025

The L1 penalty makes latents look exclusive to a site that are not: it shrinks a small decoder to nothing, and splits a
latent into one for each site. Keeping a fixed number instead mends both, and `latent_scaling.py` tells such latents.

Sources: Lindsey et al. 2024, Sparse Crosscoders, https://transformer-circuits.pub/2024/crosscoders; Minder, Dumas et
al. 2025, Overcoming Sparsity Artifacts in Crosscoders to Interpret Chat-Tuning, arXiv:2504.02922.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries.batch_topk import BatchTopK
from mechscope.dictionaries.dictionary import Coder, Features, Reconstruction
from mechscope.dictionaries.sparse import Sparse
from mechscope.errors import DictionaryError


class Crosscoder(BatchTopK):
    """This is a crosscoder of `n_sites` sites of width d; it reads and writes tensors [n, n_sites, d].

    k: how many latents are active in a vector, on average. l1: the weight of a penalty in place of k; it rises from 0
    over the first `warmup` of the training. reads: the sites, in order; batches by site are stacked. Each site has a
    scale of its own, so that none counts for more.

    >>> crosscoder = Crosscoder(2, 64, 512, k=8)
    >>> crosscoder(torch.randn(10, 2, 64)).output.shape, crosscoder.norms().shape
    (torch.Size([10, 2, 64]), torch.Size([512, 2]))
    """

    def __init__(
        self, n_sites: int, d: int, n_latents: int, *, k: int = 32, l1: float | None = None, warmup: float = 0.05,
        **more: Any,
    ):  # fmt: skip
        super().__init__(n_sites * d, n_latents, k=k, **more)
        self.n_sites, self.d, self.l1, self.warmup, self.rising = n_sites, d, l1, warmup, 1.0
        self.sparse = l1 is None
        self.register_buffer("scale_in", torch.ones(n_sites * d))
        self.register_buffer("scale_out", torch.ones(n_sites * d))
        self.after_step()

    # Vectors of all sites lie side by side inside

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(self._beside(x))

    def active(self, x: Tensor) -> Sparse:
        return super().active(self._beside(x))

    def decode(self, features: Features, x: Tensor | None = None) -> Tensor:
        return super().decode(features).unflatten(-1, (self.n_sites, self.d))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        found = super().forward(self._beside(x), None if target is None else target.flatten(-2))
        found.output = found.output.unflatten(-1, (self.n_sites, self.d))
        return found

    def begin(self, x: Tensor, target: Tensor | None) -> None:
        """This scales each site to a mean norm of sqrt(d), and puts the middle at the mean."""
        norms = x.float().norm(dim=-1).mean(0)
        self.scale_in.copy_((self.d**0.5 / norms).repeat_interleave(self.d))
        self.scale_out.copy_(self.scale_in)
        with torch.no_grad():
            self.b_dec.copy_(x.float().flatten(-2).mean(0) * self.scale_out)

    # Sparsity

    def chosen(self, inner: Tensor) -> Sparse:
        return super().chosen(inner) if self.l1 is None else Coder.chosen(self, inner)

    def anneal(self, fraction: float) -> None:
        self.rising = min(1.0, fraction / self.warmup) if self.warmup else 1.0

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        if self.l1 is None:
            return super().penalties(found, pre, inner, error)
        assert isinstance(found, Tensor)
        return {"sparsity": self.rising * self.l1 * (found @ self.norms().sum(1)).mean()}

    @torch.no_grad()
    def after_step(self) -> None:
        """This keeps sum_s |W_dec_s,i| the same for all latents, so that the greatest f_i are the greatest products."""
        if self.l1 is None:
            self.W_dec.mul_(self.n_sites**0.5 / self.norms().sum(1, keepdim=True).clamp_min(1e-8))

    # What differs between sites

    def norms(self) -> Tensor:
        """This is the norms of the decoders [n_latents, n_sites], each site in units of its own mean norm."""
        return self.W_dec.unflatten(1, (self.n_sites, self.d)).norm(dim=2)

    def exclusivity(self, site: int = 1, against: int = 0) -> Tensor:
        """This is the relative decoder norm [n_latents] of Minder et al.: 1 where only `site` has the latent, 0 where
        only `against` has it, 1/2 where both have it alike."""
        here, there = self.norms().detach()[:, site], self.norms().detach()[:, against]
        return ((here - there) / torch.maximum(here, there).clamp_min(1e-12) + 1) / 2

    def direction(self, latent: int, site: int = 0) -> Tensor:
        """This is what a latent writes at one of the sites [d], of norm 1."""
        if not -self.n_sites <= site < self.n_sites:
            raise DictionaryError(f"there is no site {site}: this crosscoder has {self.n_sites}, from 0")
        row = super().direction(latent).unflatten(0, (self.n_sites, self.d))[site]
        return torch.nn.functional.normalize(row, dim=0)

    def options(self) -> dict[str, Any]:
        kinds = {"k": self.k, "aux": self.aux, "dead_after": self.dead_after, "l1": self.l1, "warmup": self.warmup}
        return {"n_sites": self.n_sites, "d": self.d, "n_latents": self.n_latents, **kinds, "seed": self.seed}

    def _beside(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.n_sites, self.d):
            raise DictionaryError(
                f"this crosscoder reads {self.n_sites} sites of width {self.d}, tensors [n, {self.n_sites}, {self.d}], "
                f"and was given {tuple(x.shape)}; torch.stack(the sites' vectors, dim=1) makes one"
            )
        return x.flatten(-2)
