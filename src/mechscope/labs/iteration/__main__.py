"""The command `python -m mechscope.labs.iteration`: train every task and parity again from the others, and draw it.

Runs that were stopped continue when the command is given again; of finished ones only the picture is drawn anew.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from mechscope.errors import MechscopeError
from mechscope.labs import shelf
from mechscope.labs.iteration import lab
from mechscope.labs.iteration.train import Recipe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mechscope.labs.iteration", description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of each run (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(lab.NAME), help="the folder for the picture (%(default)s)")
    parser.add_argument("--work", type=Path, help="the folder of the runs, to continue them (OUT/work)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="write the polynomial's model to the package's zoo")
    given = parser.parse_args(arguments)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(given.threads)
    recipe = Recipe(steps=given.steps)
    try:
        work, path = given.work or given.out / "work", given.out / f"{lab.NAME}.html"
        model, progress, runs, path = lab.trained(recipe, work, path, _report)
        if given.ship:
            folder = shelf.write(shelf.ZOO / lab.NAME, model, dtype=torch.float16)
            command = shlex.join(["python", "-m", "mechscope.labs.iteration", "--ship"])
            shelf.record(folder, command, recipe.to_dict(), progress, progress.figures[-1])
            lab.record_runs(folder, runs)
    except MechscopeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def _report(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
