"""A random sample of every unit's activations in each of several ranges, from a stream of tokens, in fixed memory.

Every token has a key, a hash of its number and the seed, as good as drawn uniformly from 0 to 1. A range keeps the
tokens with the r smallest keys among those that fell into it: a sample without replacement, whatever the order in which
tokens come and however they are split over processes (bottom-k sampling; with r = 1, reservoir sampling by priorities,
Vitter 1985 and Efraimidis & Spirakis 2006). One key serves all units: each unit's sample is uniform, those of two
units are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mechscope.units.highest import places, quantiles, tables

FEWEST = 10
"""How often a feature must be on in the first batch for quantiles of its own."""


class Samples:
    """This is r tokens of each unit in each range of its activations: `values`, `where`, `keys` [units ranges r].

    edges: [units ranges-1], ascending; range i holds edges[i-1] <= activation < edges[i]. A place that is not filled
    has the key 2 and the token -1.

    >>> samples = Samples(torch.tensor([[1.5]]), r=1)
    >>> samples.add(torch.tensor([[1.0], [3.0], [2.0]]), torch.arange(3))
    >>> sorted(samples.values.flatten().tolist())[0]
    1.0
    """

    def __init__(self, edges: Tensor, r: int, seed: int = 0):
        self.edges, self.seed = edges, seed
        shape = (len(edges), edges.shape[1] + 1, r)
        self.keys = torch.full(shape, 2.0, dtype=torch.float64)
        self.values = torch.zeros(shape)
        self.where = torch.full(shape, -1, dtype=torch.long)

    @classmethod
    def of(cls, activations: Tensor, levels: Sequence[float], r: int, seed: int = 0) -> Samples:
        """This is empty samples whose ranges lie between the quantiles of activations [tokens units], at `levels`."""
        ranks = _ranks(levels, len(activations))
        return cls(quantiles(activations.float(), ranks), r, seed)

    @classmethod
    def of_features(cls, activations: Tensor, levels: Sequence[float], r: int, seed: int = 0) -> Samples:
        """This is empty samples of a dictionary's features [tokens latents], which are 0 on nearly every token.

        The lowest range is where a feature is off; the others lie between quantiles of its activations where it is on,
        or, of a feature that was on for fewer than `FEWEST` tokens, of those of all features together.
        """
        on = activations > 0
        pooled = activations[on].float()
        edges = torch.full((activations.shape[1], len(levels) + 1), torch.finfo(torch.float32).tiny)
        if len(pooled):
            edges[:, 1:] = pooled.sort().values[_ranks(levels, len(pooled))]
        for latent in (on.sum(0) >= FEWEST).nonzero()[:, 0].tolist():
            own = activations[:, latent][on[:, latent]].float().sort().values
            edges[latent, 1:] = own[_ranks(levels, len(own))]
        return cls(edges, r, seed)

    def add(self, activations: Tensor, where: Tensor) -> None:
        """This takes in activations [tokens units] of the tokens numbered `where` [tokens]."""
        key = keys(where, self.seed)
        order = key.argsort()
        for i in range(self.keys.shape[1]):
            low, high = self._range(i)
            start, size = 0, 32
            # In the order of their keys, so that soon no later token can be in any unit's sample.
            while start < len(order):
                tokens = order[start : start + size]
                units = ((self.keys[:, i, -1] > key[tokens[0]]) & (low < high)).nonzero()[:, 0]
                if not len(units):
                    break
                self._offer(i, activations, where, key, tokens, units)
                start, size = start + size, 2 * size

    def join(self, other: Samples) -> None:
        """This takes in what another, of the same edges and seed, has drawn from other tokens."""
        every = torch.arange(len(self.keys))
        for i in range(self.keys.shape[1]):
            self._keep(i, every, other.keys[:, i], other.values[:, i], other.where[:, i])

    def _range(self, i: int) -> tuple[Tensor, Tensor]:
        infinite = torch.full((len(self.edges),), float("inf"))
        low = self.edges[:, i - 1] if i else -infinite
        high = self.edges[:, i] if i < self.edges.shape[1] else infinite
        return low, high

    def _offer(self, i: int, activations: Tensor, where: Tensor, key: Tensor, tokens: Tensor, units: Tensor) -> None:
        some = activations[tokens] if len(units) == activations.shape[1] else activations[tokens[:, None], units]
        low, high = (edge[units] for edge in self._range(i))
        token, column = places((some >= low) & (some < high) & (key[tokens][:, None] < self.keys[units, i, -1]))
        if len(token):
            unit, key = units[column], key[tokens[token]]
            parts = [(key, 2.0), (some[token, column], 0.0), (where[tokens[token]], -1)]
            # Tokens come in the order of their keys: after the first r of a unit no more can stay.
            changed, new = tables(unit, parts, self.keys.shape[2])
            self._keep(i, changed, *new)

    def _keep(self, i: int, units: Tensor, key: Tensor, value: Tensor, where: Tensor) -> None:
        """This keeps of range i the smallest keys of units [n], among the old ones and new ones [n m]."""
        key = torch.cat([self.keys[units, i], key], 1)
        order = key.argsort(dim=1, stable=True)[:, : self.keys.shape[2]]
        self.keys[units, i] = key.gather(1, order)
        for held, new in ((self.values, value), (self.where, where)):
            held[units, i] = torch.cat([held[units, i], new.to(held.dtype)], 1).gather(1, order)


def _ranks(levels: Sequence[float], n: int) -> list[int]:
    """This is the ranks from below, the lowest being 0, of quantiles of n numbers."""
    return [max(1, min(n, round(level * n))) - 1 for level in levels]


def keys(where: Tensor, seed: int) -> Tensor:
    """This is a key from 0 to 1 for each token number: the mixing step of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = where.numpy().astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)
