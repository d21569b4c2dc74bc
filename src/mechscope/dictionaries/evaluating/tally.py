"""Sums over blocks of neighbouring rows, from which any function of the totals gets its bootstrap interval.

Tokens of one text resemble each other, so rows are not drawn again one by one but in blocks of neighbours (Künsch 1989,
"The jackknife and the bootstrap for general stationary observations"). When the blocks become many, neighbours are
merged, so that a pass over any number of rows holds at most `MOST` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mechscope.dictionaries.evaluating.report import NAN, Interval
from mechscope.tasks.intervals import fraction_interval, interval, mean_interval, resampled

MOST = 1024
DRAWS = 1000
FEWEST = 8
"""Below so many blocks there is no interval: it would look surer than it is."""


class Tally:
    """This is the sums of quantities over blocks of `block` rows, in double precision.

    >>> tally = Tally(block=1)
    >>> tally.add(torch.arange(10.0)[:, None])
    >>> value, low, high = tally.interval(lambda total: total[..., 0] / 10)
    >>> value, low < 4.5 < high
    (4.5, True)
    """

    def __init__(self, block: int = 128):
        self.block = block
        self._sums: list[Tensor] = []
        self._count = 0
        self._merged = 1

    def add(self, rows: Tensor) -> None:
        """This adds rows [n, quantities]; the last block of a batch may be smaller than the others."""
        parts = [part.sum(0) for part in rows.double().split(self.size)]
        if parts:
            self._sums.append(torch.stack(parts).cpu())
            self._count += len(parts)
        if self._count > MOST:
            together = torch.cat(self._sums)
            pairs = together[: len(together) // 2 * 2].unflatten(0, (-1, 2)).sum(1)
            self._sums = [torch.cat([pairs, together[len(pairs) * 2 :]])]
            self._count, self._merged = len(self._sums[0]), 2 * self._merged

    @property
    def size(self) -> int:
        """This is how many rows a block has by now."""
        return self.block * self._merged

    @property
    def sums(self) -> Tensor:
        """This is the sums of each block, [blocks, quantities]."""
        return torch.cat(self._sums)

    def interval(self, of: Callable[[Tensor], Tensor], seed: int = 0) -> Interval:
        """This is a function of the totals [..., quantities] -> [...], and its 95 % percentile interval over blocks."""
        sums = self.sums
        value = float(of(sums.sum(0)))
        if len(sums) < FEWEST:
            return value, NAN, NAN
        weights = torch.from_numpy(resampled([[i] for i in range(len(sums))], len(sums), DRAWS, seed))
        low, high = interval(of(weights @ sums).numpy())
        return value, float(low), float(high)


def share(hits: Tensor) -> Interval:
    """This is the share of `hits` [n] that are true, with Wilson's interval; NaN where there are none.

    >>> [round(x, 2) for x in share(torch.tensor([True, True]))]
    [1.0, 0.34, 1.0]
    """
    if not len(hits):
        return NAN, NAN, NAN
    value = float(hits.double().mean())
    low, high = fraction_interval(value, len(hits))
    return value, max(0.0, low), high


def mean(values: Tensor, seed: int = 0) -> Interval:
    """This is the mean of values [n] and its bootstrap interval; no interval with fewer than two."""
    array = np.asarray(values.detach().cpu(), dtype=float)
    array = array[np.isfinite(array)]
    if not len(array):
        return NAN, NAN, NAN
    return (float(array.mean()), *(mean_interval(array, seed=seed) if len(array) > 1 else (NAN, NAN)))


def weighed(hits: Sequence[Tensor], weights: Sequence[float], seed: int = 0) -> Interval:
    """This is a weighted sum of shares, each of its own `hits` [n] bool, and its interval.

    The interval is of Jeffreys' posteriors of the shares: it keeps its width where all hits agree, as drawing them
    again would not.

    >>> value, low, high = weighed([torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)], [0.5, 0.5])
    >>> value, low < 0.5 < high
    (0.5, True)
    """
    random = np.random.default_rng(seed)
    draws, value = np.zeros(DRAWS), 0.0
    for found, weight in zip(hits, weights):
        up, n = float(found.sum()), len(found)
        value += weight * up / n
        draws += weight * random.beta(0.5 + up, 0.5 + n - up, DRAWS)
    low, high = interval(draws)
    return value, min(value, float(low)), max(value, float(high))
