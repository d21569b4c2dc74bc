"""Texts as rows of ids of one length, in order or shuffled, from any place on: what streams and harvests run on."""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.errors import TokenError

if TYPE_CHECKING:
    from mechscope.models.model import Model

Texts = Iterable[str] | Tensor | Path


class Contexts:
    """This is an iterator of rows of `size` ids: texts end to end with the end token between them; ids as they are.

    Each row starts with BOS where the tokenizer adds one; the last row may be shorter. Nothing is held but one text.
    texts: texts, ids [rows, context], or the Path of a file with a text on each line. `place` is where the iterator
    stands, as JSON; one made with it goes on from there without tokenising what came before.
    """

    def __init__(self, model: Model, texts: Texts, size: int, place: dict[str, Any] | None = None):
        self.model, self.texts, self.size = model, texts, size
        self._place: dict[str, Any] = {"text": 0, "row": 0, "start": [], "held": [], **(place or {})}
        self._made = self._of_ids(texts) if isinstance(texts, Tensor) else self._of_texts(texts)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        return next(self._made)

    @property
    def place(self) -> dict[str, Any]:
        """This is: the text that is read next, the rows already given of it, and the ids left of those before it."""
        return dict(self._place)

    def _of_ids(self, ids: Tensor) -> Iterator[list[int]]:
        for row in ids[self._place["row"] :]:
            self._place["row"] += 1
            yield row.tolist()

    def _of_texts(self, texts: Iterable[str] | Path) -> Iterator[list[int]]:
        place = self._place
        first, passed = place["text"], place["row"]
        start, held = place["start"], place["held"]
        for number, text in enumerate(islice(lines(texts), first, None), first):
            now = {"text": number, "start": start, "held": held}
            ids = self._ids(text)
            bos, end = self.model.tokenizer.bos_token_id, self.model.tokenizer.eos_token_id
            if bos is not None and ids[0] == bos and len(ids) > 1:
                start, ids = ids[:1], ids[1:]
            held = held + ids
            if end is not None and held[-1] != end:
                held.append(end)
            room = self.size - len(start)
            if room < 1:
                raise TokenError(
                    f"context={self.size} has no room for text: every row starts with BOS; give 2 or more."
                )
            whole = len(held) // room
            for row in range(passed, whole):
                self._place = {**now, "row": row + 1}
                yield start + held[row * room : (row + 1) * room]
            held, passed = held[whole * room :], 0
            self._place = {"text": number + 1, "row": 0, "start": start, "held": held}
        if held:
            self._place = {**self._place, "held": []}
            yield start + held

    def _ids(self, text: str) -> list[int]:
        with warnings.catch_warnings():  # a text may well hold special tokens
            warnings.simplefilter("ignore")
            return self.model.ids(text)[0]


class Shuffled:
    """This is rows in a given order, from any place on."""

    def __init__(self, rows: Sequence[Sequence[int]], order: Tensor, place: dict[str, Any] | None = None):
        self.rows, self.order, self.row = rows, order, (place or {"row": 0})["row"]

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        if self.row == len(self.order):
            raise StopIteration
        self.row += 1
        return list(self.rows[int(self.order[self.row - 1])])

    @property
    def place(self) -> dict[str, Any]:
        return {"row": self.row}


def contexts(model: Model, texts: Texts, size: int) -> Iterator[list[int]]:
    """This is texts as rows of `size` ids; see `Contexts`."""
    return Contexts(model, texts, size)


def compact(rows: Iterable[Sequence[int]]) -> list[array]:
    """This is rows in four bytes an id."""
    return [array("i", row) for row in rows]


def lines(texts: Iterable[str] | Path) -> Iterator[str]:
    """This is texts one by one; of a file, its lines that are not blank."""
    if not isinstance(texts, Path):
        yield from texts
        return
    with texts.open(encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file if line.strip())


def permutation(n: int, *seed: int | str) -> Tensor:
    """This is the numbers below `n` in an order that the words and numbers of `seed` decide, in four bytes each.

    They are hashed, so that neighbouring seeds and epochs have nothing to do with each other.
    """
    number = int.from_bytes(hashlib.sha256(json.dumps(seed).encode()).digest()[:8], "little") >> 1
    width = torch.int32 if n < 2**31 else torch.int64
    return torch.randperm(n, generator=torch.Generator().manual_seed(number), dtype=width)


__all__ = ["Contexts", "Shuffled", "Texts", "compact", "contexts", "lines", "permutation"]
