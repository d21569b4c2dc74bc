"""The command `python -m mechscope.labs.induction`: train the model and its one-layer controls, and draw the run.

A run that was stopped continues when the command is given again; of a finished one only the picture is drawn anew.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mechscope.errors import MechscopeError
from mechscope.labs import shelf
from mechscope.labs.induction import lab
from mechscope.labs.induction.train import Recipe

if TYPE_CHECKING:
    from mechscope.labs.toy import ToyTransformer
    from mechscope.labs.training import Progress

KEPT = {lab.NAME: 14, lab.CONTROL: 3, lab.SMEARED: 0}
"""How many checkpoints of each run are kept: as many as three megabytes hold."""
HALF = {lab.SMEARED}
"""The models that ship in half precision."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mechscope.labs.induction", description=__doc__)
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of the weights and the sequences (%(default)s)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of training (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(lab.NAME), help="the folder for the picture (%(default)s)")
    parser.add_argument("--work", type=Path, help="the folder of the run, to continue it (OUT/work)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="write the models and checkpoints to the package's zoo")
    given = parser.parse_args(arguments)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(given.threads)
    work = given.work or given.out / "work"
    try:
        recipe = Recipe(seed=given.seed, steps=given.steps)
        made, path = lab.trained(recipe, work, given.out / f"{lab.NAME}.html", _report)
        if given.ship:
            command = shlex.join(["python", "-m", "mechscope.labs.induction", f"--seed={given.seed}", "--ship"])
            for name, one in lab.every(recipe).items():
                _ship(name, one, *made[name], work / name, command)
    except MechscopeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def _report(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", flush=True)


def kept_steps(rows: list[dict[str, float]], n: int) -> list[int]:
    """This is `n` steps between which the loss on the second copy changes about equally, the first and last included.

    >>> kept_steps([{"step": s, "loss, second copy": x} for s, x in ((0, 4.0), (1, 4.0), (2, 2.0), (3, 0.0))], 3)
    [0, 2, 3]
    """
    gone = [0.0]
    for before, after in pairwise(rows):
        # The small term spreads steps over a stretch in which nothing changes.
        gone.append(gone[-1] + abs(after["loss, second copy"] - before["loss, second copy"]) + 0.01)
    chosen = {min(range(len(rows)), key=lambda i: abs(gone[i] - gone[-1] * k / (n - 1))) for k in range(n)}
    spare = [i for i in range(len(rows)) if i not in chosen]
    chosen |= set(spare[: n - len(chosen)])
    return [int(rows[i]["step"]) for i in sorted(chosen)]


def _ship(name: str, recipe: Recipe, model: ToyTransformer, progress: Progress, work: Path, command: str) -> None:
    """This writes a model to the zoo with its record, and its kept steps in half precision to the checkpoints."""
    from mechscope.labs.toy import ToyTransformer

    folder = shelf.write(shelf.ZOO / name, model, dtype=torch.float16 if name in HALF else torch.float32)
    shelf.record(folder, command, recipe.to_dict(), progress, progress.figures[-1])
    shutil.rmtree(shelf.CHECKPOINTS / name, ignore_errors=True)
    for step in kept_steps(progress.figures, KEPT[name]) if KEPT[name] else ():
        snapshot = ToyTransformer.from_pretrained(work / f"step-{step:05d}")
        shelf.write(shelf.CHECKPOINTS / name / f"step-{step:05d}", snapshot, dtype=torch.float16)


if __name__ == "__main__":
    sys.exit(main())
