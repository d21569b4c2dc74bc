"""The k highest activations of every unit in a stream of tokens: exact, in memory that does not grow.

A token whose activation is not above a unit's k-th highest so far cannot be among its highest, and after n tokens the
next one is above it with probability k / n. So nearly all that is done with a token is one comparison; only the few
that pass it are sorted, each beside the k of its own unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Highest:
    """This is the k highest activations of each unit so far: `values` and `where` [units k], highest first.

    Only activations above 0 count; a place that is not filled has the value 0 and the token -1. Of equal activations
    the earlier token is the higher.

    >>> highest = Highest(units=1, k=2)
    >>> highest.add(torch.tensor([[1.0], [3.0], [2.0]]), torch.arange(3))
    >>> highest.values.tolist(), highest.where.tolist()
    ([[3.0, 2.0]], [[1, 2]])
    """

    def __init__(self, units: int, k: int):
        self.values = torch.zeros(units, k)
        self.where = torch.full((units, k), -1, dtype=torch.long)

    def add(self, activations: Tensor, where: Tensor) -> None:
        """This takes in activations [tokens units] of the tokens numbered `where` [tokens]; numbers only ascend."""
        passed = activations > self.values[:, -1]
        self._raise_the_floor(passed, activations)
        token, unit = places(passed)
        if not len(token):
            return
        changed, (value, where) = tables(unit, [(activations[token, unit], 0.0), (where[token], -1)])
        self._keep(changed, value, where)

    def join(self, other: Highest) -> None:
        """This takes in what another has seen of other tokens."""
        self._keep(torch.arange(len(self.values)), other.values, other.where, ascending=False)

    def _raise_the_floor(self, passed: Tensor, activations: Tensor) -> None:
        """This drops from `passed` what cannot stay, for units whose list is not full, where nearly all passes.

        The k-th highest of these tokens is a floor too. Its equals pass, for the order among them is that of tokens.
        """
        k = self.values.shape[1]
        unfilled = (self.where[:, -1] < 0).nonzero()[:, 0]
        if not len(unfilled) or len(activations) <= k:
            return
        crowded = unfilled[counted(columns(passed, unfilled)) > 2 * k]
        if len(crowded):
            some = columns(activations, crowded)
            passed[:, crowded] = some >= quantiles(some, [len(some) - k])[:, 0]

    def _keep(self, units: Tensor, value: Tensor, where: Tensor, ascending: bool = True) -> None:
        """This sorts new activations [units n] in beside the old ones; `ascending`: their tokens come after those."""
        k = self.values.shape[1]
        value = torch.cat([self.values[units], value.to(self.values.dtype)], 1)
        where = torch.cat([self.where[units], where], 1)
        if not ascending:
            order = where.argsort(1)
            value, where = value.gather(1, order), where.gather(1, order)
        order = value.argsort(dim=1, descending=True, stable=True)[:, :k]
        self.values[units], self.where[units] = value.gather(1, order), where.gather(1, order)


def tables(unit: Tensor, parts: Sequence[tuple[Tensor, float]], most: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """This is the units that occur, and for each part (values, filler) a table: a row for each unit, in their order.

    most: how many to take of each unit, the first ones.
    """
    order = unit.argsort(stable=True)
    units, counts = unit[order].unique_consecutive(return_counts=True)
    row = torch.arange(len(units)).repeat_interleave(counts)
    place = torch.arange(len(unit)) - (counts.cumsum(0) - counts)[row]
    if most is not None:
        taken = place < most
        order, row, place = order[taken], row[taken], place[taken]
    made = []
    for values, filler in parts:
        table = values.new_full((len(units), int(place.max()) + 1), filler)
        table[row, place] = values[order]
        made.append(table)
    return units, made


def quantiles(activations: Tensor, ranks: Sequence[int]) -> Tensor:
    """This is each unit's activations [tokens units] of those ranks from below, the lowest being 0: [units ranks]."""
    rows = activations.numpy().T.copy()  # numpy's selection is several times faster than torch's
    rows.partition(sorted(set(ranks)), axis=1)
    return torch.from_numpy(rows[:, list(ranks)])


def columns(matrix: Tensor, which: Tensor) -> Tensor:
    """This is some columns of a matrix, without a copy where they are all."""
    return matrix if len(which) == matrix.shape[1] else matrix[:, which]


def counted(true: Tensor) -> Tensor:
    """This is how many elements of each column are true; torch takes five times as long."""
    return torch.from_numpy(true.numpy().sum(0, dtype=np.int32))


def places(true: Tensor) -> tuple[Tensor, Tensor]:
    """This is the rows and columns of the true elements of a matrix; numpy finds few among many ten times sooner."""
    flat = np.flatnonzero(true.numpy())
    row, column = np.divmod(flat, true.shape[1])
    return torch.from_numpy(row), torch.from_numpy(column)
