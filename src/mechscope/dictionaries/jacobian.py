"""A pair of dictionaries, of what a part of the model reads and of what it writes, with few links between them.

    pair = JacobianPair(192, 3072, k=16, function=lambda x: mlp(x), reads="blocks.3.ln2", writes="blocks.3.mlp_out")
    train(pair, model.stream(texts, at=["blocks.3.ln2", "blocks.3.mlp_out"], vectors=1024), steps=5000)
    pair.jacobian(x)         [n, k written, k read], with the latents that it is between

Two autoencoders that each read well may still be linked by everything with everything. This pair also makes small the
Jacobian from the latents that are read to those that are written, through the function itself.

Source: Farnik et al. 2025, Jacobian Sparse Autoencoders, arXiv:2502.18147: loss = MSE_x + MSE_y + lambda / k^2 |J|_1, J
of e_y . f . d_x at the active latents. They write J out for one kind of MLP; here each active latent's column is a
Jacobian-vector product, which asks nothing of f.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary, Features, Reconstruction
from mechscope.dictionaries.topk import TopK
from mechscope.errors import DictionaryError

Function = Callable[[Tensor], Tensor]


class JacobianPair(Dictionary):
    """This is two TopK autoencoders, `first` of what `function` reads and `second` of what it writes.

    function: vectors [..., d_in] to vectors [..., d_out], differentiable; None in a pair that was read from a file,
    which then has no Jacobian. k: active latents of both. weight: lambda. links: how many vectors of a batch the
    Jacobian is taken on (its cost is k times the function's). To encode and decode is the first's affair; use
    `pair.second` for what is written.
    """

    def __init__(
        self, d_in: int, n_latents: int, d_out: int | None = None, *, k: int = 32, function: Function | None = None,
        weight: float = 1.0, links: int = 256, n_written: int | None = None, seed: int = 0,
        reads: str | None = None, writes: str | None = None, **more: Any,
    ):  # fmt: skip
        super().__init__(d_in, n_latents, d_out, reads=reads, writes=writes)
        self.first = TopK(d_in, n_latents, k=k, seed=seed, reads=reads, **more)
        self.second = TopK(self.d_out, n_written or n_latents, k=k, seed=seed + 1, reads=writes, **more)
        self.k, self.weight, self.links, self.seed, self.more = k, weight, links, seed, more
        self._function = [function]  # in a list, so that torch does not take its weights for ours
        self.idle = self.first.idle

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        if target is None:
            raise DictionaryError("a pair learns from (x, what the function makes of x); give both")
        read, written = self.first(x), self.second(target)
        losses = {f"{name} read": value for name, value in read.losses.items()}
        losses |= {f"{name} written": value for name, value in written.losses.items()}
        if self.weight:
            losses["jacobian"] = self.weight / self.k**2 * self.jacobian(x[: self.links])[0].abs().sum((1, 2)).mean()
        self._written = written
        return Reconstruction(read.output, read.features, losses, read.fvu)

    def jacobian(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This is d s_written / d s_read at vectors [n, d_in], with the latents: ([n, k, k], [n, k], [n, k]).

        Entry [i, j]: written latent i, read latent j; in the dictionaries' scaled units. A vector with fewer than k
        active latents has columns or rows of 0. Raises DictionaryError without a function.
        """
        (function,) = self._function
        if function is None:
            raise DictionaryError("this pair has no function to differentiate: make it with function=, then load it")
        values, read = self._active(self.first, self.first.inner(x))
        inner = (values[..., None] * self.first.W_dec[read]).sum(1) + self.first.b_dec
        size_in, size_out = self.first.scale_in, self.second.scale_out
        rows = self.first.W_dec[read] * (values > 0)[..., None]

        def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.jvp(lambda h: function(h / size_in) * size_out, (inner,), (tangent,))[:2]

        out, columns = torch.func.vmap(along, in_dims=1, out_dims=(None, 1))(rows)  # type: ignore[arg-type]
        made, written = self._active(self.second, out - self.second.b_dec)
        links = torch.einsum("nid,njd->nij", self.second.W_enc[written], columns)
        return links * (made > 0)[..., None], written, read

    def _active(self, coder: TopK, inner: Tensor) -> tuple[Tensor, Tensor]:
        """This is the k greatest features of each vector and their latents [n, k]."""
        with torch.no_grad():
            latents = (inner @ coder.W_enc.T + coder.b_enc).topk(self.k, dim=1).indices
        values = torch.einsum("nd,nkd->nk", inner, coder.W_enc[latents]) + coder.b_enc[latents]
        return values.relu(), latents

    # All else is the two autoencoders'

    def encode(self, x: Tensor) -> Tensor:
        return self.first.encode(x)

    def decode(self, features: Features, x: Tensor | None = None) -> Tensor:
        return self.first.decode(features)

    def direction(self, latent: int) -> Tensor:
        return self.first.direction(latent)

    def begin(self, x: Tensor, target: Tensor | None) -> None:
        if target is None:
            raise DictionaryError("a pair learns from (x, what the function makes of x); give both")
        self.first.begin(x, None)
        self.second.begin(target, None)

    def after_step(self) -> None:
        self.first.after_step()
        self.second.after_step()

    def count(self, found: Reconstruction) -> None:
        self.first.count(found)
        self.second.count(self._written)

    def options(self) -> dict[str, Any]:
        sizes = {"d_in": self.d_in, "n_latents": self.n_latents, "d_out": self.d_out, "k": self.k}
        return {
            **{**sizes, "weight": self.weight, "links": self.links, "n_written": self.second.n_latents},
            **{"seed": self.seed, **self.more},
        }
