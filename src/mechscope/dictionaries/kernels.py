"""Triton kernels for sums and products over active latents on a GPU; `sparse.py` has the same in plain PyTorch.

    bags(sparse, W)              sparse @ W, a row of the batch and a stretch of the width a program
    entries(x, W, pattern)       x[row] . W[latent] for each entry, a row of the batch a program

Both walk compressed sparse rows and add in float32, in the order of the entries: no atomics, so that a run repeats
exactly. The gradient to the decoder's rows is `bags` over the transpose. Triton comes with torch's CUDA builds;
where it does not, `sparse.py` does without. TRITON_INTERPRET=1 runs these kernels on the CPU, to test them.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# Annotations must not become text here: Triton reads `tl.constexpr` off them.

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from mechscope.dictionaries.sparse import Sparse

BLOCK = 1024
"""How much of the width a program of `bags` adds up at once."""


@triton.jit
def _bags(values, latents, offsets, W, out, d, stride_w, stride_out, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        value = tl.load(values + j).to(tl.float32)
        latent = tl.load(latents + j)
        total += value * tl.load(W + latent * stride_w + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * stride_out + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _entries(x, W, latents, offsets, out, d, stride_x, stride_w, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < d
    read = tl.load(x + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    for j in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        latent = tl.load(latents + j)
        weights = tl.load(W + latent * stride_w + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + j, tl.sum(read * weights).to(out.dtype.element_ty))


def bags(sparse: "Sparse", W: torch.Tensor) -> torch.Tensor:
    """This is sparse @ W [n, d], in W's type; W: [n_latents, d]."""
    n, d = sparse.shape[0], W.shape[1]
    W = W.contiguous()
    out = W.new_empty(n, d)
    if n:
        block = min(BLOCK, triton.next_power_of_2(d))
        grid = (n, triton.cdiv(d, block))
        _bags[grid](
            sparse.values.contiguous(),
            sparse.latents,
            sparse.offsets,
            W,
            out,
            d,
            W.stride(0),
            out.stride(0),
            BLOCK=block,
        )
    return out


def entries(x: torch.Tensor, W: torch.Tensor, pattern: "Sparse") -> torch.Tensor:
    """This is x[row] . W[latent] for each entry of `pattern` [nnz], in W's type; x: [n, d], W: [n_latents, d]."""
    n, d = x.shape
    x, W = x.contiguous(), W.contiguous()
    out = W.new_empty(len(pattern.latents))
    if n:
        width = triton.next_power_of_2(d)
        _entries[(n,)](x, W, pattern.latents, pattern.offsets, out, d, x.stride(0), W.stride(0), WIDTH=width)
    return out
