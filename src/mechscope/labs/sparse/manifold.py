"""Activations whose features are places on circles or spheres: no finite dictionary is the true one.

    data = Manifold(d=32, kind="circle", n=1)
    x, points = data.batch(step=0, size=256)      x [batch d]; points [batch manifold m], unit vectors, 0 where absent

Each manifold has a subspace of its own, orthogonal to the others'; where it is present, x has a point of it, at a
radius between `low` and `high`. Source: Anthropic's Circuits Updates, May 2023, on feature manifolds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechscope.errors import LabError

DIMENSIONS = {"circle": 2, "sphere": 3}


class Placed(NamedTuple):
    """This is a batch of activations, and where on each manifold they are. x: [batch d]. points: [batch manifold m]."""

    x: Tensor
    points: Tensor


@dataclass(frozen=True)
class Manifold:
    """This is a generator of activations on manifolds.

    d: the width of activations. kind: "circle" or "sphere". n: how many manifolds. active: the probability that each
    is present. low, high: the radius is uniform between them. noise: the standard deviation on each coordinate of x.
    seed: fixes the subspaces and, with the step, each batch.

    Raises LabError where there is no such kind, or no room for so many.

    >>> x, points = Manifold(d=16, n=2).batch(step=0, size=100)
    >>> x.shape, points.shape, bool(torch.allclose(points.norm(dim=2), torch.ones(100, 2)))
    (torch.Size([100, 16]), torch.Size([100, 2, 2]), True)
    """

    d: int = 32
    kind: Literal["circle", "sphere"] = "circle"
    n: int = 1
    active: float = 1.0
    low: float = 1.0
    high: float = 1.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in DIMENSIONS:
            raise LabError(f"no manifold {self.kind!r}; there are {', '.join(DIMENSIONS)}")
        if self.n * DIMENSIONS[self.kind] > self.d:
            room = self.d // DIMENSIONS[self.kind]
            raise LabError(
                f"{self.n} {self.kind}s have no room in {self.d} dimensions; give n <= {room}, or a greater d"
            )

    @cached_property
    def subspaces(self) -> Tensor:
        """This is an orthonormal basis of each manifold's subspace, [manifold m d]."""
        m = DIMENSIONS[self.kind]
        drawn = torch.randn(self.d, self.n * m, generator=torch.Generator().manual_seed(2**31 + 3 * 2**28 + self.seed))
        return torch.linalg.qr(drawn).Q.T.contiguous().unflatten(0, (self.n, m))

    def batch(self, step: int, size: int) -> Placed:
        """This is the batch of a step, fixed by (seed, step, size)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn = torch.randn(size, self.n, DIMENSIONS[self.kind], generator=generator)
        there = torch.rand(size, self.n, 1, generator=generator) < self.active
        points = drawn / drawn.norm(dim=2, keepdim=True) * there
        radius = self.low + (self.high - self.low) * torch.rand(size, self.n, 1, generator=generator)
        x = torch.einsum("bnm,nmd->bd", radius * points, self.subspaces)
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=generator)
        return Placed(x, points)

    def batches(self, size: int, start: int = 0) -> Iterator[Placed]:
        """This is the batches of the steps from `start`, without end."""
        return (self.batch(step, size) for step in itertools.count(start))

    def stream(self, size: int, start: int = 0) -> Iterator[Tensor]:
        """This is the activations of those batches alone, [batch d] each: what a dictionary is trained on."""
        return (batch.x for batch in self.batches(size, start))
