"""Arithmetic on active latents alone: a product that picks its entries, a decoder that gathers rows, their gradients.

A batch of n vectors activates a handful of m latents each. Everything after the encoder's product is then a sum of a
few rows of a matrix for each row of a batch, which `torch.nn.functional.embedding_bag` adds up where they lie, or an
inner product for each active entry, which `torch.sparse.sampled_addmm` takes. Nothing of shape [n, m] outlives a chunk.

    pattern = pick(x, W, b, select)      which entries are kept, chunk by chunk, without gradients
    products(x, W, b, pattern)           x . W[latent] + b[latent] at those entries, with gradients
    rows_sum(sparse, W)                  sparse @ W, with gradients: the decoder
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK = 2**23
"""How many entries of the encoder's product are held at once: 512 rows of 16,384 latents, 32 MB."""


@dataclass(frozen=True)
class Sparse:
    """This is features [n, n_latents] with their nonzero entries alone, row after row (compressed sparse rows).

    values: [nnz], of any sign, with gradients. latents: [nnz] int64, the latent of each. offsets: [n + 1] int64: row
    i's entries are those from offsets[i] to offsets[i + 1].
    """

    values: Tensor
    latents: Tensor
    offsets: Tensor
    n_latents: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.offsets) - 1, self.n_latents

    def counts(self) -> Tensor:
        """This is how many latents are active in each row [n]."""
        return self.offsets.diff()

    def rows(self) -> Tensor:
        """This is the row of each entry [nnz]."""
        return torch.arange(self.shape[0], device=self.latents.device).repeat_interleave(self.counts())

    def dense(self) -> Tensor:
        """This is the features as a tensor [n, n_latents].

        >>> Sparse(torch.tensor([2.0, 3.0]), torch.tensor([1, 0]), torch.tensor([0, 1, 2]), 2).dense().tolist()
        [[0.0, 2.0], [3.0, 0.0]]
        """
        flat = self.values.new_zeros(self.shape[0] * self.n_latents)
        return flat.index_add(0, self.rows() * self.n_latents + self.latents, self.values).view(self.shape)

    def with_values(self, values: Tensor) -> Sparse:
        """This is the same entries with other values."""
        return replace(self, values=values)

    def where(self, kept: Tensor) -> Sparse:
        """This is the entries for which `kept` [nnz] holds."""
        counts = torch.zeros_like(self.offsets[:-1]).index_add(0, self.rows(), kept.long())
        return Sparse(self.values[kept], self.latents[kept], _ends(counts), self.n_latents)

    def fired(self) -> Tensor:
        """This is how many rows each latent is active in [n_latents]."""
        return torch.bincount(self.latents, minlength=self.n_latents)


Select = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From pre-activations [rows, m] to the entries that are kept: (values [nnz], latents [nnz], counts [rows])."""


def pick(x: Tensor, W: Tensor, b: Tensor | None, select: Select) -> Sparse:
    """This is the entries of x @ W.T + b [n, m] that `select` keeps, chunk by chunk; no gradients flow.

    x: [n, d]. W: [m, d], a row a latent. b: [m] or None.
    """
    values, latents, counts = [], [], []
    with torch.no_grad():
        size = max(1, CHUNK // len(W))
        # One buffer for every chunk: a fresh one for each would be as slow to map as the product is to make.
        buffer = torch.empty(min(size, len(x)), len(W), dtype=x.dtype, device=x.device)
        for rows in x.split(size):
            pre = torch.mm(rows, W.T, out=buffer[: len(rows)]) if len(rows) else rows @ W.T
            v, i, c = select(pre if b is None else pre.add_(b))
            values.append(v)
            latents.append(i)
            counts.append(c)
    return Sparse(torch.cat(values), torch.cat(latents), _ends(torch.cat(counts)), len(W))


def top(pre: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """This selects the k greatest entries of each row, less those that are not above 0."""
    values, latents = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False)
    kept = values > 0
    return values[kept], latents[kept], kept.sum(1)


def above(pre: Tensor, least: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """This selects the entries greater than `least`, a number or one for each latent [m]."""
    kept = pre > least
    return pre[kept], kept.nonzero()[:, 1], kept.sum(1)


def products(x: Tensor, W: Tensor, b: Tensor | None, pattern: Sparse) -> Sparse:
    """This is x . W[latent] + b[latent] at the entries of `pattern`, with gradients to x, W and b.

    The values are those that `pattern` holds already, for `pick` has made them.
    """
    bias = W.new_zeros(len(W)) if b is None else b
    return pattern.with_values(_Products.apply(x, W, bias, pattern.values, pattern))  # type: ignore[arg-type]


def rows_sum(sparse: Sparse, W: Tensor) -> Tensor:
    """This is sparse @ W [n, d]: for each row the sum of its latents' rows of W [m, d], with gradients to both."""
    return _RowsSum.apply(sparse.values, W, sparse)  # type: ignore[return-value]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, values: Tensor, pattern: Sparse) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.pattern = pattern
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, W = ctx.saved_tensors
        given = ctx.pattern.with_values(grad)
        needed = ctx.needs_input_grad
        turned = _turned(given) if needed[1] or needed[2] else None
        return (
            _bags(given, W) if needed[0] else None,
            _bags(turned, x) if needed[1] and turned else None,
            _sums(turned) if needed[2] and turned else None,
            None,
            None,
        )


class _RowsSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W: Tensor, sparse: Sparse) -> Tensor:
        ctx.save_for_backward(values, W)
        ctx.sparse = sparse
        return _bags(sparse.with_values(values.detach()), W)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        values, W = ctx.saved_tensors
        sparse = ctx.sparse.with_values(values)
        return (
            entries(grad, W, sparse) if ctx.needs_input_grad[0] else None,
            _bags(_turned(sparse), grad.contiguous()) if ctx.needs_input_grad[1] else None,
            None,
        )


def entries(x: Tensor, W: Tensor, pattern: Sparse) -> Tensor:
    """This is the inner product x[row] . W[latent] [nnz] for each entry of `pattern`; no gradients flow."""
    x, W = x.detach(), W.detach()
    if fast := _kernels(W):
        return fast.entries(x, W, pattern)
    if x.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available() and x.device.type == "cpu":
        empty = torch.zeros_like(pattern.values)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            # The order of columns within a row does not matter to the product, so it is not checked.
            asked = torch.sparse_csr_tensor(
                pattern.offsets, pattern.latents, empty, pattern.shape, check_invariants=False
            )
            return torch.sparse.sampled_addmm(asked, x, W.T, beta=0.0).values()
    out, rows = torch.empty_like(pattern.values), pattern.rows()
    step = max(1, CHUNK // (4 * W.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        out[part] = (x[rows[part]] * W[pattern.latents[part]]).sum(-1)
    return out


def _bags(sparse: Sparse, W: Tensor) -> Tensor:
    """This is sparse @ W, without gradients; the rows that are added lie one after another in memory."""
    if fast := _kernels(W):
        return fast.bags(sparse, W.detach())
    return embedding_bag(
        sparse.latents,
        W.detach(),
        sparse.offsets,
        mode="sum",
        per_sample_weights=sparse.values.to(W.dtype),
        include_last_offset=True,
    )


@functools.cache
def _triton() -> Any:
    try:
        return import_module("mechscope.dictionaries.kernels")
    except ImportError:  # a build of torch without Triton
        return None


def _kernels(W: Tensor) -> Any:
    """This is the module of Triton kernels where they can run on this matrix, else None."""
    return _triton() if W.is_cuda and W.dtype != torch.float64 else None


def _turned(sparse: Sparse) -> Sparse:
    """This is the transpose [m, n], in the order of its rows and, within a latent, of the batch."""
    order = torch.argsort(sparse.latents, stable=True)
    return Sparse(sparse.values[order], sparse.rows()[order], _ends(sparse.fired()), sparse.shape[0])


def _sums(sparse: Sparse) -> Tensor:
    """This is the sum of each row's values [n], always added in one order."""
    return embedding_bag(
        torch.zeros_like(sparse.latents),
        sparse.values.new_ones(1, 1),
        sparse.offsets,
        mode="sum",
        per_sample_weights=sparse.values,
        include_last_offset=True,
    ).squeeze(1)


def _ends(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
