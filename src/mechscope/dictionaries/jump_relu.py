"""The JumpReLU autoencoder: a ReLU that jumps, with a threshold for each latent that is trained through the jump.

    f    = pi * [pi > theta],  pi = W_enc (x - b_dec) + b_enc
    loss = |x - x_hat(f)|^2 + penalty + wake * sum_i relu(theta_i - pi_i) |W_dec_i|

    penalty   l0 * |f|_0                            Rajamanoharan et al. 2024, equation 9
              l0 * (|f|_0 / target - 1)^2           their appendix F, and Gemma Scope 2: a mean |f|_0 of `target`
              l0 * sum_i tanh(c f_i |W_dec_i|)      Conerly et al. 2025: smooth, so that the encoder feels it too

The jump has no derivative; thresholds get the derivative of the expected loss, estimated with a rectangle kernel of
width `bandwidth` from the pre-activations that lie near them (equations 11 and 12). `wake` is so small that only the
dead latents feel it, which nothing else moves (Conerly et al.); Adam makes their steps as long as any other's.

Sources: Rajamanoharan et al. 2024, Jumping Ahead, arXiv:2407.14435; Conerly et al. 2025,
https://transformer-circuits.pub/2025/january-update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mechscope.dictionaries.dictionary import Coder, Features
from mechscope.dictionaries.sparse import Sparse, above
from mechscope.errors import DictionaryError, did_you_mean

PENALTIES = ("tanh", "step", "target")


class JumpReLU(Coder):
    """This is a JumpReLU dictionary; the module gives its equations, for inputs of mean norm sqrt(d).

    l0: the penalty's weight; it rises from 0 over the first `warmup` of the training. penalty: "step", "target" or
    "tanh"; with a `target` it is "target". bandwidth: the width of the kernel. threshold: what theta starts at; it
    stays positive, for its logarithm is trained. c: how steep the tanh is. wake: see the module.

    >>> sae = JumpReLU(64, 512, threshold=0.5)
    >>> f = sae.encode(torch.randn(8, 64))
    >>> bool((f[f > 0] > 0.5).all())
    True
    """

    sparse = False

    def __init__(
        self, d_in: int, n_latents: int, d_out: int | None = None, *, l0: float = 1.0, penalty: str = "tanh",
        target: float | None = None, bandwidth: float = 1.0, threshold: float = 0.1, c: float = 4.0,
        warmup: float = 0.05, wake: float = 3e-6, **more: Any,
    ):  # fmt: skip
        super().__init__(d_in, n_latents, d_out, **more)
        if penalty not in PENALTIES:
            near = did_you_mean(penalty, PENALTIES)
            raise DictionaryError(f"JumpReLU has no penalty {penalty!r}{near}; it has {', '.join(PENALTIES)}")
        if penalty == "target" and target is None:
            raise DictionaryError("the penalty 'target' needs target=, the mean number of active latents to aim at")
        self.l0, self.target, self.penalty = l0, target, penalty if target is None else "target"
        self.bandwidth, self.c, self.warmup, self.rising = bandwidth, c, warmup, 1.0
        self.first, self.wake = threshold, wake
        self.log_threshold = nn.Parameter(torch.full((n_latents,), threshold).log())

    @property
    def threshold(self) -> Tensor:
        """This is theta [n_latents], in scaled units."""
        return self.log_threshold.exp()

    def anneal(self, fraction: float) -> None:
        self.rising = min(1.0, fraction / self.warmup) if self.warmup else 1.0

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return above(pre, self.threshold)

    def activate(self, pre: Sparse) -> Sparse:
        jumped = _Jump.apply(pre.values, self.threshold[pre.latents], self.bandwidth)
        return pre.with_values(jumped)  # type: ignore[arg-type]

    def activation(self, pre: Tensor) -> Tensor:
        return _Jump.apply(pre, self.threshold, self.bandwidth)  # type: ignore[return-value]

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        assert isinstance(found, Tensor)
        assert isinstance(pre, Tensor)
        norms = self.W_dec.norm(dim=1)
        if self.penalty == "tanh":
            sparsity = (self.c * found * norms).tanh().sum(1).mean()
        else:
            sparsity = _Step.apply(pre, self.threshold, self.bandwidth).sum(1).mean()  # type: ignore[union-attr]
        if self.target is not None:
            sparsity = (sparsity / self.target - 1).square()
        return {
            "sparsity": self.rising * self.l0 * sparsity,
            "wake": self.wake * ((self.threshold - pre).relu() @ norms).mean(),
        }

    def options(self) -> dict[str, Any]:
        kinds = {"l0": self.l0, "penalty": self.penalty, "target": self.target, "c": self.c, "warmup": self.warmup}
        shape = {"bandwidth": self.bandwidth, "threshold": self.first, "wake": self.wake}
        return {**super().options(), **kinds, **shape}


class _Jump(torch.autograd.Function):
    """z [z > theta]; d/dtheta is -(theta / bandwidth) K((z - theta) / bandwidth)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, theta = ctx.saved_tensors
        near = grad * ((z - theta).abs() < ctx.bandwidth / 2)
        return grad * (z > theta), -theta / ctx.bandwidth * near.sum_to_size(theta.shape), None


class _Step(torch.autograd.Function):
    """[z > theta]; d/dtheta is -(1 / bandwidth) K((z - theta) / bandwidth), and d/dz is 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, theta = ctx.saved_tensors
        near = grad * ((z - theta).abs() < ctx.bandwidth / 2)
        return None, -near.sum_to_size(theta.shape) / ctx.bandwidth, None
