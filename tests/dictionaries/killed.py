"""A program that trains a small dictionary and is killed on the way: `python killed.py FOLDER KILLS SEED`.

Every attempt is a fork of this process, so that what it imports is read once; it is sent SIGKILL at a random moment.
The last attempt runs to its end. Prints at which step each attempt was killed, as its folder shows.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from mechscope import dictionaries
from mechscope.dictionaries.callbacks import lines, resample


class Rows:
    """This is a source of batches that knows where it is: random numbers drawn from the number of the batch."""

    def __init__(self):
        self.at_batch = 0

    def __iter__(self):
        while True:
            draw = torch.Generator().manual_seed(self.at_batch)
            self.at_batch += 1
            yield {site: torch.randn(64, 12, generator=draw).relu() for site in "ab"}

    def state(self):
        return {"batch": self.at_batch}

    def resume(self, state):
        self.at_batch = state["batch"]


def run(folder: Path, slowly: float = 0.0) -> None:
    both = [
        dictionaries.TopK(12, 24, k=3, dead_after=500, reads="a"),
        dictionaries.ReLU(12, 24, l1=0.5, reads="b"),
    ]
    batches = Rows()
    dictionaries.train(
        both,
        batches,
        steps=120,
        out=folder,
        every=7,
        record=5,
        schedules={"seed": lambda done: int(100 * done)},  # an option that changes on the way
        callbacks=[resample(every=20, dead_after=300), lambda moment: time.sleep(slowly), lines(folder / "log.jsonl")],
    )


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            run(folder, slowly=0.002)
            os._exit(0)
        time.sleep(draw.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(*sorted(path.name for path in folder.glob("*/*.safetensors")), flush=True)
    run(folder)


if __name__ == "__main__":
    main()
