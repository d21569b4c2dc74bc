"""The TopK autoencoder: the k greatest pre-activations of each vector, and nothing else to tune.

Source: Gao et al. 2024, Scaling and evaluating sparse autoencoders, arXiv:2406.04093; section 2.3 (TopK), appendix A.2
(AuxK: the dead latents reconstruct what the living ones miss).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Coder, Features
from mechscope.dictionaries.sparse import pick, products, rows_sum, top


class TopK(Coder):
    """This is a TopK dictionary: loss = |x - x_hat|^2 + aux * |e - e_hat|^2, e_hat from the dead latents alone.

    k: how many latents are active in each vector (fewer only where fewer are above 0). aux: the weight of the
    auxiliary loss. dead_after: the examples without firing after which a latent counts as dead.

    >>> TopK(64, 512, k=8).encode(torch.randn(4, 64)).count_nonzero(dim=1).tolist()
    [8, 8, 8, 8]
    """

    def __init__(
        self, d_in: int, n_latents: int, d_out: int | None = None, *, k: int = 32, aux: float = 1 / 32,
        dead_after: int = 100_000, **more: Any,
    ):  # fmt: skip
        super().__init__(d_in, n_latents, d_out, **more)
        self.k, self.aux, self.dead_after = k, aux, dead_after

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return top(pre, self.k)

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        return auxiliary(self, inner, error, self.aux, self.dead_after)

    @torch.no_grad()
    def begin(self, x: Tensor, target: Tensor | None) -> None:
        """This sets scales and the middle; a transcoder's latents start by writing what goes with what they read."""
        super().begin(x, target)
        if not self.centred and target is not None:
            inner, wanted = self.inner(x), target.float() * self.scale_out - self.b_dec
            self.W_dec.zero_()
            for read, written in zip(inner.split(512), wanted.split(512)):
                self.W_dec.add_(self.pre(read).relu().T @ written)
            self.W_dec.copy_(torch.nn.functional.normalize(self.W_dec, dim=1))

    def options(self) -> dict[str, Any]:
        return {**super().options(), "k": self.k, "aux": self.aux, "dead_after": self.dead_after}


def auxiliary(coder: Coder, inner: Tensor, error: Tensor, weight: float, dead_after: int) -> dict[str, Tensor]:
    """This is AuxK: what the top d/2 dead latents of each vector miss of the error, where there are dead latents."""
    dead = (coder.idle > dead_after).nonzero().flatten()
    if not weight or not len(dead) or not torch.is_grad_enabled():
        return {}
    W, b = coder.W_enc[dead], coder.b_enc[dead]
    chosen = pick(inner, W, b, lambda pre: top(pre, coder.d_in // 2))
    missed = error.detach() - rows_sum(products(inner, W, b, chosen), coder.W_dec[dead])
    return {"aux": weight * missed.square().sum(1).mean()}
