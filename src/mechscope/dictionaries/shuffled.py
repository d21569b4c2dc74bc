"""Batches of an activation store in a shuffled order, from any place on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.errors import DictionaryError
from mechscope.models.contexts import permutation

if TYPE_CHECKING:
    from mechscope.dictionaries.activations import Activations


class Shuffled:
    """This is an iterator of batches of a store: every epoch is a permutation of all its vectors, laid end to end.

    So only one number says where it stands, how many vectors it has given, and a batch may lie across two epochs.
    """

    def __init__(
        self,
        store: Activations,
        sites: Sequence[str],
        single: bool,
        size: int,
        seed: int,
        epochs: int | None,
        dtype: torch.dtype,
    ):
        if size < 1:
            raise DictionaryError(f"size={size}: a batch has 1 vector or more")
        self.store, self.sites, self.single = store, list(sites), single
        self.size, self.seed, self.epochs, self.dtype = size, seed, epochs, dtype
        self.given = 0
        self._order: tuple[int, Tensor] | None = None

    @property
    def at(self) -> str | list[str]:
        """This is the site whose vectors are yielded, or a list of the sites where a dict of them is."""
        return self.sites[0] if self.single else self.sites

    def facts(self) -> dict[str, Any]:
        """This is what something trained on the store should say of it: the model, the tokens, as JSON."""
        header = self.store.header
        return {"model": header["provenance"], "mask": header["mask"], "context": header["question"]["context"]}

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        last = self.given + self.size
        if self.epochs is not None:
            last = min(last, self.epochs * len(self.store))
        if last <= self.given:
            raise StopIteration
        out = self.store.read(self.numbers(self.given, last), self.sites, self.dtype)
        self.given = last
        return out[self.sites[0]] if self.single else out

    def numbers(self, first: int, last: int) -> Tensor:
        """This is which vectors come from place `first` up to `last` in all epochs laid end to end."""
        parts, n = [], len(self.store)
        while first < last:
            epoch, at = divmod(first, n)
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, permutation(n, self.seed, "epoch", epoch)
            parts.append(self._order[1][at : at + last - first])
            first += len(parts[-1])
        return torch.cat(parts)

    def state(self) -> dict[str, Any]:
        """This is where it stands, as JSON."""
        return {"given": self.given, **self._asked()}

    def resume(self, state: dict[str, Any]) -> Shuffled:
        """This goes to where batches with the same arguments stood; raises DictionaryError for others'."""
        for name, mine in self._asked().items():
            if (theirs := state.get(name)) != mine:
                raise DictionaryError(
                    f"this state is of batches with {name}={theirs!r}, and these have {name}={mine!r}"
                )
        self.given = state["given"]
        return self

    def _asked(self) -> dict[str, Any]:
        options = {"size": self.size, "seed": self.seed, "epochs": self.epochs, "sites": self.sites}
        return {**options, "vectors": len(self.store), "store": self.store.checksum}


__all__ = ["Shuffled"]
