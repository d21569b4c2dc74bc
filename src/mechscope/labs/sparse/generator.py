"""Activations whose features are known: x = codes @ atoms + noise, few codes active at a time, forever and repeatably.

    data = Sparse(d=64, n_atoms=128, active=4, seed=0)
    data.atoms                     [atom d] the true directions, of unit length
    data.batch(step=7, size=256)   x [batch d], codes [batch atom]: always the same for the same step
    data.batches(256)              those batches, without end;  data.stream(256) is x alone

What decides which atoms are active together is the structure:

    independent   each atom on its own, with probability active / n_atoms
    correlated    groups of `group` atoms; with probability `together` an atom does what its group's coin says, which
                  gives two of a group the correlation together^2
    exclusive     groups of `group` atoms; at most one of a group is active
    hierarchical  the first of every `group` atoms is the parent of the others: a child is active with probability
                  `together` where its parent is, and nowhere else
    composed      two halves; every x is one atom of the first plus one of the second, as colour plus shape

A sparse dictionary has reasons to get the last two wrong: on hierarchical data it can absorb the parent into each child
(Chanin et al. 2024, "A is for Absorption"), on composed data the sums, `composites`, are sparser than the atoms
(Anders et al. 2024, "Sparse autoencoders find composed features in small toy models").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechscope.errors import MechscopeError, did_you_mean

STRUCTURES = ("independent", "correlated", "exclusive", "hierarchical", "composed")


class Batch(NamedTuple):
    """This is a batch of activations and what they are made of. x: [batch d]. codes: [batch atom], nonnegative."""

    x: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Sparse:
    """This is a sparse linear generator with a known dictionary.

    d, n_atoms: the width of activations and the number of atoms; more atoms than width is superposition.
    active: the mean number of atoms active in an x (2 where composed).
    structure, group, together: which atoms go together; see the module.
    noise: the standard deviation of Gaussian noise on each coordinate of x.
    orthogonal: whether the atoms are orthonormal; otherwise they are even on the sphere.
    low, high: an active code is uniform between them. seed: fixes the atoms and, with the step, each batch.

    Raises MechscopeError for an unknown structure, or sizes that cannot be.

    >>> data = Sparse(d=64, n_atoms=128, active=4, seed=0)
    >>> x, codes = data.batch(step=0, size=1000)
    >>> bool(torch.allclose(x, codes @ data.atoms, atol=1e-5)), round(float((codes > 0).float().sum(1).mean()))
    (True, 4)
    """

    d: int = 64
    n_atoms: int = 128
    active: float = 4.0
    structure: Literal["independent", "correlated", "exclusive", "hierarchical", "composed"] = "independent"
    group: int = 4
    together: float = 0.5
    noise: float = 0.0
    orthogonal: bool = False
    low: float = 0.5
    high: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            near = did_you_mean(self.structure, STRUCTURES)
            raise MechscopeError(f"no structure {self.structure!r}{near}; there are {', '.join(STRUCTURES)}")
        if self.structure == "composed" and (self.active != 2 or self.n_atoms % 2):
            raise MechscopeError(
                f"composed data has one atom of each of two halves, not {self.active:g} of {self.n_atoms}; "
                "give active=2 and an even n_atoms"
            )
        if self.structure not in ("independent", "composed") and self.n_atoms % self.group:
            raise MechscopeError(
                f"{self.n_atoms} atoms make no groups of {self.group}; give a multiple of {self.group}"
            )
        if not 0 < self.density <= self._densest:
            raise MechscopeError(
                f"{self.active:g} of {self.n_atoms} {self.structure} atoms cannot be active on average; "
                f"give active between 0 and {self._densest * self.n_atoms:g}"
            )
        if self.orthogonal and self.n_atoms > self.d:
            raise MechscopeError(f"{self.n_atoms} atoms cannot be orthogonal in {self.d} dimensions; give d >= n_atoms")

    @property
    def density(self) -> float:
        """This is the mean probability that an atom is active."""
        return self.active / self.n_atoms

    @property
    def _densest(self) -> float:
        """This is the mean density at which a whole group is active all the time."""
        children = 1 + (self.group - 1) * self.together
        return {"exclusive": 1 / self.group, "hierarchical": children / self.group}.get(self.structure, 1.0)

    @cached_property
    def atoms(self) -> Tensor:
        """This is the true directions, [atom d], of unit length."""
        # Far from the seeds of batches, so that no batch is made of the numbers that made the atoms. Torch reads 32
        # bits of a seed: 2**40 + s would be s.
        drawn = torch.randn(self.n_atoms, self.d, generator=torch.Generator().manual_seed(2**31 + self.seed))
        if self.orthogonal:
            return torch.linalg.qr(drawn.T).Q.T.contiguous()
        return drawn / drawn.norm(dim=1, keepdim=True)

    @cached_property
    def parents(self) -> Tensor:
        """This is each atom's parent, [atom]; -1 where it has none."""
        if self.structure != "hierarchical":
            return torch.full((self.n_atoms,), -1)
        index = torch.arange(self.n_atoms)
        first = index - index % self.group
        return torch.where(index == first, -1, first)

    @cached_property
    def composites(self) -> Tensor:
        """This is the unit directions of the sums that composed data consists of, [pair d], the first half's slowest.

        Raises MechscopeError where the data is not composed.
        """
        if self.structure != "composed":
            raise MechscopeError(f"{self.structure} data has no composites; give structure='composed'")
        one, other = self.atoms.chunk(2)
        sums = (one[:, None] + other[None, :]).flatten(0, 1)
        return sums / sums.norm(dim=1, keepdim=True)

    def batch(self, step: int, size: int) -> Batch:
        """This is the batch of a step: `size` activations and their codes, fixed by (seed, step, size)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        gates = self._gates(size, generator)
        codes = gates * (self.low + (self.high - self.low) * torch.rand(size, self.n_atoms, generator=generator))
        x = codes @ self.atoms
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=generator)
        return Batch(x, codes)

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        """This is the batches of the steps from `start`, without end."""
        return (self.batch(step, size) for step in itertools.count(start))

    def stream(self, size: int, start: int = 0) -> Iterator[Tensor]:
        """This is the activations of those batches alone, [batch d] each: what a dictionary is trained on."""
        return (batch.x for batch in self.batches(size, start))

    def _gates(self, size: int, generator: torch.Generator) -> Tensor:
        """This draws which atoms are active, [batch atom], zeros and ones."""

        def coins(n: int, p: float) -> Tensor:
            return (torch.rand(size, n, generator=generator) < p).float()

        n, p, groups = self.n_atoms, self.density, self.n_atoms // self.group
        if self.structure == "independent":
            return coins(n, p)
        if self.structure == "correlated":
            shared = coins(groups, p).repeat_interleave(self.group, dim=1)
            return torch.where(coins(n, self.together) > 0, shared, coins(n, p))
        if self.structure == "exclusive":
            chosen = torch.randint(self.group, (size, groups), generator=generator)
            one = torch.nn.functional.one_hot(chosen, self.group).flatten(1)
            return one * coins(groups, p * self.group).repeat_interleave(self.group, dim=1)
        if self.structure == "hierarchical":
            parent = coins(groups, p * self.group / (1 + (self.group - 1) * self.together))
            gates = parent.repeat_interleave(self.group, dim=1)
            return gates * torch.where(self.parents >= 0, coins(n, self.together), 1.0)
        halves = [torch.randint(n // 2, (size,), generator=generator) for _ in range(2)]
        return torch.cat([torch.nn.functional.one_hot(half, n // 2) for half in halves], dim=1).float()
