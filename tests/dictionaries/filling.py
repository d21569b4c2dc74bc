"""A program that fills an activation store and is killed on the way: `python filling.py FOLDER KILLS SEED`.

Every attempt is a fork of this process, so that what it imports is read once; it is sent SIGKILL at a random moment.
The last attempt runs to its end. Prints how many shards were there after each kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import mechscope as ms
from architectures import ARCHITECTURES
from mechscope.dictionaries.activations import store_activations
from mechscope.models.token_mask import TokenMask

SITES = ["blocks.0.mlp_out", "blocks.1.z"]
OPTIONS: dict[str, Any] = {"batch": 2, "mask": TokenMask(first=1, outliers=1.5), "shard_bytes": 4_000, "seed": 5}


def made() -> tuple[Any, torch.Tensor]:
    """This is a tiny model and 64 rows of ids for it."""
    torch.set_num_threads(1)
    ids = torch.randint(3, 97, (64, 9), generator=torch.Generator().manual_seed(0))
    return ms.load(ARCHITECTURES["gpt2"].make()), ids


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model, ids = made()
    model.weights_hash()
    draw = random.Random(seed)
    for _ in range(kills):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reads)
            store_activations(model, ids, SITES, folder, progress=lambda *_, to=writes: os.write(to, b"."), **OPTIONS)
            os._exit(0)
        os.close(writes)
        for _ in range(draw.randrange(4)):  # so many shards later, and then at any moment of the next
            os.read(reads, 1)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reads)
        print(len(list(folder.glob("shard-*.safetensors"))), flush=True)
    store_activations(model, ids, SITES, folder, **OPTIONS)


if __name__ == "__main__":
    main()
