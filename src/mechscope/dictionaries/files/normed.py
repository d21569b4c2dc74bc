"""A dictionary that reads each vector at a norm of its own, as some of SAELens's do: normalised, encoded, and undone.

    constant_norm_rescale    x * sqrt(d) / |x|
    layer_norm               (x - mean) / (std + 1e-5), std over d - 1

Decoding undoes it, so it needs the vectors that were read: decode(features, x).

Source: github.com/decoderesearch/SAELens, sae_lens/saes/sae.py, `_setup_activation_normalization`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Coder, Dictionary, Features, Reconstruction
from mechscope.errors import DictionaryError


class Normed(Dictionary):
    """This is `coder` between a normalisation of each vector by itself and its inverse.

    how: "constant_norm_rescale" or "layer_norm". A transcoder's output is not of the input's norm, and is left as the
    coder gives it.

    >>> from mechscope.dictionaries import ReLU
    >>> Normed(ReLU(64, 512), "layer_norm").encode(torch.randn(8, 64)).shape
    torch.Size([8, 512])
    """

    def __init__(self, coder: Coder | dict[str, Any], how: str, reads: Any = None, writes: Any = None) -> None:
        if isinstance(coder, dict):
            from mechscope import dictionaries

            coder = getattr(dictionaries, coder["architecture"])(**coder["options"], reads=reads, writes=writes)
        assert isinstance(coder, Coder)
        if how not in ("layer_norm", "constant_norm_rescale"):
            raise DictionaryError(f"vectors are normalised by 'layer_norm' or 'constant_norm_rescale', not {how!r}")
        d_out = None if coder.centred else coder.d_out
        super().__init__(coder.d_in, coder.n_latents, d_out, reads=coder.reads, writes=coder.writes)
        self.coder, self.how = coder, how
        self.undoes = coder.d_in == coder.d_out and coder.reads == coder.writes

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This is (vectors as the coder reads them, the factor and the shift that give x back)."""
        x = x.to(self.coder.W_enc.dtype)
        if self.how == "constant_norm_rescale":
            factor = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return x / factor, factor, torch.zeros_like(factor)
        mean = x.mean(-1, keepdim=True)
        deviation = (x - mean).std(-1, keepdim=True)
        return (x - mean) / (deviation + 1e-5), deviation, mean

    def encode(self, x: Tensor) -> Tensor:
        return self.coder.encode(self.normalise(x)[0])

    def active(self, x: Tensor) -> Any:
        """This is the active latents of vectors [n, d_in], with gradients."""
        return self.coder.active(self.normalise(x)[0])

    def decode(self, features: Features, x: Tensor | None = None) -> Tensor:
        if x is None:
            raise DictionaryError(f"this dictionary undoes {self.how}: give decode(features, x) the vectors it read")
        inner, factor, shift = self.normalise(x)
        out = self.coder.decode(features, inner)
        return out * factor + shift if self.undoes else out

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        inner, factor, shift = self.normalise(x)
        wanted = target if target is None or not self.undoes else (target.to(inner) - shift) / factor
        found = self.coder(inner, wanted)
        if not self.undoes:
            return found
        output = found.output * factor + shift
        exact = (x if target is None else target).to(output).reshape(-1, self.d_out)
        missed = (output.detach().reshape(-1, self.d_out) - exact).square().sum()
        found.output, found.fvu = output.to(x.dtype), missed / (exact - exact.mean(0)).square().sum()
        return found

    def direction(self, latent: int) -> Tensor:
        return self.coder.direction(latent)

    def after_step(self) -> None:
        self.coder.after_step()

    def anneal(self, fraction: float) -> None:
        self.coder.anneal(fraction)

    def options(self) -> dict[str, Any]:
        made = {"architecture": type(self.coder).__name__, "options": self.coder.options()}
        return {"coder": made, "how": self.how}

    def __repr__(self) -> str:
        return f"Normed({self.how}: {self.coder!r})" + "".join(
            f"\n  assumed: {what}" for what in self.facts.get("assumptions", [])
        )
