"""The cross-layer transcoder: latents that read one layer's MLP input and write the MLP outputs from there on.

    f_l   = activation(W_enc_l x_l + b_l)
    y_hat_t = sum over l <= t of f_l W_dec_{l -> t} + b_t
    loss  = sum over t of |y_t - y_hat_t|^2 + each layer's penalty, on its decoders of all targets as one vector

Each layer's part is a dictionary of any architecture that writes its targets side by side: its decoder has one row for
a latent, [targets * d_out], so that decoding gathers a latent's whole effect at once.

Source: Ameisen et al. 2025, Circuit Tracing, https://transformer-circuits.pub/2025/attribution-graphs/methods.html,
"Building an Interpretable Replacement Model".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mechscope.dictionaries.dictionary import Coder, Dictionary, Features, Reconstruction
from mechscope.dictionaries.sparse import Sparse
from mechscope.dictionaries.transcoders import transcoder
from mechscope.errors import DictionaryError


class CrossLayerTranscoder(Dictionary):
    """This is a cross-layer transcoder; it reads [n, n_layers, d_in] and writes [n, n_layers, d_out].

    per_layer: the latents of each layer; latent i of layer l is latent l * per_layer + i of the whole. architecture:
    what each layer is ("JumpReLU", "TopK", "BatchTopK" ...); options: that architecture's, for each layer. skip:
    whether each layer's W_skip_l x_l is added to its own output. reads, writes: lists of sites, in order.

    >>> clt = CrossLayerTranscoder(3, 16, 64, architecture="TopK", k=4)
    >>> found = clt(torch.randn(10, 3, 16), torch.randn(10, 3, 16))
    >>> found.output.shape, found.features.shape, clt.decoder(0, 2).shape
    (torch.Size([10, 3, 16]), (10, 192), torch.Size([64, 16]))
    """

    scale_out: Tensor

    def __init__(
        self, n_layers: int, d_in: int, per_layer: int, d_out: int | None = None, *, architecture: str = "JumpReLU",
        skip: bool = False, reads: list[str] | None = None, writes: list[str] | None = None, seed: int = 0,
        **options: Any,
    ):  # fmt: skip
        super().__init__(d_in, n_layers * per_layer, d_out, reads=reads, writes=writes)
        self.n_layers, self.per_layer, self.architecture, self.seed = n_layers, per_layer, architecture, seed
        self.given = options
        width = self.d_out
        layers = [
            transcoder(architecture, d_in, per_layer, (n_layers - at) * width, seed=seed * n_layers + at, **options)
            for at in range(n_layers)
        ]
        self.layers = nn.ModuleList(layers)
        for layer in layers:  # one middle for each target, here, not one for each pair
            del layer.b_dec
            layer.register_buffer("b_dec", torch.zeros(layer.d_out), persistent=False)
        self.b_dec = nn.Parameter(torch.zeros(n_layers, width))
        self.W_skip = nn.Parameter(torch.zeros(n_layers, width, d_in)) if skip else None
        self.register_buffer("scale_out", torch.ones(n_layers, 1))

    def parts_of(self) -> list[Coder]:
        """This is the layers' dictionaries, each of which writes its targets side by side."""
        return list(self.layers)  # type: ignore[arg-type]

    def decoder(self, source: int, target: int) -> Tensor:
        """This is W_dec_{source -> target} [per_layer, d_out], in scaled units; raises DictionaryError for target <
        source."""
        if not 0 <= source <= target < self.n_layers:
            raise DictionaryError(
                f"layer {source} does not write layer {target}: give 0 <= source <= target < {self.n_layers}"
            )
        first = (target - source) * self.d_out
        return self.parts_of()[source].W_dec[:, first : first + self.d_out]

    # The contract

    def encode(self, x: Tensor) -> Tensor:
        self._check(x)
        return torch.cat([layer.encode(x[..., at, :]) for at, layer in enumerate(self.parts_of())], dim=-1)

    def active(self, x: Tensor) -> Sparse:
        """This is the active latents of vectors [n, n_layers, d_in], with gradients."""
        self._check(x)
        return beside([layer.active(x[:, at]) for at, layer in enumerate(self.parts_of())])

    def decode(self, features: Features, x: Tensor | None = None) -> Tensor:
        if isinstance(features, Sparse):
            parts = apart(features, self.n_layers)
        else:
            parts = list(features.split(self.per_layer, dim=-1))
        if self.W_skip is not None and x is None:
            raise DictionaryError("this transcoder has a skip connection: give decode(features, x) what it read")
        return self._written(parts, x) / self.scale_out

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        self._check(x)
        layers, given = self.parts_of(), x.dtype
        x = x.to(self.b_dec.dtype)
        wanted = (x if target is None else target.to(x)) * self.scale_out
        inner = [layer.inner(x[:, at]) for at, layer in enumerate(layers)]
        pre = [layer.chosen(i) if layer.sparse else layer.pre(i) for layer, i in zip(layers, inner)]
        found = [layer.activate(p) if isinstance(p, Sparse) else layer.activation(p) for layer, p in zip(layers, pre)]
        out = self._written(found, x)
        error = wanted - out
        squared = error.square().sum((1, 2))
        losses = {"mse": squared.mean()}
        for at, layer in enumerate(layers):
            for name, value in layer.penalties(found[at], pre[at], inner[at], error[:, at:].flatten(1)).items():
                losses[name] = losses.get(name, 0) + value
        with torch.no_grad():
            fvu = squared.sum() / (wanted - wanted.mean(0)).square().sum()
        joined = beside(found) if isinstance(found[0], Sparse) else torch.cat(found, dim=-1)  # type: ignore[arg-type]
        return Reconstruction((out / self.scale_out).to(given), joined, losses, fvu)

    def direction(self, latent: int, target: int | None = None) -> Tensor:
        """This is what a latent writes [d_out] at a layer, by default its own, of norm 1."""
        if not 0 <= latent < self.n_latents:
            raise DictionaryError(f"there is no latent {latent}: this dictionary has {self.n_latents}, from 0")
        source, row = divmod(latent, self.per_layer)
        decoder = self.decoder(source, source if target is None else target)
        return nn.functional.normalize(decoder[row].detach(), dim=0)

    # Training

    @torch.no_grad()
    def begin(self, x: Tensor, target: Tensor | None) -> None:
        """This scales each layer's inputs and targets to a mean norm of sqrt(d), and puts middles at targets' means."""
        target = (x if target is None else target).float()
        self.scale_out.copy_((self.d_out**0.5 / target.norm(dim=-1).mean(0))[:, None])
        self.b_dec.copy_((target * self.scale_out).mean(0))
        wanted = target * self.scale_out - self.b_dec
        for at, layer in enumerate(self.parts_of()):
            layer.begin(x[:, at], wanted[:, at:].flatten(1))
            layer.scale_out.fill_(1.0)  # outputs are scaled, and given their middle, here
            layer.b_dec.zero_()

    def anneal(self, fraction: float) -> None:
        for layer in self.parts_of():
            layer.anneal(fraction)

    def after_step(self) -> None:
        for layer in self.parts_of():
            layer.after_step()

    @torch.no_grad()
    def count(self, found: Reconstruction) -> None:
        for layer, part in zip(self.parts_of(), apart(found.features, self.n_layers)):
            layer.count(Reconstruction(found.output, part))
        self.idle.copy_(torch.cat([layer.idle for layer in self.parts_of()]))

    def options(self) -> dict[str, Any]:
        sizes = {"n_layers": self.n_layers, "d_in": self.d_in, "per_layer": self.per_layer, "d_out": self.d_out}
        kind = {"architecture": self.architecture, "skip": self.W_skip is not None, "seed": self.seed}
        return {**sizes, **kind, **self.given}

    def _written(self, parts: list[Any], x: Tensor | None) -> Tensor:
        """This is what all layers write [..., n_layers, d_out], in scaled units."""
        sums: list[Any] = list(self.b_dec)
        for at, (layer, part) in enumerate(zip(self.parts_of(), parts)):
            for t, effect in enumerate(layer.written(part).split(self.d_out, dim=-1), start=at):
                sums[t] = sums[t] + effect
            if self.W_skip is not None and x is not None:
                sums[at] = sums[at] + x[..., at, :].to(self.W_skip) * layer.scale_in @ self.W_skip[at].T
        return torch.stack(sums, dim=-2)

    def _check(self, x: Tensor) -> None:
        if x.shape[-2:] != (self.n_layers, self.d_in):
            raise DictionaryError(
                f"this cross-layer transcoder reads {self.n_layers} layers of width {self.d_in}, tensors "
                f"[n, {self.n_layers}, {self.d_in}], and was given {tuple(x.shape)}"
            )


def beside(parts: list[Sparse]) -> Sparse:
    """This is features side by side, each part's latents after those of the part before.

    >>> part = Sparse(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), torch.tensor([0, 1, 2]), 2)
    >>> beside([part, part]).dense().tolist()
    [[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0]]
    """
    starts = torch.tensor([0, *(part.n_latents for part in parts)]).cumsum(0).tolist()
    rows = torch.cat([part.rows() for part in parts])
    order = rows.argsort(stable=True)
    values = torch.cat([part.values for part in parts])[order]
    latents = torch.cat([part.latents + start for part, start in zip(parts, starts)])[order]
    offsets = torch.stack([part.offsets for part in parts]).sum(0)
    return Sparse(values, latents, offsets, starts[-1])


def apart(features: Features, n: int) -> list[Any]:
    """This is features cut into n parts of as many latents each: what `beside` put together."""
    width = features.shape[1] // n
    if isinstance(features, Tensor):
        return list(features.split(width, dim=1))
    parts = [features.where(features.latents // width == part) for part in range(n)]
    return [Sparse(p.values, p.latents - i * width, p.offsets, width) for i, p in enumerate(parts)]
