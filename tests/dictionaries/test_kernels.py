"""The Triton kernels against plain PyTorch: on a GPU, or interpreted (TRITON_INTERPRET=1) where Triton is installed."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from mechscope.dictionaries import sparse
from mechscope.dictionaries.sparse import Sparse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed (torch's CPU build has none)"
    ),
    pytest.mark.skipif(
        not torch.cuda.is_available() and not INTERPRETED, reason="no GPU, and TRITON_INTERPRET is not 1"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def some(n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Sparse, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 5, (n,), generator=draw)  # rows without entries among them
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    latents = torch.randint(m, (int(counts.sum()),), generator=draw)
    values = torch.randn(len(latents), generator=draw)
    made = [t.to(DEVICE) for t in (values.to(dtype), latents, offsets)]
    x, W = (torch.randn(rows, d, generator=draw).to(DEVICE, dtype) for rows in (n, m))
    return Sparse(*made, m), x, W


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", [1, 48, 1500])
def test_kernels_give_what_the_reference_gives(d: int, dtype: torch.dtype):
    from mechscope.dictionaries import kernels

    features, x, W = some(9, 30, d, dtype)
    assert torch.allclose(
        kernels.bags(features, W).float(), features.dense().float() @ W.float(), atol=TYPES[dtype] * 10
    )
    wanted = (x.float()[features.rows()] * W.float()[features.latents]).sum(1)
    assert torch.allclose(kernels.entries(x, W, features).float(), wanted, atol=TYPES[dtype] * d**0.5 * 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gradients_through_the_kernels_are_those_of_dense_autograd():
    features, _, W = some(64, 300, 96, torch.float32)
    values = features.values.clone().requires_grad_()
    W = W.clone().requires_grad_()
    sparse.rows_sum(features.with_values(values), W).square().sum().backward()
    mine = values.grad, W.grad
    values.grad = W.grad = None
    (features.with_values(values).dense() @ W).square().sum().backward()
    assert all(torch.allclose(one, other, atol=1e-3) for one, other in zip(mine, (values.grad, W.grad)))
