"""A program for `torchrun`: processes that train one dictionary together. `together.py FOLDER HOW HOW ...`.

HOW: "even" (each the half of every batch), "uneven" (process 1's data ends first), "latents" (each holds half of the
latents), "late" (process 1 stops on the way; nothing can follow it). Rank 0 leaves FOLDER/HOW.safetensors, or every
rank what was said in FOLDER/HOW.RANK.txt. One launch takes many HOWs, since most of its time is what it imports.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from mechscope import dictionaries
from mechscope.dictionaries.parallel import processes
from mechscope.dictionaries.sharded import train_sharded
from mechscope.errors import MechscopeError

D, LATENTS, STEPS, BATCH = 16, 48, 30, 64


def batch(step: int) -> torch.Tensor:
    """This is the batch that all processes share, in all its rows."""
    draw = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, D, generator=draw) * (torch.rand(BATCH, D, generator=draw) < 0.3)


def fresh() -> dictionaries.TopK:
    """This is an untrained dictionary whose first latents, all of one process where latents are split, are dead."""
    made = dictionaries.TopK(D, LATENTS, k=3, aux=0.5, dead_after=300)
    with torch.no_grad():
        made.b_enc[:12] = -2.5
    return made


def alone(batches=batch) -> dictionaries.TopK:
    """This is what one process learns from the whole batches."""
    return dictionaries.train(fresh(), [batches(step) for step in range(STEPS)], steps=STEPS)


def uneven(step: int) -> torch.Tensor:
    return batch(step) if step < 20 else batch(step)[: BATCH // 2]


def train(how: str, rank: int, folder: Path) -> dictionaries.Dictionary:
    """This is what the processes learn together."""
    if how == "latents":
        return train_sharded(fresh(), [batch(step) for step in range(STEPS)], steps=STEPS)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    mine = [batch(step)[half] for step in range(STEPS)]
    if how == "uneven" and rank == 1:
        mine = mine[:20]

    def stop(moment):
        """Process 1 is at step 7 until process 0 has given up."""
        if how == "late" and rank == 1 and moment.step == 7:
            until = time.monotonic() + 60
            while not (folder / "late.0.txt").is_file() and time.monotonic() < until:
                time.sleep(0.1)

    return dictionaries.train(fresh(), mine, steps=STEPS, patience=5.0 if how == "late" else 60.0, callbacks=[stop])


def main() -> None:
    folder, hows = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    with processes(patience=60.0) as rank:
        for how in hows:
            try:
                made = train(how, rank, folder)
            except MechscopeError as error:
                (folder / f"{how}.{rank}.txt").write_text(str(error))
                return
            if rank == 0:
                made.save(folder / f"{how}.safetensors")


if __name__ == "__main__":
    main()
