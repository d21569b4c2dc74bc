"""The activation store: the vectors of one or several sites on the disk, read shuffled as often as one likes.

    store_activations(model, texts, "blocks.*.resid_post", "activations")      one pass of the model fills it
    store = Activations("activations")
    for x in store.batches(4096, seed=0): ...                                  {site: [4096, d]}, without end

    DIR/shard-00000.safetensors ...    the vectors, in the order of the texts (`shards.py`)
    DIR/index.json                     what made them, the token mask, norms, every shard's checksum; written last

Filling can be killed at any moment and goes on from the last whole shard. A shard that was damaged is named before any
of its vectors is used, and is made again alone, from the place in the texts where it began, to the same bytes. Nothing
is ever copied to shuffle it: an epoch is a permutation of all vectors' numbers (`shuffled.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.dictionaries import index, shards
from mechscope.dictionaries.shuffled import Shuffled
from mechscope.errors import DictionaryError, StoreError, TokenError
from mechscope.models.contexts import Texts
from mechscope.models.forwards import read_once, side_by_side, token_sites
from mechscope.models.stream import Stream, size_of
from mechscope.models.token_mask import TokenMask

if TYPE_CHECKING:
    from mechscope.models.model import Model

Progress = Callable[[str, int, int], None]


def store_activations(
    model: Model,
    texts: Texts,
    at: str | Sequence[str],
    out: str | Path,
    context: int = 128,
    batch: int = 32,
    seed: int | None = None,
    mask: TokenMask | None = None,
    vectors: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    shard_bytes: int | str = "256 MB",
    progress: Progress | None = None,
) -> Activations:
    """This runs texts through a model once and keeps the vectors of its sites in the folder `out`.

    texts, at, context, batch, seed, mask: as in `model.stream`. vectors: how many to keep, at most; all unless given.
    dtype: float32, bfloat16 or float16. shard_bytes: the size of a shard, 1000000 or "1 MB"; one is held in memory.
    progress(what, done, of): `of` is 0 where nobody knows yet.

    A folder half filled for the same question is gone on with, from its last whole shard; of a full one, damaged shards
    are made again. Raises DictionaryError for a folder of another model, site, mask or option, and for values that
    float16 cannot hold; TokenError for other texts.

    >>> store = store_activations(model, Path("stories.txt"), "blocks.3.resid_post", "acts")  # doctest: +SKIP
    """
    folder, number_type = Path(out), _dtype(dtype)
    sites = [request.key for request in token_sites(model, at)]
    each = sum(_width(model, site) for site in sites) * number_type.itemsize
    shard = (size_of(shard_bytes) if isinstance(shard_bytes, str) else shard_bytes) // each
    if shard < 1:
        raise DictionaryError(f"shard_bytes={shard_bytes!r} does not hold one vector of {each:,} bytes; give more")
    asked = (mask or TokenMask()).of(model)
    question = {
        **{"sites": sites, "dtype": str(number_type).removeprefix("torch."), "mask": asked.to_json()},
        **{"context": context, "batch": batch, "seed": seed, "shard": shard, "vectors": vectors},
        **{"weights": model.weights_hash(), "of": str(model.dtype).removeprefix("torch.")},
    }
    for pattern in (".shard-*.tmp", ".index.json.*.tmp", ".tmp??????"):  # left by a write that was killed
        for left in folder.glob(pattern):
            left.unlink()
    if (folder / index.INDEX).is_file():
        there = Activations(folder)
        _same(folder, there.header["question"], question)
        there.check_texts(model, texts)
        there.rebuild(model, texts)
        return there
    stream = _stream(model, texts, question)
    done: list[dict[str, Any]] = []
    while (facts := shards.whole(folder / shards.name_of(len(done)))) is not None:
        _same(folder, facts["question"], question)
        done.append(facts)
    kept = sum(facts["vectors"] for facts in done)
    if done:
        stream.resume(done[-1]["end"])
    while (vectors is None or kept < vectors) and (given := next(stream, None)) is not None:
        some = shards.as_kept(given, number_type, None if vectors is None else vectors - kept)
        facts = shards.facts_about(len(done), some, stream, question)
        done.append(shards.write(folder / shards.name_of(len(done)), some, facts))
        kept += facts["vectors"]
        if progress is not None:
            progress("vectors", kept, vectors or 0)
    widths = {site: _width(model, site) for site in sites}
    index.write(folder, model.provenance(), stream.mask.to_json(), widths, done)
    return Activations(folder)


class Activations:
    """This is a store of activations in a folder: vectors by number, shuffled batches of them, and what made them.

    `sites`, `dtype`, `model` (its name), `weights` (its hash), `mask` (the `TokenMask` as used) and `norms` ({site:
    {"mean", "rms", "largest"}} of the norms of all vectors); `header` holds all that the index says. check: whether a
    shard's checksum is compared before its vectors are first used.

    Raises StoreError for a folder that holds no store, one that is not full yet, or an index that was changed; and,
    when a vector of it is asked for, where a shard is missing, cut short or changed, naming it.
    """

    def __init__(self, folder: str | Path, check: bool = True):
        self.folder, self.check = Path(folder), check
        self.header = index.read(self.folder)
        self.sites: list[str] = self.header["question"]["sites"]
        self.dtype = shards.DTYPES[self.header["question"]["dtype"]]
        self.mask = TokenMask.from_json(self.header["mask"])
        self.model, self.weights = self.header["provenance"]["model"], self.header["question"]["weights"]
        self.norms: dict[str, dict[str, float]] = self.header["norms"]
        self.shards: list[dict[str, Any]] = self.header["shards"]
        self.checksum = zlib.crc32(repr([shard["crc32"] for shard in self.shards]).encode())
        self.starts = [0, *accumulate(shard["vectors"] for shard in self.shards)]
        self._maps: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def widths(self) -> dict[str, int]:
        """This is how long the vectors of each site are."""
        return self.header["widths"]

    def batches(
        self,
        size: int,
        seed: int = 0,
        epochs: int | None = None,
        at: str | Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Shuffled:
        """This is an iterator of batches of `size` vectors, each epoch in an order of its own, decided by `seed`.

        Yields [size, d] of a store of one site, or of the one that `at` names; {site: [size, d]} of several, rows
        aligned. Only the very last batch is smaller, and without `epochs` there is none. `.state()` and
        `.resume(state)` go on where it stood, bit for bit. Memory: the batch, and four bytes a vector for the order.

        >>> for x in Activations("acts").batches(4096, epochs=1): ...  # doctest: +SKIP
        """
        single = isinstance(at, str) or (at is None and len(self.sites) == 1)
        sites = self.sites if at is None else [at] if isinstance(at, str) else list(at)
        for site in sites:
            if site not in self.sites:
                raise DictionaryError(f"'{self.folder}' has no {site!r}; it has {', '.join(self.sites)}")
        return Shuffled(self, sites, single, size, seed, epochs, dtype)

    def __getitem__(self, numbers: Tensor | Sequence[int] | slice | int) -> dict[str, Tensor]:
        """This is {site: [n, d]} of vectors by their number in the order of the texts, as they are stored."""
        return self.read(torch.arange(len(self))[numbers].reshape(-1), self.sites, self.dtype)

    def read(self, numbers: Tensor, sites: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """This is {site: [n, d]} of vectors by number, read from the disk in the order in which they lie there."""
        ordered, order = numbers.long().sort()
        ends = torch.searchsorted(ordered, torch.tensor(self.starts)).tolist()
        out = {site: torch.empty(len(numbers), self.widths[site], dtype=dtype) for site in sites}
        for shard, (first, last) in enumerate(pairwise(ends)):
            if first == last:
                continue
            vectors, rows = self.vectors(shard), ordered[first:last] - self.starts[shard]
            for site in sites:
                out[site][order[first:last]] = vectors[site].index_select(0, rows).to(dtype)
        return out

    def vectors(self, shard: int) -> dict[str, Tensor]:
        """This is one shard as a memory map, checked the first time; raises StoreError where it is damaged."""
        if shard not in self._maps:
            entry = self.shards[shard]
            try:
                self._right_size(shard)
                self._maps[shard] = shards.mapped(self.folder / entry["file"], entry["crc32"] if self.check else None)
            except StoreError as error:
                raise StoreError(f"shard {shard}: {error}; {_remedy(1)}") from error
        return self._maps[shard]

    # ---------------------------------------------------------------- damage

    def damaged(self) -> dict[int, str]:
        """This is what is wrong with each shard that is not as the index says, by its number; reads all of them."""
        found = {}
        for shard, entry in enumerate(self.shards):
            try:
                self._right_size(shard)
                shards.facts_of(self.folder / entry["file"])
                shards.mapped(self.folder / entry["file"], entry["crc32"])
            except StoreError as error:
                found[shard] = str(error)
        return found

    def verify(self) -> None:
        """This reads the whole store; raises StoreError naming every shard that is missing, cut short or changed."""
        found = self.damaged()
        if found:
            what = "\n".join(f"  shard {shard}: {why}" for shard, why in found.items())
            raise StoreError(f"{len(found)} of {len(self.shards)} shards are damaged; {_remedy(len(found))}:\n{what}")

    def rebuild(self, model: Model, texts: Texts) -> list[int]:
        """This makes damaged shards again, and no others, and returns their numbers; they end with the same bytes.

        Raises DictionaryError for another model, and where what comes out is not what was there: on another kind of
        device, or number of threads, sums are rounded otherwise. TokenError for other texts, and for an iterator.
        """
        found = list(self.damaged())
        question = self.header["question"]
        if found and model.weights_hash() != question["weights"]:
            raise DictionaryError(
                f"'{self.folder}' was filled by {self.model} with other weights than {model.name} has"
            )
        if found and read_once(texts):
            raise TokenError("a shard is made again from its place in the texts; pass a list or the Path of a file.")
        for shard in found:
            entry = self.shards[shard]
            stream = _stream(model, texts, question).resume(entry["begin"])
            vectors = shards.as_kept(next(stream), self.dtype, entry["vectors"])
            if shards.checksum(vectors) != entry["crc32"]:
                raise DictionaryError(
                    f"shard {shard} of '{self.folder}' came out with other bytes than it had; run on the device and "
                    f"with the number of threads that filled it ({self.header['provenance']['device']}, "
                    f"{self.header['threads']}), or delete the folder and fill it anew"
                )
            self._maps.pop(shard, None)
            shards.write(self.folder / entry["file"], vectors, shards.facts_about(shard, vectors, stream, question))
        return found

    def check_texts(self, model: Model, texts: Texts) -> None:
        """This raises TokenError where texts do not begin as those that filled the store."""
        _stream(model, texts, self.header["question"]).resume(self.shards[0]["begin"]).forwards.check_texts()

    def _right_size(self, shard: int) -> None:
        entry = self.shards[shard]
        path = self.folder / entry["file"]
        if not path.is_file():
            raise StoreError(f"'{path}' is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise StoreError(f"'{path}' is damaged: it has {size:,} bytes, and was written with {entry['bytes']:,}")

    def __repr__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        sites = ", ".join(f"{site} [{self.widths[site]}]" for site in self.sites)
        return f"Activations('{self.folder}': {len(self):,} vectors of {self.model}, {name}, of {sites}; {self.mask})"


# ---------------------------------------------------------------- filling


def _stream(model: Model, texts: Texts, question: dict[str, Any]) -> Stream:
    """This is the stream whose batches are the shards."""
    return Stream(
        model,
        texts,
        question["sites"],
        question["context"],
        question["batch"],
        question["seed"],
        mask=TokenMask.from_json(question["mask"]),
        vectors=question["shard"],
    )


def _same(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, mine in asked.items():
        if there.get(name) != mine:
            raise DictionaryError(
                f"'{folder}' holds activations of another question: {name} is {there.get(name)!r} there, and {mine!r} "
                "here; name another folder, or delete this one"
            )


def _remedy(number: int) -> str:
    return f"make {'it' if number == 1 else 'them'} again: Activations(folder).rebuild(model, texts)"


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in shards.DTYPES:
        raise DictionaryError(f"activations are stored as {', '.join(shards.DTYPES)}, not {name}")
    return shards.DTYPES[name]


def _width(model: Model, site: str) -> int:
    (request,) = model.resolve(site)
    shape = torch.empty(model.listed()[request.site], device="meta")
    return side_by_side(shape[request.selection.index(request.row.axes)]).shape[-1]


__all__ = ["Activations", "store_activations"]
