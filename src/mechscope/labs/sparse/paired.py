"""Paired activations whose connection is known: a planted map for transcoders, several sites for crosscoders.

PlantedMap   y = writes^T ReLU(reads codes - threshold): each unit reads known atoms and writes a known direction
Sites        x_s = (codes * present_s) @ atoms_s: the same codes in several spaces, some atoms in one space only
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mechscope.errors import MechscopeError
from mechscope.labs.sparse.generator import Sparse


class Mapped(NamedTuple):
    """This is a batch through a planted map: x [batch d], y [batch d_out], codes [batch atom], units [batch unit]."""

    x: Tensor
    y: Tensor
    codes: Tensor
    units: Tensor


@dataclass(frozen=True)
class PlantedMap:
    """This is a known MLP from the atoms of a generator to directions of its own.

    source: the generator. n_units: hidden units. fan_in: how many atoms each unit reads, each with weight 1. A unit's
    threshold is (fan_in - 1) times the largest code: with one atom it passes the code on; with two it is their AND,
    above zero only where both are active. d_out: the width of y. seed: fixes what is read and written.

    Raises MechscopeError where a unit would read more atoms than there are.

    >>> planted = PlantedMap(Sparse(d=64, n_atoms=32), n_units=48, fan_in=2)
    >>> x, y, codes, units = planted.batch(step=0, size=500)
    >>> bool(((units > 0) <= (codes @ (planted.reads > 0).float().T > 0)).all()), y.shape
    (True, torch.Size([500, 64]))
    """

    source: Sparse
    n_units: int = 64
    fan_in: int = 1
    d_out: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.fan_in <= self.source.n_atoms:
            raise MechscopeError(
                f"a unit cannot read {self.fan_in} of {self.source.n_atoms} atoms; "
                f"give fan_in between 1 and {self.source.n_atoms}"
            )

    @cached_property
    def reads(self) -> Tensor:
        """This is which atoms each unit reads, [unit atom], zeros and ones; atoms are dealt out before any repeats."""
        generator = torch.Generator().manual_seed(2**31 + 2**28 + self.seed)
        rounds = -(-self.n_units * self.fan_in // self.source.n_atoms) + 1
        deck = torch.cat([torch.randperm(self.source.n_atoms, generator=generator) for _ in range(rounds)]).tolist()
        reads = torch.zeros(self.n_units, self.source.n_atoms)
        for unit in range(self.n_units):
            while reads[unit].sum() < self.fan_in:  # a card that the unit already has, where rounds meet, is dropped
                reads[unit, deck.pop(0)] = 1.0
        return reads

    @property
    def threshold(self) -> float:
        """This is what is subtracted before each unit's ReLU."""
        return (self.fan_in - 1) * self.source.high

    @cached_property
    def writes(self) -> Tensor:
        """This is each unit's output direction, [unit d_out], of unit length."""
        drawn = torch.randn(
            self.n_units, self.d_out, generator=torch.Generator().manual_seed(2**31 + 2**29 + self.seed)
        )
        return drawn / drawn.norm(dim=1, keepdim=True)

    def batch(self, step: int, size: int) -> Mapped:
        """This is the batch of a step; the source's, and what the map makes of its codes."""
        x, codes = self.source.batch(step, size)
        units = torch.relu(codes @ self.reads.T - self.threshold)
        return Mapped(x, units @ self.writes, codes, units)

    def batches(self, size: int, start: int = 0) -> Iterator[Mapped]:
        """This is the batches of the steps from `start`, without end."""
        return (self.batch(step, size) for step in itertools.count(start))

    def mlp(self) -> nn.Sequential:
        """This is the map as an MLP of x: Linear, ReLU, Linear. Exact where there is no noise.

        Raises MechscopeError where there are more atoms than dimensions, whose codes no linear map reads off x.
        """
        if self.source.n_atoms > self.source.d:
            raise MechscopeError(
                f"the codes of {self.source.n_atoms} atoms cannot be read off {self.source.d} dimensions linearly; "
                "give a source with n_atoms <= d, or use batch(), whose y is made from the codes"
            )
        first = nn.Linear(self.source.d, self.n_units)
        second = nn.Linear(self.n_units, self.d_out, bias=False)
        with torch.no_grad():
            first.weight.copy_(self.reads @ torch.linalg.pinv(self.source.atoms).T)
            first.bias.fill_(-self.threshold)
            second.weight.copy_(self.writes.T)
        return nn.Sequential(first, nn.ReLU(), second)


class Seen(NamedTuple):
    """This is a batch at several sites. x: [batch site d]. codes: [batch atom]."""

    x: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Sites:
    """This is one set of codes seen in several spaces, as layers or models are.

    source: the generator; its atoms are the first site's. n_sites: how many spaces. shared: the share of atoms that are
    in all of them; the others are in one each, dealt out in turn. aligned: whether a shared atom has one direction in
    all of them rather than one for each.

    >>> sites = Sites(Sparse(d=32, n_atoms=40), n_sites=2, shared=0.5)
    >>> sites.present.sum(1).tolist(), sites.batch(step=0, size=10).x.shape
    ([30, 30], torch.Size([10, 2, 32]))
    """

    source: Sparse
    n_sites: int = 2
    shared: float = 0.5
    aligned: bool = False

    @cached_property
    def atoms(self) -> Tensor:
        """This is the directions at each site, [site atom d]; those of absent atoms are there but never used."""
        own = [replace(self.source, seed=self.source.seed + 7919 * site) for site in range(self.n_sites)]
        return torch.stack([(self.source if self.aligned else data).atoms for data in own])

    @cached_property
    def present(self) -> Tensor:
        """This is which atoms are at which site, [site atom], true or false."""
        index = torch.arange(self.source.n_atoms)
        common = round(self.shared * self.source.n_atoms)
        return torch.stack([(index < common) | (index % self.n_sites == site) for site in range(self.n_sites)])

    def batch(self, step: int, size: int) -> Seen:
        """This is the batch of a step: the source's codes at every site, with the source's noise drawn for each."""
        codes = self.source.batch(step, size).codes
        x = torch.einsum("ba,sa,sad->bsd", codes, self.present.float(), self.atoms)
        if self.source.noise:
            generator = torch.Generator().manual_seed(2**31 + 2**30 + self.source.seed * 1_000_003 + step)
            x = x + self.source.noise * torch.randn(x.shape, generator=generator)
        return Seen(x, codes)

    def batches(self, size: int, start: int = 0) -> Iterator[Seen]:
        """This is the batches of the steps from `start`, without end."""
        return (self.batch(step, size) for step in itertools.count(start))
