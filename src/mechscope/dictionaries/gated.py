"""The gated autoencoder: one path says which latents are active, another how strongly; only the first is penalised.

    pi   = W_gate (x - b_dec) + b_gate                       the gate; W_enc and b_enc are its weights
    f    = [pi > 0] * relu(exp(r_mag) * W_gate (x - b_dec) + b_mag)
    loss = |x - x_hat(f)|^2 + l1 * sum_i relu(pi)_i |W_dec_i| + |x - x_hat_frozen(relu(pi))|^2

The last term is what teaches the gate, through a decoder that it may not move. As the penalty is blind to f, the
magnitudes are not shrunk.

Source: Rajamanoharan et al. 2024, Improving Dictionary Learning with Gated Sparse Autoencoders, arXiv:2404.16014,
section 3 and equation 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mechscope.dictionaries.dictionary import Coder, Features
from mechscope.dictionaries.sparse import Sparse


class Gated(Coder):
    """This is a gated dictionary; the module gives its equations.

    l1: the weight of the penalty on the gate; it rises from 0 over the first `warmup` of the training. r_mag, b_mag:
    [n_latents], what the path of magnitudes has of its own.

    >>> bool((Gated(64, 512).encode(torch.randn(8, 64)) >= 0).all())
    True
    """

    sparse = False

    def __init__(
        self, d_in: int, n_latents: int, d_out: int | None = None, *, l1: float = 4.0, warmup: float = 0.05, **more: Any
    ):
        super().__init__(d_in, n_latents, d_out, **more)
        self.l1, self.warmup, self.rising = l1, warmup, 1.0
        self.r_mag = nn.Parameter(torch.zeros(n_latents))
        self.b_mag = nn.Parameter(torch.zeros(n_latents))

    def anneal(self, fraction: float) -> None:
        self.rising = min(1.0, fraction / self.warmup) if self.warmup else 1.0

    def magnitudes(self, gate: Tensor, latents: Tensor | slice = slice(None)) -> Tensor:
        """This is how strongly latents are active, from the gate's pre-activations, with which weights are shared."""
        return (self.r_mag[latents].exp() * (gate - self.b_enc[latents]) + self.b_mag[latents]).relu()

    def activation(self, pre: Tensor) -> Tensor:
        return (pre > 0) * self.magnitudes(pre)

    def activate(self, pre: Sparse) -> Sparse:
        values = self.magnitudes(pre.values, pre.latents)
        return pre.with_values(values).where(values > 0)

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        assert isinstance(found, Tensor) and isinstance(pre, Tensor)
        gate = pre.relu()
        # x - x_hat_frozen(gate), for x_hat is linear in the features and its biases cancel.
        missed = error.detach() + (found.detach() - gate) @ self.W_dec.detach()
        return {
            "sparsity": self.rising * self.l1 * (gate @ self.W_dec.norm(dim=1)).mean(),
            "gate": missed.square().sum(1).mean(),
        }

    def options(self) -> dict[str, Any]:
        return {**super().options(), "l1": self.l1, "warmup": self.warmup}
