"""Splicing: a dictionary's reconstruction in place of a site, with or without what it leaves out, features clamped.

    model.run(text, edits={site: sae.splice(error=False)})            x -> decode(f)
    model.run(text, edits={site: ms.unchanged(sae.splice())})         x -> x, bit for bit
    model.run(text, edits={site: sae.splice(features={12: 0.0})})     x -> x + decode(f') - decode(f)
    model.run(text, edits=transcoder.splices(error=False))            what it writes -> decode(f) of what it reads

`model.attach` makes features sites instead, to save and differentiate; an edit made here needs nothing attached.
Clamping with the error kept is that of Templeton et al. 2024, Scaling Monosemanticity, "Feature steering".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope.edits import Edit
from mechscope.errors import DictionaryError
from mechscope.models.edit import Where

if TYPE_CHECKING:
    from mechscope.dictionaries.dictionary import Dictionary

Clamps = Mapping[int, float | Tensor | Callable[[Tensor], Tensor]]


def splice(dictionary: Dictionary, error: bool = True, features: Clamps | None = None) -> Edit:
    """This is an edit that puts an autoencoder's reconstruction in place of the site that it is given to.

    error: whether what the reconstruction misses is added back; then, with no features clamped, nothing changes, not a
    bit: wrap the edit in `ms.unchanged`. features: {latent: what to make it}, a number in the dictionary's own
    (scaled) units, or a function of the latent's values [...]: {12: 0.0, 40: lambda f: 2 * f}.

    The edit takes whole vectors: a site with heads, [batch head pos d], is taken with its heads side by side. Raises
    DictionaryError for a latent that is not there, and for a transcoder, which is spliced by `splices`.

    >>> sae = ms.dictionaries.TopK(64, 512, k=8)
    >>> x = torch.randn(2, 3, 64)
    >>> torch.equal(sae.splice(error=False)(x), sae.decode(sae.encode(x))), torch.equal(sae.splice()(x), x)
    (True, True)
    """
    if dictionary.writes != dictionary.reads or getattr(dictionary, "W_skip", None) is not None:
        raise DictionaryError(
            f"this dictionary reads {dictionary.reads!r} and writes {dictionary.writes!r}, so one edit cannot splice "
            "it: type edits=dictionary.splices(...)"
        )
    return Splice(dictionary, error, _checked(dictionary, features))


def splices(dictionary: Dictionary, error: bool = True, features: Clamps | None = None) -> dict[str, Edit]:
    """This is the edits {site: edit} that put what a transcoder makes of the site it reads where it writes.

    The skip connection is part of the reconstruction. An autoencoder gives one edit, at its own site. error, features:
    as for `splice`; the dict is of one run, and may be used again after it. Raises DictionaryError while the
    dictionary does not say which sites it reads and writes.
    """
    reads, writes = dictionary.reads, dictionary.writes
    if not isinstance(reads, str) or not isinstance(writes, str):
        raise DictionaryError(
            f"splices need one site to read and one to write, and this {type(dictionary).__name__} reads {reads!r} and "
            f"writes {writes!r}; set dictionary.reads and dictionary.writes"
        )
    if reads == writes:
        return {writes: splice(dictionary, error, features)}
    read = Read()
    return {reads: read, writes: Splice(dictionary, error, _checked(dictionary, features), read)}


@dataclass(frozen=True, eq=False)
class Read(Edit):
    """This keeps what a transcoder reads until it writes, and changes nothing."""

    held: list[Tensor] = field(default_factory=list)

    quiet = True

    def apply(self, x: Tensor, where: Where) -> Tensor:
        self.held[:] = [_side_by_side(x, where.request.axes)]
        return x


@dataclass(frozen=True, eq=False)
class Splice(Edit):
    """This replaces a site by a dictionary's reconstruction of it, or of what the dictionary read; see `splice`."""

    dictionary: Dictionary
    error: bool = True
    features: Clamps = field(default_factory=dict)
    read: Read | None = None

    def apply(self, x: Tensor, where: Where) -> Tensor:
        axes = where.request.axes
        if where.request.selection.head is not None:
            raise DictionaryError(f"a dictionary is spliced into whole vectors, not into heads: not '{where.request}'")
        given = flat = _side_by_side(x, axes)
        if self.read is not None:
            if not self.read.held or self.read.held[0].shape[:-1] != flat.shape[:-1]:
                raise DictionaryError(
                    f"nothing was read for what '{where.request}' is to be: give the run both edits of splices(), each "
                    f"at its own whole site, {self.dictionary.reads!r} and {self.dictionary.writes!r}"
                )
            given = self.read.held.pop()
        wide = torch.promote_types(x.dtype, next(self.dictionary.parameters()).dtype)
        if not self.error:
            return _by_head(self.reconstructed(given).to(x), x, axes)
        if not self.features:
            return x  # decode(f) + (x - decode(f)), without the rounding
        before = self.dictionary.encode(given)
        moved = self.dictionary.decode(self.clamped(before), given) - self.dictionary.decode(before, given)
        return _by_head((flat.to(wide) + moved.to(flat.device)).to(x), x, axes)

    def reconstructed(self, given: Tensor) -> Tensor:
        """This is decode(features') [..., d_out]; from the active latents alone, where the dictionary has them so."""
        if not self.features and getattr(self.dictionary, "sparse", False):
            vectors = given.reshape(-1, given.shape[-1])
            out = self.dictionary.decode(self.dictionary.active(vectors), vectors)  # type: ignore[operator]
            return out.view(*given.shape[:-1], -1)
        return self.dictionary.decode(self.clamped(self.dictionary.encode(given)), given)

    def clamped(self, features: Tensor) -> Tensor:
        """This is the features [..., n_latents] with what was asked for in place."""
        if not self.features:
            return features
        out = features.clone()
        for latent, what in self.features.items():
            new = what(features[..., latent]) if callable(what) else what
            out[..., latent] = torch.as_tensor(new).to(features)
        return out


def _checked(dictionary: Dictionary, features: Clamps | None) -> Clamps:
    n = dictionary.n_latents
    for latent in features or {}:
        if not -n <= latent < n:
            raise DictionaryError(f"there is no latent {latent} to clamp: this dictionary has {n}, from 0")
    return dict(features or {})


def _side_by_side(x: Tensor, axes: tuple[str, ...]) -> Tensor:
    """This is [batch head pos d] as [batch pos head*d], with or without the positions."""
    head = next((i for i, axis in enumerate(axes) if axis in ("head", "kv_head")), None)
    return x if head is None else x.movedim(head, -2).flatten(-2)


def _by_head(flat: Tensor, like: Tensor, axes: tuple[str, ...]) -> Tensor:
    head = next((i for i, axis in enumerate(axes) if axis in ("head", "kv_head")), None)
    return flat if head is None else flat.unflatten(-1, (like.shape[head], -1)).movedim(-2, head)


__all__ = ["Splice", "splice", "splices"]
