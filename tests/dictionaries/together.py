"""A program for `torchrun`: processes that train one dictionary together. `together.py OUT HOW`.

HOW: "even" (each the half of every batch), "uneven" (process 1's data ends first), "late" (process 1 stops on the
way), "latents" (each holds half of the latents). Rank 0 leaves OUT, or what was said.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from mechscope import dictionaries
from mechscope.dictionaries.parallel import processes
from mechscope.errors import MechscopeError

D, LATENTS, STEPS, BATCH = 16, 48, 30, 64


def batch(step: int) -> torch.Tensor:
    """This is the batch that all processes share, in all its rows."""
    draw = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, D, generator=draw) * (torch.rand(BATCH, D, generator=draw) < 0.3)


def fresh() -> dictionaries.TopK:
    return dictionaries.TopK(D, LATENTS, k=3, dead_after=300)


def alone(batches=batch) -> dictionaries.TopK:
    """This is what one process learns from the whole batches."""
    return dictionaries.train(fresh(), [batches(step) for step in range(STEPS)], steps=STEPS)


def uneven(step: int) -> torch.Tensor:
    return batch(step) if step < 20 else batch(step)[: BATCH // 2]


def main() -> None:
    out, how = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    with processes(patience=5.0 if how == "late" else 60.0) as rank:
        half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        mine = [batch(step)[half] for step in range(STEPS)]
        if how == "uneven" and rank == 1:
            mine = mine[:20]

        def stop(moment):
            if how == "late" and rank == 1 and moment.step == 7:
                time.sleep(12)

        try:
            if how == "latents":
                from mechscope.dictionaries.sharded import train_sharded

                made = train_sharded(fresh(), [batch(step) for step in range(STEPS)], steps=STEPS)
            else:
                patience = 5.0 if how == "late" else 60.0
                made = dictionaries.train(fresh(), mine, steps=STEPS, patience=patience, callbacks=[stop])
        except MechscopeError as error:
            out.with_suffix(f".{rank}.txt").write_text(str(error))
            return
        if rank == 0:
            made.save(out)


if __name__ == "__main__":
    main()
