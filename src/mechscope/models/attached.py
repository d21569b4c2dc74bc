"""Dictionaries as sites: `model.attach` puts a dictionary's features, and what it leaves out, among a model's sites.

    site'  = site + (decode(features') - decode(features)) + (error' - error)

is what the rest of the network sees once features or the error are edited: decode(features') + error where only
features are, and the model's own value, bit for bit, where nothing changed. Without an edit nothing is added at all; a
gradient then takes features and error as constants of which the site is the sum, so that every gradient further up is
the model's own (Marks et al. 2024, arXiv:2403.19647, section 3). With an edit, gradients are of the edited network.

This room knows of a dictionary only that it has `encode(x) -> features [..., latent]` and `decode(features) -> x`; a
transcoder reads one site and writes another, and its `decode` may take what was read as a second argument.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mechscope.errors import DictionaryError, SiteError, did_you_mean
from mechscope.models.places import Anatomy
from mechscope.models.sites import Request

if TYPE_CHECKING:
    from mechscope.models.model import Model
    from mechscope.models.run import Pass


class Encoder(Protocol):
    """This is what is asked of a dictionary; `reads` and `writes` are looked at where it has them."""

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, features: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Attached:
    """This is one attached dictionary: its name, the sites it reads and writes, and how many latents it has."""

    name: str
    reads: str
    writes: str
    dictionary: Any
    latents: int
    takes_input: bool  # whether decode takes what was read, for a skip connection

    @property
    def site(self) -> str:
        return f"{self.reads}/{self.name}"

    @property
    def error(self) -> str:
        return f"{self.site}/error"

    def shapes(self, listed: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """This is the shapes of the features and of the error, beside those of the model's own sites."""
        shape = listed[self.writes]
        return {self.site: (*rows(shape), self.latents), self.error: (*rows(shape), width(shape))}

    def encode(self, x: Tensor) -> Tensor:
        return self.dictionary.encode(x)

    def decode(self, features: Tensor, read: Tensor) -> Tensor:
        return self.dictionary.decode(features, read) if self.takes_input else self.dictionary.decode(features)

    def to_vectors(self, x: Tensor) -> Tensor:
        """This is a site's value as the dictionary takes it: [batch pos d], in its dtype and on its device."""
        own = next(self.dictionary.parameters(), None) if isinstance(self.dictionary, nn.Module) else None
        flat = side_by_side(x)
        return flat if own is None else flat.to(own.device, own.dtype)


class Features:
    """This is what one forward knows of an attached dictionary, from where it reads to where it writes."""

    def __init__(self, owner: Pass, what: Attached):
        self.owner, self.what = owner, what
        asked = owner.by_site
        self.edited = any(asked.get(site, ((), ()))[0] for site in (what.site, what.error))
        self.of_error = what.error in asked
        self.writes = self.edited or self.of_error or owner.plan.gradients
        self.bases = (what.reads, what.writes) if self.writes else (what.reads,)

    def touch(self, site: str, x: Tensor) -> Tensor:
        """This reads features where the dictionary reads, and puts what became of them where it writes."""
        if site == self.what.reads:
            self.read(x)
        return self.write(x) if site == self.what.writes and self.writes else x

    def read(self, x: Tensor) -> None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.edited):
            self.given = self.what.to_vectors(x if self.edited else x.detach())
            if self.what.reads in self.owner.clone:
                self.given = self.given.clone()  # the model will overwrite it
            self.found = self.what.encode(self.given)
        self.now = self.owner.touch(self.what.site, self.found)

    def write(self, x: Tensor) -> Tensor:
        moved = []
        decoded = None
        if self.edited or self.of_error or self.now is not self.found:
            decoded = self.what.decode(self.now, self.given)
        if decoded is None:
            return x
        before = self.what.decode(self.found, self.given) if self.edited else decoded.detach()
        if self.now is not self.found:
            moved.append(decoded - before)
        flat = side_by_side(x).to(before.device)
        wide = torch.promote_types(x.dtype, before.dtype)
        if self.of_error:
            error = (flat if self.edited else flat.detach()).to(wide) - before
            left = self.owner.touch(self.what.error, error)
            if left is not error:
                moved.append(left - (error if self.edited else left.detach()))
        if not moved:
            return x
        return by_head((flat.to(wide) + sum(moved)).to(x), x)


def side_by_side(x: Tensor) -> Tensor:
    """This is a site of heads, [batch head pos d], as [batch pos head*d]; any other as it is."""
    return x.transpose(1, 2).flatten(2) if x.dim() == 4 else x


def by_head(x: Tensor, like: Tensor) -> Tensor:
    """This is `side_by_side` undone."""
    return x.unflatten(-1, (like.shape[1], -1)).transpose(1, 2) if like.dim() == 4 else x


def rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """This is the batch and the positions of a site's shape."""
    return (shape[0], shape[2]) if len(shape) == 4 else shape[:2]


def width(shape: tuple[int, ...]) -> int:
    """This is the size of the one vector that a site has at each position."""
    return shape[1] * shape[3] if len(shape) == 4 else shape[-1]


# ------------------------------------------------------------------------------------------------ attaching


def attach(model: Model, site: str, dictionary: Encoder, name: str, writes: str | None) -> Attached:
    """This is a dictionary made ready to be attached; `Model.attach` says what is refused."""
    reads = _one(model, site)
    target = reads if writes is None else _one(model, writes)
    if writes is None:
        target = _written(model, dictionary, reads, site)
    listed = model.certificate.sites
    order = list(listed)
    if order.index(target) < order.index(reads):
        raise DictionaryError(f"'{target}' comes before '{reads}' in the forward; a dictionary writes after it reads.")
    if not re.fullmatch(r"[A-Za-z]\w*(-\w+)*", name) or name == "error":
        raise DictionaryError(f"{name!r} cannot name features; type letters and digits, as in name='sae'.")
    if f"{reads}/{name}" in model.anatomy.attached:
        raise DictionaryError(
            f"'{reads}/{name}' is attached already; type model.detach('{reads}/{name}') first, or give another name."
        )
    latents = _latents(dictionary, model, reads, target)
    return Attached(name, reads, target, dictionary, latents, _takes_input(dictionary.decode))


def detach(anatomy: Anatomy, name: str) -> list[str]:
    """This takes dictionaries off, by the site of their features or by a name that several share."""
    found = [site for site, what in anatomy.attached.items() if name in (site, what.name)]
    if not found:
        there = list(anatomy.attached)
        known = f"; attached are {', '.join(map(repr, there))}" if there else "; nothing is attached"
        raise SiteError(f"no dictionary {name!r} is attached{did_you_mean(name, there)}{known}.")
    for site in found:
        del anatomy.attached[site]
    return found


def check_latents(requests: list[Request], anatomy: Anatomy) -> None:
    """This refuses a latent that the dictionary does not have, before anything runs."""
    for request in requests:
        index = request.selection.latent
        if index is None or request.site.endswith("/error"):
            continue
        n = anatomy.dictionary(request.site).latents
        there = f"'{request.site}' has latents 0 to {n - 1}"
        if isinstance(index, slice):
            if not range(n)[index]:
                raise SiteError(f"'{request}' selects nothing: {there}.")
            continue
        for latent in index if isinstance(index, tuple) else (index,):
            if not -n <= latent < n:
                raise SiteError(f"'{request}' selects latent {latent}, but {there}.")


def _one(model: Model, site: str) -> str:
    (request, *more) = model.resolve(site)
    if more or str(request.selection) or "/" in request.site:
        raise SiteError(f"a dictionary is attached at one whole site, as in 'blocks.3.resid_post', not {site!r}.")
    axes = request.row.axes
    if "pos" not in axes or request.classes or "d_vocab" in axes:
        raise SiteError(f"a dictionary reads one vector at each position, and '{request.site}' has {' '.join(axes)}.")
    return request.site


def _written(model: Model, dictionary: Any, reads: str, site: str) -> str:
    """This is where a dictionary writes that was attached without `writes`: by what it says of itself."""
    own_reads, own_writes = getattr(dictionary, "reads", None), getattr(dictionary, "writes", None)
    if isinstance(own_reads, list) or isinstance(own_writes, list):
        raise DictionaryError(
            f"this {type(dictionary).__name__} reads {own_reads} and writes {own_writes}; what is attached reads one "
            "site and writes one."
        )
    if own_writes is None or own_writes == own_reads:
        return reads
    if own_reads is not None and _one(model, own_reads) != reads:
        raise DictionaryError(
            f"this dictionary reads '{own_reads}' and writes '{own_writes}'; to attach it at {site!r}, say where it "
            f"writes: writes='{own_writes}'."
        )
    return _one(model, own_writes)


@torch.no_grad()
def _latents(dictionary: Encoder, model: Model, reads: str, writes: str) -> int:
    """This is how many latents a dictionary has: it is tried on a vector of zeros, which shows its sizes too."""
    listed = model.certificate.sites
    d_in, d_out = width(listed[reads]), width(listed[writes])
    own = next(dictionary.parameters(), None) if isinstance(dictionary, nn.Module) else None
    x = torch.zeros(1, 1, d_in, device=model.device, dtype=model.dtype)
    x = x if own is None else x.to(own.device, own.dtype)
    for method in ("encode", "decode"):
        if not callable(getattr(dictionary, method, None)):
            raise DictionaryError(f"{type(dictionary).__name__} has no {method}(); it is no dictionary.")
    try:
        features = dictionary.encode(x)
        out = (
            dictionary.decode(features, x)  # type: ignore[call-arg]
            if _takes_input(dictionary.decode)
            else dictionary.decode(features)
        )
    except RuntimeError as error:
        takes = f"vectors of {d}" if (d := getattr(dictionary, "d_in", None)) else "other vectors"
        raise DictionaryError(
            f"'{reads}' has vectors of {d_in}, and the dictionary takes {takes}: {str(error).splitlines()[0]}"
        ) from None
    if out.shape[-1] != d_out:
        raise DictionaryError(
            f"the dictionary decodes to vectors of {out.shape[-1]}, and '{writes}' has vectors of {d_out}; a "
            "transcoder is attached with writes=..."
        )
    return features.shape[-1]


def _takes_input(decode: Callable[..., Tensor]) -> bool:
    """This says whether `decode` takes a second argument without being told its name."""
    kinds = [p.kind for p in inspect.signature(decode).parameters.values()]
    return (
        sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds) > 1
    )


__all__ = ["Attached", "Encoder", "Features", "attach", "check_latents", "detach"]
