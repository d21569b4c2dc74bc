"""The BatchTopK autoencoder: the n * k greatest pre-activations of a whole batch, so that hard vectors may use more.

In training a batch of n vectors shares n * k active latents. In use a vector must not depend on its neighbours: a
latent is then active above one threshold, the mean over training's batches of the least pre-activation that was kept.

Source: Bussmann et al. 2024, BatchTopK Sparse Autoencoders, arXiv:2412.06410, equations 3 to 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries import sparse
from mechscope.dictionaries.sparse import Sparse, above, products
from mechscope.dictionaries.topk import TopK

MEMORY = 100
"""How many batches the threshold remembers: it is their running mean."""


class BatchTopK(TopK):
    """This is a BatchTopK dictionary: loss = |x - x_hat|^2 + aux * |e - e_hat|^2 (AuxK, as TopK has it).

    k: how many latents are active in a vector, on average over a batch. aux, dead_after: as for TopK. threshold: a
    buffer, above which latents are active outside training; 0 before any.

    >>> int(BatchTopK(64, 512, k=8).train().encode(torch.randn(10, 64)).count_nonzero())
    80
    """

    threshold: Tensor
    batches: Tensor

    def __init__(self, d_in: int, n_latents: int, d_out: int | None = None, *, k: int = 32, **more: Any):
        super().__init__(d_in, n_latents, d_out, k=k, **more)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.least = 0.0

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return above(pre, self.threshold.to(pre))

    def chosen(self, inner: Tensor) -> Sparse:
        if not self.training:
            return super().chosen(inner)
        # The last batch's least is near this one's, which spares sorting most of what is not kept.
        kept = greatest(inner, self.W_enc, self.b_enc, self.k * len(inner), 0.8 * self.least)
        if torch.is_grad_enabled() and len(kept.values):
            least = kept.values.min()
            self.batches += 1
            self.threshold += (least - self.threshold) / self.batches.clamp(max=MEMORY)
            self.least = least.item()
        return products(inner, self.W_enc, self.b_enc, kept)


@torch.no_grad()
def greatest(x: Tensor, W: Tensor, b: Tensor | None, count: int, floor: float = 0.0) -> Sparse:
    """This is the `count` greatest entries of x @ W.T + b [n, m], of those above 0; no gradients flow.

    The product is made chunk by chunk, and no more than two `count`s of candidates are held beside a chunk. floor: a
    guess at what the least of them exceeds, which saves time; where it was too high everything is done again without.

    >>> greatest(torch.eye(2), torch.tensor([[5.0, -1.0], [3.0, 4.0]]), None, 2).dense().tolist()
    [[5.0, 0.0], [0.0, 4.0]]
    """
    values, places, least = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device), floor
    size = max(1, sparse.CHUNK // len(W))
    buffer = torch.empty(min(size, len(x)), len(W), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        pre = torch.mm(rows, W.T, out=buffer[: len(rows)])
        pre = (pre if b is None else pre.add_(b)).view(-1)
        kept = (pre > least).nonzero().squeeze(1)
        values, places = torch.cat([values, pre[kept]]), torch.cat([places, kept + start * len(W)])
        if len(values) > count:
            values, first = values.topk(count, sorted=False)
            places = places[first]
            least = values.min().item() if count else float("inf")
    if len(values) < count and floor > 0:
        return greatest(x, W, b, count)
    places, order = places.sort()
    counts = torch.bincount(places // len(W), minlength=len(x))
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Sparse(values[order], places % len(W), ends, len(W))
