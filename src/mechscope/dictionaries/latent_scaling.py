"""Latent Scaling: is a latent that looks exclusive to one site of a crosscoder really absent from the other?

For a latent i and a site, beta = argmin sum over vectors of |beta f_i d_i - y|^2, with d_i its decoder at `site` and y

    error            what the crosscoder misses at a site without this latent
    reconstruction   what the crosscoder writes at a site, less the bias

nu is the ratio of a beta at `against` to that at `site`. nu_error near 1: the latent was there too, and its decoder was
shrunk away (complete shrinkage). nu_reconstruction near 1: other latents write the same there (latent decoupling).

Source: Minder, Dumas et al. 2025, Overcoming Sparsity Artifacts in Crosscoders to Interpret Chat-Tuning,
arXiv:2504.02922, section 3.2 and appendix (closed form).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mechscope.dictionaries.crosscoder import Crosscoder


@dataclass(frozen=True)
class Scaling:
    """This is how present each latent is at two sites, whatever its decoders say.

    error, reconstruction: [n_latents, 2], the betas at `against` and at `site`; nan for latents that never fired.
    """

    error: Tensor
    reconstruction: Tensor

    @property
    def shrunk(self) -> Tensor:
        """This is nu_error [n_latents]: near 1 where the decoder at `against` was shrunk away (complete shrinkage)."""
        return self.error[:, 0] / self.error[:, 1]

    @property
    def decoupled(self) -> Tensor:
        """This is nu_reconstruction [n_latents]: near 1 where others write it at `against` (latent decoupling)."""
        return self.reconstruction[:, 0] / self.reconstruction[:, 1]


@torch.no_grad()
def latent_scaling(
    crosscoder: Crosscoder, batches: Iterable[Tensor], *, site: int = 1, against: int = 0, n: int = 100_000
) -> Scaling:
    """This is the betas of all latents, in closed form; the module gives the definitions.

    batches: yields [batch, n_sites, d]; the first n vectors are used. site: where a latent's decoder is taken from;
    against: the site that it is looked for at.

    >>> latent_scaling(Crosscoder(2, 16, 32, k=4), [torch.randn(100, 2, 16)]).shrunk.shape
    torch.Size([32])
    """
    m, d = crosscoder.n_latents, crosscoder.d
    W = crosscoder.W_dec.unflatten(1, (crosscoder.n_sites, d)).transpose(0, 1)  # [sites, latents, d]
    direction = W[site]
    squares, seen = W.new_zeros(m), 0
    sums = W.new_zeros(2, 2, m)  # error or reconstruction; against or site
    for x in batches:
        x = x[: n - seen]
        f = crosscoder.encode(x)
        out = crosscoder.written(f).unflatten(-1, (crosscoder.n_sites, d))
        error = (x.flatten(-2).to(W) * crosscoder.scale_out).unflatten(-1, (crosscoder.n_sites, d)) - out
        out = out - crosscoder.b_dec.unflatten(-1, (crosscoder.n_sites, d))
        squares += f.square().sum(0)
        for column, at in enumerate((against, site)):
            sums[0, column] += (f.T @ error[:, at] * direction).sum(1)
            sums[1, column] += (f.T @ out[:, at] * direction).sum(1)
        seen += len(x)
        if seen >= n:
            break
    own = torch.stack([(W[at] * direction).sum(1) for at in (against, site)])
    fitted = sums / (squares * direction.square().sum(1))
    fitted[0] += own / direction.square().sum(1)  # what the latent itself mends belongs to the error here
    fitted[:, :, squares == 0] = float("nan")
    return Scaling(fitted[0].T, fitted[1].T)
