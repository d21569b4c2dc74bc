"""The p-annealed autoencoder: a penalty that starts as L1, which trains well, and ends near L0, which shrinks little.

    loss = |x - x_hat|^2 + coefficient_s * sum_i f_i^p_s,    p_0 = 1 falling to p

The coefficient is changed with p, so that the penalty on the last batches stays what it was:

    coefficient_{s+1} = coefficient_s * sum f^p_s / sum f^p_{s+1}

Source: Karvonen et al. 2024, Measuring Progress in Dictionary Learning for Language Model Interpretability with Board
Game Models, arXiv:2408.00113, section 4 (equations 5 and 6).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Coder, Features

LEAST = 1e-3
"""What is added to an activation under the power, whose slope at 0 would be infinite."""


class PAnnealing(Coder):
    """This is a p-annealed ReLU dictionary; the module gives its equations.

    l1: the first coefficient; it rises from 0 over the first `warmup` of the training. p: the last exponent. start:
    the share of the training after which p falls, in `falls` equal steps. queue: the sums of the last batches [10, 2],
    with the exponent in use and with the next.
    """

    sparse = False
    coefficient: Tensor
    fallen: Tensor
    queue: Tensor

    def __init__(
        self, d_in: int, n_latents: int, d_out: int | None = None, *, l1: float = 4.0, p: float = 0.2,
        start: float = 0.2, falls: int = 16, warmup: float = 0.05, **more: Any,
    ):  # fmt: skip
        super().__init__(d_in, n_latents, d_out, **more)
        self.l1, self.p, self.start, self.falls, self.warmup, self.rising = l1, p, start, falls, warmup, 1.0
        self.register_buffer("coefficient", torch.tensor(float(l1)))
        self.register_buffer("fallen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(10, 2))

    def exponent(self, fallen: int) -> float:
        """This is p after so many of its falls."""
        return 1 - (1 - self.p) * min(fallen, self.falls) / self.falls

    def anneal(self, fraction: float) -> None:
        self.rising = min(1.0, fraction / self.warmup) if self.warmup else 1.0
        due = int(self.falls * max(0.0, fraction - self.start) / (1 - self.start))
        while int(self.fallen) < due:
            now, then = self.queue.sum(0)
            if then > 0:
                self.coefficient *= now / then
            self.fallen += 1
            self.queue.zero_()

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        assert isinstance(found, Tensor)
        fallen = int(self.fallen)
        now = _power(found, self.exponent(fallen))
        with torch.no_grad():
            then = _power(found, self.exponent(fallen + 1))
            self.queue.copy_(torch.cat([self.queue[1:], torch.stack([now, then])[None]]))
        return {"sparsity": self.rising * self.coefficient * now}

    def options(self) -> dict[str, Any]:
        kinds = {"l1": self.l1, "p": self.p, "start": self.start, "falls": self.falls, "warmup": self.warmup}
        return {**super().options(), **kinds}


def _power(found: Tensor, p: float) -> Tensor:
    """This is the mean over rows of sum_i f_i^p."""
    return ((found + LEAST).pow(p) - LEAST**p).sum(1).mean()
