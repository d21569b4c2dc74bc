"""Training over several processes: each takes its own batches, and a step is that of all the batches together.

    torchrun --nproc-per-node 2 train.py      where train.py calls `with processes(): train(sae, my_batches, ...)`

Every process holds the whole dictionary and streams a share of the data; gradients are averaged, weighed by how many
examples each gave, so that the step is the one that a single process would make of the union. A process whose data
ends takes part with nothing until the others' have ended too. What waits too long is named. To split a dictionary's
latents over devices instead, see `sharded.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.errors import DictionaryError

PATIENCE = 600.0
"""After how many seconds a process that has not come to a step is named, and the training ends."""


@contextlib.contextmanager
def processes(backend: str | None = None, patience: float = PATIENCE) -> Iterator[int]:
    """This joins the processes that `torchrun` started, gives this one's rank, and leaves them at the end.

    backend: "gloo" on CPUs, "nccl" on GPUs, by what there is unless given. Without `torchrun` there is one process.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield rank()
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(backend, timeout=timedelta(seconds=2 * patience))
    try:
        yield rank()
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This is the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class Together:
    """This is what the training loop asks of the processes that train together; of one process, nothing.

    patience: seconds to wait for a process at a step.
    """

    def __init__(self, patience: float = PATIENCE):
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank, self.patience = rank(), patience
        # A group of its own to meet in: only gloo can say who is missing.
        self.meeting: Any = dist.new_group(backend="gloo") if self.size > 1 else None

    def meet(self, step: int) -> None:
        """This waits until every process has come to `step`; raises DictionaryError that names those that have not."""
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(self.meeting, timedelta(seconds=self.patience), wait_all_ranks=True)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise DictionaryError(
                f"process {self.rank} of {self.size} waited {self.patience:g} s at step {step} and gave up: {said}. "
                "Look at what the missing process last printed; give more time with patience="
            ) from error

    def has(self, here: bool) -> bool:
        """This is whether any process still has a batch."""
        if self.size == 1:
            return here
        flag = torch.tensor([float(here)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.meeting)
        return bool(flag.item())

    def begin(self, dictionary: Dictionary, x: Tensor, target: Tensor | None) -> None:
        """This lets a dictionary begin from the first vectors of all processes, and makes all of them equal."""
        if self.size > 1:
            x = self._gathered(x)
            target = None if target is None else self._gathered(target)
        dictionary.begin(x, target)
        if self.size > 1:
            for value in dictionary.state_dict().values():
                dist.broadcast(value, 0)

    def share(self, dictionary: Dictionary, examples: int) -> None:
        """This makes the gradients of a process's batch, a mean over its examples, the mean over those of all."""
        if self.size == 1:
            return
        total = self._total(examples)
        for parameter in (p for p in dictionary.parameters() if p.requires_grad):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(examples / total)
            dist.all_reduce(parameter.grad)

    @contextlib.contextmanager
    def counting(self, dictionary: Dictionary, examples: int) -> Iterator[None]:
        """This makes what a step counts (idle latents, thresholds that follow the batches) that of all processes."""
        if self.size == 1:
            yield
            return
        counters = [value for name, value in dictionary.named_buffers() if name.split(".")[-1] == "idle"]
        before = [value.clone() for value in counters]
        yield
        total = self._total(examples)
        for value, old in zip(counters, before):
            fired = ((value == 0) & (examples > 0)).to(torch.int64)
            dist.all_reduce(fired)
            value.copy_(torch.where(fired > 0, 0, old + total))
        for value in dictionary.buffers():
            if value.is_floating_point():
                dist.all_reduce(value.mul_(examples / total))

    def _total(self, examples: int) -> int:
        every = torch.tensor([examples])
        dist.all_reduce(every, group=self.meeting)
        return int(every.item())

    def states(self, state: Any) -> Any:
        """This is where every process's batches have got to, for the checkpoint."""
        if self.size == 1:
            return state
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, state, group=self.meeting)
        return {"processes": every}

    def mine(self, state: Any) -> Any:
        """This is what `states` wrote for this process; raises DictionaryError where there were more or fewer."""
        many = len(state["processes"]) if isinstance(state, dict) and "processes" in state else 1
        if many != self.size:
            raise DictionaryError(
                f"the checkpoint was written by {many} process{'es' * (many > 1)}, and there {self.size} here; go on "
                f"with torchrun --nproc-per-node {many}"
            )
        return state["processes"][self.rank] if many > 1 else state

    def settle(self) -> None:
        """This waits until what the first process wrote is there for all."""
        if self.size > 1:
            dist.barrier(group=self.meeting)

    def _gathered(self, x: Tensor) -> Tensor:
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, x.cpu(), group=self.meeting)
        return torch.cat(every).to(x.device)
