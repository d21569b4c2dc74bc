"""The vectors of a stream, forward by forward: one long row of them, that can be entered at any forward."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.errors import SiteError, TokenError
from mechscope.models.contexts import Contexts, Shuffled, Texts, compact, contexts, permutation
from mechscope.models.token_mask import TokenMask

if TYPE_CHECKING:
    from mechscope.models.model import Model
    from mechscope.models.sites import Request

Vectors = dict[str, Tensor]


class Forwards:
    """This gives {site: [n, d]} of one forward after another, of the tokens that count, rows aligned between sites.

    A forward ends at the last site. `place` is where the next one begins, as JSON: the epoch, the place in the texts,
    and, after `go_to`, a checksum of the ids that must be found there (None where it is not known).
    """

    def __init__(
        self,
        model: Model,
        texts: Texts,
        at: str | Sequence[str],
        context: int,
        batch: int,
        seed: int | None,
        loop: bool,
        mask: TokenMask,
    ):
        self.model, self.texts, self.mask = model, texts, mask
        self.context, self.batch, self.seed, self.loop = context, batch, seed, loop
        self.requests = token_sites(model, at)
        order = list(model.listed())
        self.stop: str | None = max((request.site for request in self.requests), key=order.index)
        self.begun = False
        self._held: list | None = None  # all contexts, where they are shuffled
        self.go_to({"epoch": 0, "at": None, "check": None})

    @property
    def keys(self) -> list[str]:
        return [request.key for request in self.requests]

    def go_to(self, place: dict[str, Any]) -> None:
        self.place = place
        self._rows: Contexts | Shuffled | None = None
        # Whether a token of this epoch counted: unknown when it is entered in the middle.
        self._counted: bool | None = None if place["at"] else False

    def next(self) -> tuple[Vectors, dict[str, Any]] | None:
        """This is the vectors of the next forward, and its place; None at the end. There may be no vectors in it."""
        found = self._next_rows()
        if found is None:
            return None
        rows, place = found
        vectors = self._vectors(rows)
        if length(vectors):
            self._counted = True
        return vectors, place

    def check_texts(self) -> None:
        """This raises TokenError where the texts are not those of the place that was gone to."""
        place = self.place
        self._next_rows()
        self.go_to(place)

    def _next_rows(self) -> tuple[list[list[int]], dict[str, Any]] | None:
        while True:
            if self._rows is None:
                self._rows = self._open()
            at = self._rows.place
            rows = list(islice(self._rows, self.batch))
            if rows:
                break
            if self._counted is False:
                raise TokenError("there is no text to stream." if not self.begun else "no token of the texts counts.")
            if not self.loop:
                return None
            self.go_to({"epoch": self.place["epoch"] + 1, "at": None, "check": None})
        self.begun = True
        check = zlib.crc32(repr(rows).encode())
        if self.place["check"] not in (None, check):
            raise TokenError("these are not the texts of the stream that this state is of; pass the same ones.")
        here = {"epoch": self.place["epoch"], "at": at, "check": check}
        self.place = {"epoch": self.place["epoch"], "at": self._rows.place, "check": None}
        return rows, here

    def _open(self) -> Contexts | Shuffled:
        if self.seed is None:
            return Contexts(self.model, self.texts, self.context, self.place["at"])
        if self._held is None:
            self._held = compact(contexts(self.model, self.texts, self.context))
        order = permutation(len(self._held), self.seed, "contexts", self.place["epoch"])
        return Shuffled(self._held, order, self.place["at"])

    def _vectors(self, rows: list[list[int]]) -> Vectors:
        """This is one vector a token that counts, for every site, of one forward."""
        try:
            out = self.model.run(rows, save=self.keys, stop_at=self.stop)
        except SiteError:
            if len(self.requests) == 1 or self.stop is None:
                raise
            self.stop = None  # a block whose parts run in another order than they are listed in
            out = self.model.run(rows, save=self.keys)
        real = out.mask
        assert real is not None
        values = {key: side_by_side(out[key]) for key in self.keys}
        for key, x in values.items():
            if x.shape[:2] != real.shape:
                raise SiteError(f"'{key}' has {x.shape[1]} positions, and the text has {real.shape[1]} tokens.")
        ids = torch.full(real.shape, -1)
        ids[real.cpu()] = torch.tensor([i for row in out.ids for i in row])
        self.mask = self.mask.fitted(ids, real, values)
        keep = self.mask(ids, real, values)
        return {key: x[keep.to(x.device)] for key, x in values.items()}


def token_sites(model: Model, at: str | Sequence[str]) -> list[Request]:
    """This is the sites that hold one vector a token; raises SiteError for any other."""
    found = [request for asked in ([at] if isinstance(at, str) else at) for request in model.resolve(asked)]
    if not found:
        raise SiteError("no site to stream; give one, or a list of them.")
    for request in found:
        if "pos" not in request.row.axes or "d_vocab" in request.row.axes:
            axes = " ".join(request.row.axes)
            raise SiteError(
                f"a stream yields one vector for each of the tokens, and '{request.site}' has the axes {axes}."
            )
        if request.selection.pos is not None:
            raise SiteError(f"a stream reads every token; leave out the positions: type '{request.site}'.")
    return list({request.key: request for request in found}.values())


def side_by_side(x: Tensor) -> Tensor:
    """This is [batch pos d]; of [batch head pos d], the heads of a token one after the other; of one number, d = 1."""
    return x.transpose(1, 2).flatten(2) if x.dim() == 4 else x.reshape(*x.shape[:2], -1)


def length(vectors: Vectors) -> int:
    """This is how many tokens there are vectors of."""
    return len(next(iter(vectors.values()))) if vectors else 0


def read_once(texts: Texts) -> bool:
    return isinstance(texts, Iterator)


__all__ = ["Forwards", "Vectors", "length", "read_once", "side_by_side", "token_sites"]
