"""A TopK dictionary whose latents are spread over processes, for one that no device holds whole.

    torchrun --nproc-per-node 4 train.py     where train.py calls `with processes(): train_sharded(TopK(...), batches)`

Process r of R holds latents r m / R to (r + 1) m / R: their rows of W_enc and W_dec, and Adam's moments. All see the
same batch. Each picks its own k greatest pre-activations; the k greatest of all R k are the active latents, and the
outputs of the processes are added up. So a step is that of the whole dictionary, to the rounding of a sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mechscope.dictionaries.dictionary import Features
from mechscope.dictionaries.parallel import rank
from mechscope.dictionaries.sparse import Sparse, pick, products, rows_sum, top
from mechscope.dictionaries.topk import TopK
from mechscope.dictionaries.training import adam, one_step, rate_at
from mechscope.errors import DictionaryError


def train_sharded(
    whole: TopK,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float | None = None,
    warmup: float = 0.02,
    decay: float = 0.2,
) -> TopK:
    """This trains a TopK dictionary with its latents spread over the processes, and returns it whole, on every process.

    batches: the same on every process. The other arguments are `train`'s. Raises DictionaryError where the latents
    do not divide by the processes, and for batches that end early.
    """
    part = Shard.of(whole)
    rate = lr or min(2e-3, 2e-4 * (2**14 / whole.n_latents) ** 0.5)
    source, first, seen = iter(batches), [], 0
    while seen < 8192 and (batch := next(source, None)) is not None:
        first.append(part.parts(batch))
        seen += len(first[-1][0])
    if not first:
        raise DictionaryError("there is nothing to train on: the iterator of batches is empty")
    targets = [target for _, target in first if target is not None]
    part.begin(torch.cat([x for x, _ in first]), torch.cat(targets) if targets else None)
    optimiser = adam(part, rate)
    for step in range(steps):
        batch = first[step] if step < len(first) else next(source, None)
        if batch is None:
            raise DictionaryError(f"the batches ended after {step} of {steps} steps; give more")
        for group in optimiser.param_groups:
            group["lr"] = rate * rate_at(step, steps, warmup, decay)
        one_step(part, optimiser, batch if batch[1] is not None or step >= len(first) else batch[0], step / steps)
    return part.gathered()


class Shard(TopK):
    """This is one process's latents of a TopK dictionary; a Dictionary to the trainer, and no use by itself."""

    @staticmethod
    def of(whole: TopK) -> Shard:
        """This is the part of a dictionary that this process holds."""
        size = dist.get_world_size() if dist.is_initialized() else 1
        if whole.n_latents % size:
            raise DictionaryError(f"{whole.n_latents} latents do not divide by {size} processes; take a multiple")
        options = {**whole.options(), "n_latents": whole.n_latents // size}
        part = Shard(**options, reads=whole.reads, writes=whole.writes)
        mine = slice(rank() * part.n_latents, (rank() + 1) * part.n_latents)
        part.load_state_dict(
            {name: value[mine] if name in ROWS else value for name, value in whole.state_dict().items()}
        )
        return part

    def gathered(self) -> TopK:
        """This is the whole dictionary, on every process."""
        size = dist.get_world_size() if dist.is_initialized() else 1
        whole = TopK(**{**self.options(), "n_latents": self.n_latents * size}, reads=self.reads, writes=self.writes)
        state = {}
        for name, value in self.state_dict().items():
            every = [torch.empty_like(value) for _ in range(size)]
            if name in ROWS and size > 1:
                dist.all_gather(every, value.contiguous())
            state[name] = torch.cat(every) if name in ROWS and size > 1 else value
        whole.load_state_dict(state)
        whole.facts = self.facts
        return whole.eval()

    def inner(self, x: Tensor) -> Tensor:
        return _Copied.apply(super().inner(x))  # type: ignore[return-value]

    def chosen(self, inner: Tensor) -> Sparse:
        return _greatest(inner, self.W_enc, self.b_enc, self.k)

    def written(self, features: Features) -> Tensor:
        return _Added.apply(super().written(features) - self.b_dec) + self.b_dec

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        """This is AuxK over the dead latents of all processes, as `topk.auxiliary` is over those of one."""
        dead = (self.idle > self.dead_after).nonzero().flatten()
        everywhere = _sum(torch.tensor([len(dead)], device=inner.device))
        if not self.aux or not everywhere.item() or not torch.is_grad_enabled():
            return {}
        most = self.d_in // 2
        if len(dead):
            features = _greatest(inner, self.W_enc[dead], self.b_enc[dead], most)
            own = rows_sum(features, self.W_dec[dead])
        else:  # nothing to give, and still a part in what all processes do together
            _gathered(inner.new_zeros(len(inner), most))
            own = torch.zeros_like(error)
        return {"aux": self.aux * (error.detach() - _Added.apply(own)).square().sum(1).mean()}


def _greatest(inner: Tensor, W: Tensor, b: Tensor, k: int) -> Sparse:
    """This is this process's share of the k greatest entries of each vector, over the latents of all processes."""
    own = pick(inner, W, b, lambda pre: top(pre, k))
    best = inner.new_zeros(len(inner), k)
    place = torch.arange(len(own.values), device=inner.device) - own.offsets[:-1].repeat_interleave(own.counts())
    best[own.rows(), place] = own.values
    least = _gathered(best).topk(k, dim=1).values[:, -1]
    return products(inner, W, b, own.where(own.values >= least[own.rows()]))


ROWS = ("W_enc", "b_enc", "W_dec", "idle")
"""What has a row a latent, and so is split."""


class _Copied(torch.autograd.Function):
    """This gives every process the same vectors; what flows back is added up over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _sum(grads[0])


class _Added(torch.autograd.Function):
    """This adds up the processes' outputs; each gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _sum(x: Tensor) -> Tensor:
    total = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def _gathered(x: Tensor) -> Tensor:
    """This is the processes' tensors [n, k] side by side."""
    if not dist.is_initialized():
        return x
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x.contiguous())
    return torch.cat(every, dim=1)
