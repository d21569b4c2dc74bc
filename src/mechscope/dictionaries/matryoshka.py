"""The Matryoshka autoencoder: BatchTopK whose first latents must reconstruct well without the others.

    loss = sum over m in sizes of |x - x_hat_m|^2 + aux,     x_hat_m from the first m latents alone

A small dictionary inside a big one learns general features, and has no room to let specific ones absorb them.

Source: Bussmann et al. 2025, Learning Multi-Level Features with Matryoshka Sparse Autoencoders, arXiv:2503.17547,
section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mechscope.dictionaries.batch_topk import BatchTopK
from mechscope.dictionaries.dictionary import Features
from mechscope.dictionaries.sparse import Sparse, rows_sum
from mechscope.errors import DictionaryError

SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""The paper's prefixes, as shares of the latents: each adds about as many as there were, and one more."""


class Matryoshka(BatchTopK):
    """This is a Matryoshka dictionary on BatchTopK.

    sizes: the lengths of the nested prefixes, rising to n_latents; by default the paper's shares. k and the others: as
    for BatchTopK, over the whole dictionary.

    Raises DictionaryError where the sizes do not rise to n_latents.

    >>> Matryoshka(64, 512).sizes
    [16, 48, 112, 240, 512]
    """

    def __init__(
        self, d_in: int, n_latents: int, d_out: int | None = None, *, sizes: Sequence[int] | None = None, **more: Any
    ):
        super().__init__(d_in, n_latents, d_out, **more)
        self.sizes = sorted({max(1, int(n_latents * s)) for s in SHARES}) if sizes is None else list(sizes)
        if self.sizes != sorted(set(self.sizes)) or self.sizes[0] < 1 or self.sizes[-1] != n_latents:
            raise DictionaryError(f"the sizes {self.sizes} do not rise to the number of latents, {n_latents}")

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        assert isinstance(found, Sparse)
        lacking, nested = error, error.new_zeros(())
        for first, last in reversed(list(zip(self.sizes, self.sizes[1:]))):
            beyond = found.where((found.latents >= first) & (found.latents < last))
            lacking = lacking + rows_sum(beyond, self.W_dec)  # what the first `first` latents miss
            nested = nested + lacking.square().sum(1).mean()
        return {"nested": nested, **super().penalties(found, pre, inner, error)}

    def options(self) -> dict[str, Any]:
        return {**super().options(), "sizes": self.sizes}
