"""A codebook: each vector becomes the sum of the k codes nearest to it in angle; codes are on or off.

    codes = train(Codebook(128, 1024, k=4), model.stream(texts, at="blocks.1.resid_post"), steps=2000)
    model.run(text, edits={"blocks.1.resid_post": codes.splice(error=False)})      as a bottleneck in the model

    finetune(model, [codes], rows_of_ids, steps=1000)         the model learns to live with them; its weights change

As a bottleneck, `bottleneck(x)` passes gradients straight through to x, and codes learn from the squared error alone.

Source: Tamkin et al. 2023, Codebook Features, arXiv:2310.17230, section 2 (cosine similarity, the straight-through
estimator, the sum of k codes); unused codes begin again at an input, as is usual with vector quantisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mechscope.dictionaries.dictionary import Dictionary, Features, Reconstruction
from mechscope.dictionaries.sparse import Sparse, pick, rows_sum
from mechscope.edits import unchanged
from mechscope.errors import DictionaryError
from mechscope.models.run import Pass, Plan

if TYPE_CHECKING:
    from mechscope.models.model import Model


class Codebook(Dictionary):
    """This is a codebook of n_latents codes: features are 1 for the k nearest codes and 0 for the others.

    k: how many codes a vector is the sum of. dead_after: the examples without use after which a code begins again at
    an input of the batch. W_dec: [n_latents, d_in], the codes, of any norm.

    >>> Codebook(16, 64, k=2).encode(torch.randn(3, 16)).sum(1).tolist()
    [2.0, 2.0, 2.0]
    """

    scale_in: Tensor

    def __init__(
        self, d_in: int, n_latents: int, *, k: int = 1, dead_after: int = 10_000, seed: int = 0,
        reads: str | None = None, writes: str | None = None,
    ):  # fmt: skip
        if writes not in (None, reads):
            raise DictionaryError("a codebook takes the place of the site that it reads; leave out writes=")
        super().__init__(d_in, n_latents, reads=reads)
        self.k, self.dead_after, self.seed = k, dead_after, seed
        draw = torch.Generator().manual_seed(seed)
        self.W_dec = nn.Parameter(torch.randn(n_latents, d_in, generator=draw) / k)
        self.register_buffer("scale_in", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def encode(self, x: Tensor) -> Tensor:
        return self.active(x.reshape(-1, self.d_in)).dense().view(*x.shape[:-1], self.n_latents)

    def active(self, x: Tensor) -> Sparse:
        """This is the codes of vectors [n, d_in], each with the value 1."""
        with torch.no_grad():
            inner = self._inner(x)
            found = pick(inner, normalize(self.W_dec, dim=1), None, self._nearest)
        return found.with_values(torch.ones_like(found.values))

    def decode(self, features: Features, x: Tensor | None = None) -> Tensor:
        summed = rows_sum(features, self.W_dec) if isinstance(features, Sparse) else features @ self.W_dec
        return summed / self.scale_in

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        flat = x.reshape(-1, self.d_in)
        inner, found = self._inner(flat), self.active(flat)
        out = rows_sum(found, self.W_dec)
        squared = (inner - out).square().sum(1)
        self._last = inner.detach() if self.training else None
        with torch.no_grad():
            fvu = squared.sum() / (inner - inner.mean(0)).square().sum()
        return Reconstruction((out / self.scale_in).view_as(x), found, {"mse": squared.mean()}, fvu)

    def bottleneck(self, x: Tensor) -> Tensor:
        """This is the sum of the codes in place of x [..., d_in], with gradients to x as if nothing were replaced."""
        return x + (self(x).output.to(x) - x).detach()

    def direction(self, latent: int) -> Tensor:
        return normalize(self.W_dec[latent].detach(), dim=0)

    def options(self) -> dict[str, Any]:
        sizes = {"d_in": self.d_in, "n_latents": self.n_latents, "k": self.k}
        return {**sizes, "dead_after": self.dead_after, "seed": self.seed}

    @torch.no_grad()
    def begin(self, x: Tensor, target: Tensor | None) -> None:
        """This scales inputs to a mean norm of sqrt(d), and starts each code at 1/k of an input, the inputs far apart.

        Each is drawn with a probability that grows with its angle to those before (k-means++, Arthur and Vassilvitskii
        2007): two codes that start in one cluster stay there.
        """
        self.scale_in.copy_(self.d_in**0.5 / x.float().norm(dim=-1).mean())
        inner = self._inner(x.reshape(-1, self.d_in))
        units, draw = normalize(inner, dim=1), torch.Generator().manual_seed(self.seed)
        far = torch.ones(len(units), dtype=torch.float64)
        for code in range(self.n_latents):
            row = int(torch.multinomial(far, 1, generator=draw)) if far.sum() > 0 else code % len(units)
            self.W_dec[code] = inner[row] / self.k
            far = torch.minimum(far, (1 - units @ units[row]).clamp_min(0).square().double().cpu())

    @torch.no_grad()
    def count(self, found: Reconstruction) -> None:
        super().count(found)
        self.steps += 1
        dead = (self.idle > self.dead_after).nonzero().flatten()
        if len(dead) and self._last is not None:
            self._restart(dead, self._last)
            self.idle[dead] = 0

    def _restart(self, codes: Tensor, inner: Tensor) -> None:
        draw = torch.Generator().manual_seed(self.seed + int(self.steps))
        rows = torch.randperm(len(inner), generator=draw)[: len(codes)].to(codes.device)
        self.W_dec[codes[: len(rows)]] = inner[rows] / self.k

    def _inner(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise DictionaryError(f"this codebook is of vectors of width {self.d_in}, and was given {tuple(x.shape)}")
        return x.to(self.W_dec.dtype) * self.scale_in

    def _nearest(self, cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, codes = cosines.topk(min(self.k, self.n_latents), dim=1, sorted=False)
        return values.flatten(), codes.flatten(), torch.full((len(values),), values.shape[1], device=codes.device)


def finetune(
    model: Model,
    codebooks: Sequence[Codebook],
    rows: Iterable[Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    codes_lr: float = 1e-2,
    weight: float = 1.0,
) -> list[float]:
    """This trains a model with codebooks as bottlenecks at the sites that they read; each step's loss is returned.

    rows: ids [rows, context], a batch a step. The loss is that of the next token, whose gradient passes straight
    through to the model, plus `weight` times the codebooks' squared error, which moves the codes alone. The model's
    weights change in place: load it once more for the original. Run it with
    `edits={codes.reads: codes.splice(error=False)}` afterwards, for it has learned to have them.

    Raises DictionaryError for a codebook without a site, and for rows that end early.
    """
    for codes in codebooks:
        if not isinstance(codes.reads, str):
            raise DictionaryError("each codebook needs a site: make it with reads='blocks.1.resid_post'")
    parameters = [{"params": list(model.hf.parameters()), "lr": lr}]
    parameters += [{"params": list(codes.parameters()), "lr": codes_lr} for codes in codebooks]
    optimiser, losses = torch.optim.Adam(parameters), []
    for number, ids in zip(range(steps), rows):
        made: list[tuple[Codebook, Reconstruction]] = []

        def bottleneck(codes: Codebook, x: Tensor, first: bool = number == 0, made=made) -> Tensor:
            flat = x.detach().reshape(-1, codes.d_in)
            if first:
                codes.begin(flat, None)
            made.append((codes, codes(flat)))
            return codes.bottleneck(x)

        edits = [
            (request, unchanged(lambda x, codes=codes: bottleneck(codes, x)))
            for codes in codebooks
            for request in model.resolve(str(codes.reads))
        ]
        work = Pass(model.anatomy, Plan([], edits), range(len(ids)))
        with torch.enable_grad(), model.alone(), work.hooked(model.hf):
            logits = model.forward({"input_ids": ids}).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            sum((weight * found.loss for _, found in made), start=loss).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for codes, found in made:
            codes.count(found)
        losses.append(loss.item())
    if len(losses) < steps:
        raise DictionaryError(f"the rows ended after {len(losses)} of {steps} steps; give more")
    for codes in codebooks:
        codes.eval()
    return losses
