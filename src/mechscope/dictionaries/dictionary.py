"""What every dictionary is: a site's vectors as sparse sums of feature directions, with what is needed to use it again.

    class Dictionary      the contract: encode, decode, forward -> Reconstruction, direction, save
    class Coder           a dictionary with one encoder and one decoder: the base of ReLU, TopK, JumpReLU ...

A dictionary takes and gives vectors in its site's own units. It scales them itself (`scale_in`, `scale_out`), so that
every checkpoint, and every file, is usable as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechscope import store
from mechscope.dictionaries.sparse import Sparse, above, pick, products, rows_sum
from mechscope.errors import DictionaryError, did_you_mean

if TYPE_CHECKING:
    from mechscope.edits import Edit

Features = Tensor | Sparse


@dataclass
class Reconstruction:
    """This is what a forward of a dictionary gives.

    output: [..., d_out], in the units of the site that the dictionary writes. features: [n, n_latents], a tensor or the
    active ones alone. losses: what training adds up, by name, each with its weight in it. fvu: the share of the
    target's variance that is missed, on this batch.
    """

    output: Tensor
    features: Features
    losses: dict[str, Tensor] = field(default_factory=dict)
    fvu: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """This is what training makes small: the sum of the losses."""
        return torch.stack(list(self.losses.values())).sum()

    def fired(self) -> Tensor:
        """This is how many rows each latent is active in [n_latents]."""
        found = self.features
        return found.fired() if isinstance(found, Sparse) else (found.detach() != 0).flatten(0, -2).sum(0)

    @property
    def examples(self) -> int:
        """This is how many vectors, or sets of vectors for a crosscoder, were reconstructed."""
        return self.features.shape[0]

    @property
    def l0(self) -> float:
        """This is how many latents are active in a row, on average."""
        return self.fired().sum().item() / max(1, self.examples)


class Dictionary(nn.Module):
    """This is the contract of every dictionary.

    reads, writes: the sites, as `model.run(save=...)` names them; the same for an autoencoder, different for a
    transcoder, lists for a crosscoder; None while unknown. facts: JSON that travels with the weights: the model and
    its hash, the token mask, how it was trained, what was assumed when a file was read. idle: [n_latents], the examples
    since each latent last fired, which training counts.
    """

    d_in: int
    d_out: int
    n_latents: int
    idle: Tensor

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        d_out: int | None = None,
        *,
        reads: str | list[str] | None = None,
        writes: str | list[str] | None = None,
    ):
        super().__init__()
        self.d_in, self.n_latents, self.d_out = d_in, n_latents, d_in if d_out is None else d_out
        self.reads = reads
        self.writes = reads if writes is None else writes
        self.facts: dict[str, Any] = {}
        self.register_buffer("idle", torch.zeros(n_latents, dtype=torch.int64))

    # What each architecture says

    def encode(self, x: Tensor) -> Tensor:
        """This is the features [..., n_latents] of vectors [..., d_in]."""
        raise NotImplementedError

    def decode(self, features: Features, x: Tensor | None = None) -> Tensor:
        """This is the vectors [..., d_out] that features [..., n_latents] stand for; `x` for a skip connection."""
        raise NotImplementedError

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        """This reconstructs `target` [..., d_out], or `x` [..., d_in] itself."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """This is the arguments that make an untrained dictionary of this architecture and size again."""
        raise NotImplementedError

    def direction(self, latent: int) -> Tensor:
        """This is what a latent writes [d_out], in the site's units and of norm 1."""
        raise NotImplementedError

    # What training asks of it

    def reconstruct(self, batch: Any) -> Reconstruction:
        """This is the forward on what a trainer's iterator yields: x, (x, target), or tensors by site."""
        x, target = self.parts(batch)
        return self(x, target)

    def parts(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """This is (x, target) of a batch; raises DictionaryError where it lacks the sites that are read or written."""
        if isinstance(batch, Tensor):
            return batch, None
        if isinstance(batch, tuple | list):
            return batch[0], batch[1]
        if self.reads is None:
            raise DictionaryError(
                f"batches come by site ({', '.join(batch)}), and this {type(self).__name__} does not say which it "
                "reads: make it with reads='...'"
            )
        x = _at(batch, self.reads)
        return x, None if self.writes == self.reads else _at(batch, self.writes or self.reads)

    def begin(self, x: Tensor, target: Tensor | None) -> None:
        """This sets what depends on the data, from the first vectors: scales, the middle."""

    def anneal(self, fraction: float) -> None:
        """This is called before each step with the share of the training that is done."""

    def after_step(self) -> None:
        """This is called after each step of the optimiser: constraints on weights."""

    @torch.no_grad()
    def count(self, found: Reconstruction) -> None:
        """This counts the examples since each latent last fired, after a step."""
        self.idle.add_(found.examples).masked_fill_(found.fired() > 0, 0)

    # Use

    def splice(self, error: bool = True, features: dict[int, Any] | None = None) -> Edit:
        """This is an edit that puts the reconstruction in place of a site; see `dictionaries/splicing.py`."""
        from mechscope.dictionaries.splicing import splice

        return splice(self, error=error, features=features)

    def splices(self, error: bool = True, features: dict[int, Any] | None = None) -> dict[str, Edit]:
        """This is `splice` as {site: edit}, for transcoders too: what is read at one site is written at another."""
        from mechscope.dictionaries.splicing import splices

        return splices(self, error=error, features=features)

    # Files

    def save(self, path: str | Path, **more: Any) -> Path:
        """This writes the dictionary as one file that needs nothing else; `ms.open(path)` is the inverse.

        more: further facts for the header, which `ms.store.header(path)` reads without the weights.
        """
        tensors, header = self.to_parts()
        return store.save(path, "dictionary", tensors, {**header, **more})

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This is the dictionary as tensors and a JSON header; `from_parts` is the inverse."""
        return self.tensors(), self.header()

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.state_dict().items()}

    def header(self) -> dict[str, Any]:
        """This is what a file says before its weights."""
        made = {"architecture": type(self).__name__, "options": self.options()}
        return {**made, "reads": self.reads, "writes": self.writes, "facts": self.facts}

    @staticmethod
    def from_parts(header: dict[str, Any], tensors: dict[str, Tensor]) -> Dictionary:
        """This is the inverse of `save`; raises DictionaryError for an architecture that is not there."""
        from mechscope import dictionaries

        name = header["architecture"]
        if name not in dictionaries.ARCHITECTURES:
            raise DictionaryError(
                f"the file holds a {name!r}{did_you_mean(name, dictionaries.ARCHITECTURES)}; this mechscope has "
                f"{', '.join(dictionaries.ARCHITECTURES)}"
            )
        made = getattr(dictionaries, name)(**header["options"], reads=header["reads"], writes=header["writes"])
        made.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("training.")})
        made.facts = header["facts"]
        return made.eval()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.options().items() if value is not None)
        where = "" if self.reads is None else f" on {_named(self.reads)}"
        where += "" if self.writes == self.reads else f" -> {_named(self.writes)}"
        assumed = self.facts.get("assumptions", [])
        return f"{type(self).__name__}({shown}){where}" + "".join(f"\n  assumed: {what}" for what in assumed)


class Coder(Dictionary):
    """This is a dictionary with one encoder and one decoder: features = activation(W_enc (x - b_dec) + b_enc).

    d_in, d_out: the width of what is read and of what is written; with `d_out` or another site in `writes` it is a
    transcoder, whose encoder does not take the middle b_dec off. skip: whether W_skip x is added to the output.
    W_enc, W_dec: [n_latents, d], a row a latent.

    An architecture says which entries of the pre-activations are kept (`select`), what becomes of them (`activate`)
    and what its loss adds (`penalties`).
    """

    scale_in: Tensor
    scale_out: Tensor
    W_enc: nn.Parameter
    W_dec: nn.Parameter

    sparse = True
    """Whether training holds the active latents alone; else features are tensors [n, n_latents]."""

    unit = True
    """Whether the decoder's rows are kept at norm 1."""

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        d_out: int | None = None,
        *,
        skip: bool = False,
        reads: str | list[str] | None = None,
        writes: str | list[str] | None = None,
        seed: int = 0,
    ):
        super().__init__(d_in, n_latents, d_out, reads=reads, writes=writes)
        self.centred = d_out is None and self.reads == self.writes
        self.skip, self.seed = skip, seed
        # Far from seed itself: data of the same seed must not be made of the numbers that the weights start at.
        draw = torch.Generator().manual_seed((seed + 1) * 2_654_435_761 % 2**32)
        rows = nn.functional.normalize(torch.randn(n_latents, self.d_out, generator=draw), dim=1)
        self.W_dec = nn.Parameter(rows)
        if not self.centred:
            rows = nn.functional.normalize(torch.randn(n_latents, d_in, generator=draw), dim=1)
        self.W_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in)) if skip else None
        self.register_buffer("scale_in", torch.ones(()))
        self.register_buffer("scale_out", torch.ones(()))

    # What an architecture says

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This is which entries of pre-activations [rows, n_latents] are kept: (values, latents, counts)."""
        return above(pre)

    def activate(self, pre: Sparse) -> Sparse:
        """This is the features of the entries that were kept, with gradients."""
        return pre

    def activation(self, pre: Tensor) -> Tensor:
        """This is the features of pre-activations, both [n, n_latents], where `sparse` is false."""
        return pre.relu()

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        """This is what the loss adds to the squared error.

        found: the features. pre: the pre-activations they were made of. inner: [n, d_in], as encoded.
        error: [n, d_out], scaled.
        """
        return {}

    # The contract

    def encode(self, x: Tensor) -> Tensor:
        inner = self.inner(x).reshape(-1, self.d_in)
        found = self.activate(self.chosen(inner)).dense() if self.sparse else self.activation(self.pre(inner))
        return found.view(*x.shape[:-1], self.n_latents)

    def active(self, x: Tensor) -> Sparse:
        """This is the active latents of vectors [n, d_in], with gradients."""
        return self.activate(self.chosen(self.inner(x)))

    def chosen(self, inner: Tensor) -> Sparse:
        """This is the pre-activations that are kept, of what `inner` gave, with gradients."""
        return products(inner, self.W_enc, self.b_enc, pick(inner, self.W_enc, self.b_enc, self.select))

    def decode(self, features: Features, x: Tensor | None = None) -> Tensor:
        out = self.written(features)
        if self.W_skip is not None:
            if x is None:
                raise DictionaryError("this transcoder has a skip connection: give decode(features, x) what it read")
            out = out + x.to(out) * self.scale_in @ self.W_skip.T
        return out / self.scale_out

    def written(self, features: Features) -> Tensor:
        """This is the decoder's output [..., d_out] before the skip connection, in scaled units."""
        summed = rows_sum(features, self.W_dec) if isinstance(features, Sparse) else features @ self.W_dec
        return summed + self.b_dec

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        if target is None and (self.d_out != self.d_in or self.reads != self.writes):
            raise DictionaryError(
                f"this transcoder writes another site than it reads: give forward(x, target), with the target "
                f"[n, {self.d_out}]; without one, decode(encode(x), x)"
            )
        inner = self.inner(x).reshape(-1, self.d_in)
        flat = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        wanted = (flat if target is None else target.reshape(-1, self.d_out).to(flat)) * self.scale_out
        pre = self.chosen(inner) if self.sparse else self.pre(inner)
        found = self.activate(pre) if isinstance(pre, Sparse) else self.activation(pre)
        out = self.written(found)
        if self.W_skip is not None:
            out = out + flat * self.scale_in @ self.W_skip.T
        error = wanted - out
        squared = error.square().sum(1)
        losses = {"mse": squared.mean(), **self.penalties(found, pre, inner, error)}
        with torch.no_grad():
            fvu = squared.sum() / (wanted - wanted.mean(0)).square().sum()
        output = (out / self.scale_out).view(*x.shape[:-1], self.d_out).to(x.dtype)
        return Reconstruction(output, found, losses, fvu)

    def inner(self, x: Tensor) -> Tensor:
        """This is what the encoder's matrix multiplies: x scaled, less the middle where it is an autoencoder."""
        if x.shape[-1] != self.d_in:
            raise DictionaryError(
                f"this {type(self).__name__} reads vectors of width {self.d_in}, and was given {tuple(x.shape)}; "
                f"it was made for {_named(self.reads) if self.reads else 'a site that it does not name'}"
            )
        x = x.to(self.W_enc.dtype) * self.scale_in
        return x - self.b_dec if self.centred else x

    def pre(self, inner: Tensor) -> Tensor:
        """This is the pre-activations [n, n_latents] of what `inner` gave."""
        return inner @ self.W_enc.T + self.b_enc

    def direction(self, latent: int) -> Tensor:
        if not -self.n_latents <= latent < self.n_latents:
            raise DictionaryError(f"there is no latent {latent}: this dictionary has {self.n_latents}, from 0")
        return nn.functional.normalize(self.W_dec[latent].detach(), dim=0)

    def options(self) -> dict[str, Any]:
        d_out = None if self.centred else self.d_out
        return {"d_in": self.d_in, "n_latents": self.n_latents, "d_out": d_out, "skip": self.skip, "seed": self.seed}

    @torch.no_grad()
    def begin(self, x: Tensor, target: Tensor | None) -> None:
        """This scales inputs and targets to a mean norm of sqrt(d), and puts the middle at the target's mean."""
        self.inner(x[:1])  # says what is wrong with the width
        x, target = x.float(), (x if target is None else target).float()
        self.scale_in.copy_(self.d_in**0.5 / x.norm(dim=-1).mean())
        self.scale_out.copy_(self.d_out**0.5 / target.norm(dim=-1).mean())
        self.b_dec.copy_((target * self.scale_out).flatten(0, -2).mean(0))

    @torch.no_grad()
    def after_step(self) -> None:
        if self.unit:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))


def _at(batch: Any, sites: str | list[str]) -> Tensor:
    missing = [site for site in ([sites] if isinstance(sites, str) else sites) if site not in batch]
    if missing:
        raise DictionaryError(
            f"the batches have no {missing[0]!r}{did_you_mean(missing[0], batch)}; they have {', '.join(batch)}. "
            f"Stream it too: model.stream(texts, at=[{missing[0]!r}, ...])"
        )
    return batch[sites] if isinstance(sites, str) else torch.stack([batch[site] for site in sites], dim=1)


def _named(sites: str | list[str] | None) -> str:
    return "?" if sites is None else sites if isinstance(sites, str) else ", ".join(sites)
