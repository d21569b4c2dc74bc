"""A stream of activations over texts, one site's or several sites': what dictionaries and probes train on.

Texts become contexts of one length (`contexts.py`), which run `batch` at a time, in one forward that ends at the last
site asked for. Of every token that counts (`token_mask.py`) one vector is kept for each site. So there is one long row
of vectors (`forwards.py`), the same for the same arguments, and everything here is how it is cut:

    vectors=None                 what each forward gave, as it comes
    vectors=4096                 4,096 at a time; only the last batch may be smaller
    ... and shuffle=262_144      windows of so many vectors, held in memory and given in a permuted order

A window is a stretch of the long row, and its permutation depends on the seed and its number alone. So a stream can
stop anywhere and go on: `state()` says in which forward the window began, and `resume(state)` runs it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mechscope.errors import TokenError
from mechscope.models.contexts import Texts, contexts, permutation
from mechscope.models.forwards import Forwards, Vectors, length, read_once
from mechscope.models.token_mask import TokenMask

if TYPE_CHECKING:
    from mechscope.models.model import Model

SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Stream:
    """This is an iterator of tensors [n, d]: the activations of `at` at every token that counts.

    texts: a list of texts, ids [rows, context], the Path of a file with a text on each line, or an iterator, which can
    be read once. Texts are joined with the end token between them and cut into contexts of `context` tokens, each
    starting with BOS where the tokenizer adds one; the last, shorter one is kept too.

    at: one site; the stream yields [n, d]. A list or a wildcard: it yields {site: [n, d]} of one forward, row i of
    every site for the same token. A site with heads, [batch head pos d], gives them side by side, [n, head · d].
    batch: contexts in a forward. mask: which tokens count; all but special tokens unless given. Its median norms, where
    it asks for them, are those of the first forward; `stream.mask` is the mask as used. vectors: n, exactly, but for
    the last batch; whatever a forward gave unless asked. shuffle: how many vectors are held to be mixed, or their
    bytes, as "2 GB"; needs `vectors`. seed: shuffles the contexts too (all texts are then tokenised first, and held as
    ids). loop: whether to begin again at the end, for training.

    Memory: what one forward takes, and the window (one batch, without `shuffle`).
    """

    def __init__(
        self,
        model: Model,
        texts: Texts,
        at: str | Sequence[str],
        context: int = 128,
        batch: int = 32,
        seed: int | None = None,
        loop: bool = False,
        mask: TokenMask | None = None,
        vectors: int | None = None,
        shuffle: int | str | None = None,
    ):
        if isinstance(texts, str):
            raise TokenError("texts must be a list or an iterator of texts, not one text; pass [text].")
        if loop and read_once(texts):
            raise TokenError("texts that can be read once cannot be looped over; pass a list, or loop=False.")
        if shuffle is not None and vectors is None:
            raise TokenError("a shuffled stream is cut into batches of one size; say which, as vectors=4096.")
        if vectors is not None and vectors < 1:
            raise TokenError(f"vectors={vectors}: a batch has 1 vector or more.")
        self.model, self.single = model, isinstance(at, str) and not any(c in at for c in "*{")
        self.vectors, self.shuffle = vectors, shuffle
        mask = (mask or TokenMask()).of(model)
        self.forwards = Forwards(model, texts, at, context, batch, seed, loop, mask)
        self._weights: str | None = None
        self._room = 0  # vectors that a window holds; known once their width is
        self._go_to({**self.forwards.place, "skip": 0}, window=0, given=0)

    @property
    def mask(self) -> TokenMask:
        """This is which tokens count, with the ids and, after the first batch, the median norms that say so."""
        return self.forwards.mask

    @property
    def at(self) -> str | list[str]:
        """This is the site, or the sites, that the stream reads."""
        return self.forwards.keys[0] if self.single else list(self.forwards.keys)

    def facts(self) -> dict[str, Any]:
        """This is what something trained on the stream should say of it: the model, the sites, the tokens, as JSON."""
        made = {name: fact for name, fact in self.model.provenance().items() if name not in ("source", "device")}
        return {**made, "mask": self.mask.to_json(), "context": self.forwards.context}

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._left():
            self._fill()
        first, self._given = self._given, self._given + (self.vectors or self._filled)
        if self.shuffle is None:
            out, self._window = {key: x[: self._filled] for key, x in self._window.items()}, {}
        else:
            chosen = self._order[first : self._given]
            out = {key: x.index_select(0, chosen.to(x.device)) for key, x in self._window.items()}
        return out[self.forwards.keys[0]] if self.single else out

    # ---------------------------------------------------------------- stopping and going on

    def state(self) -> dict[str, Any]:
        """This is where the stream stands, as JSON: what follows a `resume` of it is what would follow now."""
        begin, window, given = self._here(), self._number + 1, self._resumed_at
        if self._left():
            begin, window, given = self._begin, self._number, self._given
        return {**begin, "window": window, "given": given, "mask": self.mask.to_json(), "asked": self._asked()}

    def window(self) -> dict[str, Any]:
        """This is a state that the window under way, or the batch just given, follows from its beginning."""
        given = {"window": self._number, "given": 0}
        return {**self._begin, **given, "mask": self.mask.to_json(), "asked": self._asked()}

    def resume(self, state: dict[str, Any]) -> Stream:
        """This goes to where a stream made with the same arguments stood, and returns this stream.

        The batches that follow are bit for bit those of a stream that never stopped: the forwards of the window under
        way run again. Raises TokenError where the arguments or the model's weights differ, for an iterator that was
        begun already, and, at the next batch, where the texts are others.
        """
        if self.forwards.begun and read_once(self.forwards.texts):
            raise TokenError(
                "these texts are an iterator, which can be read once, and this stream has begun to read it; to resume, "
                "pass a list, the Path of a file, or the same iterator made anew."
            )
        for name, mine in self._asked().items():
            if (theirs := state["asked"].get(name)) != mine:
                raise TokenError(f"this state is of a stream with {name}={theirs!r}, and this one has {name}={mine!r}.")
        self.forwards.mask = TokenMask.from_json(state["mask"])
        begin = {name: state[name] for name in ("epoch", "at", "check", "skip")}
        self._go_to(begin, state["window"], state["given"])
        return self

    def _asked(self) -> dict[str, Any]:
        if self._weights is None:
            self._weights = self.model.weights_hash()
        runs = self.forwards
        options = {"sites": runs.keys, "context": runs.context, "batch": runs.batch, "seed": runs.seed}
        return {**options, "vectors": self.vectors, "shuffle": self.shuffle, "weights": self._weights}

    def _go_to(self, begin: dict[str, Any], window: int, given: int) -> None:
        self.forwards.go_to({name: begin[name] for name in ("epoch", "at", "check")})
        self._skip = begin["skip"]  # vectors of the next forward that belong to windows before
        self._begin, self._number, self._resumed_at = begin, window - 1, given
        self._extra: Vectors = {}  # vectors of the last forward that belong to the next window
        self._origin: dict[str, Any] = {}  # where the first of them comes from
        self._window: Vectors = {}
        self._filled = self._given = 0

    def _here(self) -> dict[str, Any]:
        """This is where the next window begins: the forward, and how many of its vectors were taken before."""
        return self._origin if length(self._extra) else {**self.forwards.place, "skip": self._skip}

    # ---------------------------------------------------------------- windows

    def _left(self) -> int:
        return max(0, self._filled - self._given)

    def _fill(self) -> None:
        """This fills the next window; raises StopIteration where nothing is left."""
        begin, window = self._here(), self._number + 1
        self._check = begin["check"]
        try:
            filled = self._filled_up()
        except BaseException:
            if not read_once(self.forwards.texts):  # also after Ctrl-C, the next batch is the right one
                self._go_to(begin, window, self._resumed_at)
            raise
        if not filled:
            raise StopIteration
        self._begin, self._number, self._filled = {**begin, "check": self._check}, window, filled
        self._given, self._resumed_at = self._resumed_at, 0
        if self.shuffle is not None:
            self._order = permutation(filled, self.forwards.seed or 0, "window", window)

    def _filled_up(self) -> int:
        """This is how many vectors were put into the window: as many as it holds, or all that were left."""
        filled = self._filled = self._given = 0
        while not filled or filled < self._room:
            piece = self._piece()
            if piece is None:
                break
            if self.vectors is None:
                self._window, self._extra = piece, {}
                return length(piece)
            if not self._window:
                self._window = self._empty(piece)
            some = min(length(piece), self._room - filled)
            for key, x in piece.items():
                self._window[key][filled : filled + some] = x[:some]
            self._extra = {key: x[some:] for key, x in piece.items()}
            self._origin = {**self._origin, "skip": self._origin["skip"] + some}
            filled += some
        return filled

    def _piece(self) -> Vectors | None:
        """This is the vectors that come next: the rest of the last forward, or those of the next that has any."""
        if length(self._extra):
            return self._extra
        while (found := self.forwards.next()) is not None:
            vectors, place = found
            self._origin, skip, self._skip = {**place, "skip": self._skip}, self._skip, 0
            self._check = place["check"] if self._check is None else self._check
            if length(vectors) > skip:
                return {key: x[skip:] for key, x in vectors.items()}
        return None

    def _empty(self, like: Vectors) -> Vectors:
        """This is an empty window, of whole batches within what was asked."""
        assert self.vectors is not None
        self._room = self.vectors
        if self.shuffle is not None:
            each = sum(x.shape[1] * x.element_size() for x in like.values())
            most = size_of(self.shuffle) // each if isinstance(self.shuffle, str) else self.shuffle
            if most < self.vectors:
                raise TokenError(
                    f"shuffle={self.shuffle!r} holds {most:,} vectors of {each:,} bytes, less than one batch of "
                    f"{self.vectors:,}; give at least '{self.vectors * each / 1e6:.4g} MB'."
                )
            self._room = most // self.vectors * self.vectors
        return {key: x.new_empty(self._room, x.shape[1]) for key, x in like.items()}


def size_of(text: str) -> int:
    """This is a size in bytes: "2 GB" is 2 · 10^9, "512 MiB" 512 · 2^20; raises TokenError for anything else.

    >>> size_of("1.5 MB")
    1500000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in SIZES:
        raise TokenError(f"cannot read the size {text!r}; type a number and a unit ({', '.join(SIZES)}), as in '2 GB'.")
    return int(float(match[1]) * SIZES[match[2].upper()])


__all__ = ["Stream", "contexts", "size_of"]
