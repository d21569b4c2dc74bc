"""Dictionaries made by hand from a generator's atoms, whose scores are known: perfect, shrunk, random, split ...

They read the codes of orthonormal atoms off x exactly (an inner product above a threshold below every code), and turn
them into features by a rule; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Coder
from mechscope.labs.sparse import Sparse

THRESHOLD = 0.25  # every active code is at least 0.5


def flat(n_atoms: int = 32, d: int = 64, **more) -> Sparse:
    """Orthonormal atoms that are independent of one another."""
    return Sparse(d=d, n_atoms=n_atoms, active=more.pop("active", 4), orthogonal=True, **more)


def nested(n_atoms: int = 32, d: int = 64, **more) -> Sparse:
    """Orthonormal atoms in families of a parent and three children."""
    return flat(n_atoms, d, structure="hierarchical", **more)


def paired(n_atoms: int = 8, d: int = 32, **more) -> Sparse:
    """Orthonormal atoms of which one of each half is active."""
    return flat(n_atoms, d, structure="composed", active=2, **more)


class ByHand(Coder):
    """A dictionary whose features are a rule's of the codes; rows of W_dec are what its latents write."""

    sparse = False

    def __init__(self, readers: Tensor, writers: Tensor, rule: Callable[[Tensor], Tensor] = lambda codes: codes):
        super().__init__(readers.shape[1], len(writers))
        with torch.no_grad():
            self.W_dec.copy_(writers)
        self.register_buffer("readers", readers)
        self.rule = rule

    def encode(self, x: Tensor) -> Tensor:
        pre = x @ self.readers.T
        return self.rule(torch.where(pre > THRESHOLD, pre, 0.0))


def perfect(data: Sparse) -> ByHand:
    """Every latent is an atom."""
    return ByHand(data.atoms, data.atoms)


def shrunk(data: Sparse, by: float = 0.8) -> ByHand:
    """The atoms, each written too short."""
    return ByHand(data.atoms, by * data.atoms)


def random(data: Sparse, n_latents: int | None = None, seed: int = 5) -> ByHand:
    """Latents in random directions."""
    drawn = torch.randn(n_latents or data.n_atoms, data.d, generator=torch.Generator().manual_seed(seed))
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    return ByHand(drawn, drawn)


def padded(data: Sparse, dead: int, dense: int) -> ByHand:
    """The atoms, with latents besides that never fire and latents that always do."""
    writers = torch.cat([data.atoms, torch.randn(dead, data.d), torch.zeros(dense, data.d)])

    def rule(codes: Tensor) -> Tensor:
        return torch.cat([codes, codes.new_zeros(len(codes), dead), codes.new_ones(len(codes), dense)], 1)

    return ByHand(data.atoms, writers, rule)


def absorbed(data: Sparse) -> ByHand:
    """A parent's latent is silent where a child is active, whose latent writes both."""
    parents = data.parents
    children = (parents >= 0).nonzero().flatten()
    writers = data.atoms.clone()
    writers[children] += data.atoms[parents[children]]

    def rule(codes: Tensor) -> Tensor:
        features = codes.clone()
        busy = torch.zeros_like(codes).index_add(1, parents[children], (codes[:, children] > 0).float())
        return features.masked_fill(busy > 0, 0.0)

    return ByHand(data.atoms, writers, rule)


def split(data: Sparse, ways: int = 2) -> ByHand:
    """Every atom has `ways` latents, each of which fires for a range of its codes."""
    edges = torch.linspace(data.low, data.high, ways + 1)[1:-1]

    def rule(codes: Tensor) -> Tensor:
        which = torch.bucketize(codes, edges)
        return torch.cat([codes * (which == way) for way in range(ways)], 1)

    return ByHand(data.atoms, data.atoms.repeat(ways, 1), rule)


def composites(data: Sparse) -> ByHand:
    """Of composed data: a latent for each pair of atoms, which fires where both are active."""
    half = data.n_atoms // 2

    def rule(codes: Tensor) -> Tensor:
        one, other = codes[:, :half, None], codes[:, None, half:]
        return (((one + other) / 2**0.5) * ((one > 0) & (other > 0))).flatten(1)

    return ByHand(data.atoms, data.composites, rule)
