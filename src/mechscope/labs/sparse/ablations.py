"""The command `python -m mechscope.labs.sparse.ablations`: which choices in training a dictionary matter, one by one.

Each row changes one thing in a run of a TopK or ReLU autoencoder on data whose atoms are known (F-SAE), with as many
latents as atoms, and a mean that is not 0. What is expected is stated, after pilot runs; the command says whether it
held:

    atoms found   auxiliary loss > resampling > neither > encoder of its own > b_dec begun at 0
    dead          an auxiliary loss leaves fewer latents dead than neither, b_dec begun at 0 leaves more
    FVU           a warm-up of the L1 penalty, or of the rate, costs nothing; more active latents lower it

An encoder begins as the decoder's transpose, and b_dec at the data's mean, unless a row says otherwise.

Sources: "Dictionary Learning Optimization Techniques", Transformer Circuits, January 2025 update; Bricken et al. 2023
(resampling); Gao et al. 2024, arXiv:2406.04093, appendix A (the auxiliary loss, the encoder's start).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mechscope import dictionaries
from mechscope.dictionaries import Coder, evaluating
from mechscope.dictionaries.callbacks import resample
from mechscope.dictionaries.evaluating.recovery import matched_cosine
from mechscope.labs.sparse.generator import Sparse

D, ATOMS, LATENTS, ACTIVE = 64, 64, 64, 3
BATCH, RATE, STEPS = 256, 5e-3, 300
OFFSET = 3.0
"""How far the data's mean is from 0; a vector's own norm is about 1.7."""

HELD = 10**6
"""The step from which batches are for judging: training sees none of them."""

DEAD = 1000
"""Examples without firing after which a latent is dead: a few batches, as the run is short."""

Begun = Callable[[Coder], None]


@torch.no_grad()
def own_encoder(coder: Coder) -> None:
    """This gives the encoder random rows that have nothing to do with the decoder's."""
    draw = torch.Generator().manual_seed(2**33 + coder.seed)
    coder.W_enc.copy_(nn.functional.normalize(torch.randn(coder.W_enc.shape, generator=draw), dim=1))


@torch.no_grad()
def middle_at_zero(coder: Coder) -> None:
    """This undoes that b_dec begins at the data's mean."""
    coder.b_dec.zero_()


@dataclass(frozen=True)
class Run:
    """This is one run: an architecture with its options, how its start is changed, and options of `train`."""

    kind: str
    options: dict[str, Any]
    begun: Begun | None = None
    training: dict[str, Any] = field(default_factory=dict)


PLAIN: dict[str, Any] = {"k": ACTIVE, "aux": 0.0, "dead_after": DEAD}
RUNS: dict[str, Run] = {
    "TopK": Run("TopK", PLAIN),
    "TopK, encoder of its own": Run("TopK", PLAIN, own_encoder),
    "TopK, b_dec from 0": Run("TopK", PLAIN, middle_at_zero),
    "TopK, resampling": Run("TopK", PLAIN, None, {"callbacks": [resample(every=25, until=0.9, dead_after=DEAD)]}),
    "TopK, auxiliary loss": Run("TopK", {**PLAIN, "aux": 1.0}),
    "TopK, no rate warm-up": Run("TopK", PLAIN, None, {"warmup": 0.0}),
    "TopK, k = 1": Run("TopK", {**PLAIN, "k": 1}),
    "TopK, k doubled": Run("TopK", {**PLAIN, "k": 2 * ACTIVE}),
    "ReLU": Run("ReLU", {"l1": 2.0, "warmup": 0.3}),
    "ReLU, no penalty warm-up": Run("ReLU", {"l1": 2.0, "warmup": 0.0}),
    "ReLU, tied for good": Run("ReLU", {"l1": 2.0, "warmup": 0.3, "tied": True}),
}
Row = dict[str, float]
Table = dict[str, Row]

SLACK = 1.05
"""How much higher a figure may be that is expected to cost nothing."""

FOUND = ("TopK, auxiliary loss", "TopK, resampling", "TopK", "TopK, encoder of its own", "TopK, b_dec from 0")
"""From those that find most of the atoms to those that find least."""

ORDERINGS: dict[str, Callable[[Table], bool]] = {
    **{
        f"atoms found: {one} > {other}": lambda t, one=one, other=other: t[one]["matched"] > t[other]["matched"]
        for one, other in pairwise(FOUND)
    },
    "dead: auxiliary loss < neither < b_dec from 0": lambda t: (
        t["TopK, auxiliary loss"]["dead"] < t["TopK"]["dead"] < t["TopK, b_dec from 0"]["dead"]
    ),
    "FVU: a warm-up of the penalty costs nothing": lambda t: (
        t["ReLU"]["fvu"] <= SLACK * t["ReLU, no penalty warm-up"]["fvu"]
    ),
    "FVU: a warm-up of the rate costs nothing": lambda t: t["TopK"]["fvu"] <= SLACK * t["TopK, no rate warm-up"]["fvu"],
    "FVU: k doubled < k < k = 1": lambda t: t["TopK, k doubled"]["fvu"] < t["TopK"]["fvu"] < t["TopK, k = 1"]["fvu"],
    "L0: never more than k": lambda t: all(
        t[name]["L0"] <= RUNS[name].options["k"] for name in t if RUNS[name].kind == "TopK"
    ),
}


def vectors(data: Sparse, start: int = 0) -> Iterator[Tensor]:
    """This is the data's stream with its mean moved away from 0."""
    away = torch.full((data.d,), OFFSET / data.d**0.5)
    return (x + away for x in data.stream(BATCH, start))


def measured(run: Run, seed: int, steps: int = STEPS) -> Row:
    """This trains one dictionary and is its FVU, L0, share of dead latents and matched cosine to the true atoms."""
    data = Sparse(d=D, n_atoms=ATOMS, active=ACTIVE, seed=seed)
    coder = getattr(dictionaries, run.kind)(D, LATENTS, seed=seed, **run.options)
    begin = coder.begin

    def changed(x: Tensor, target: Tensor | None) -> None:
        begin(x, target)
        if run.begun is not None:
            run.begun(coder)

    coder.begin = changed
    dictionaries.train(coder, vectors(data), steps=steps, lr=RATE, **run.training)
    held = torch.cat(list(islice(vectors(data, HELD), 16)))
    report = evaluating.evaluate(coder, held.split(BATCH))
    figures = {name: report[name].value for name in ("fvu", "L0", "dead")}
    return {**figures, "matched": matched_cosine(coder.W_dec.detach(), data.atoms).mean}


def grid(seeds: int = 2, steps: int = STEPS) -> Table:
    """This is every run's figures, each the mean over seeds of data and weights."""
    table = {}
    for name, run in RUNS.items():
        rows = [measured(run, seed, steps) for seed in range(1, seeds + 1)]
        table[name] = {figure: sum(row[figure] for row in rows) / seeds for figure in rows[0]}
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mechscope.labs.sparse.ablations", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=2, help="seeds, each of data and weights")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"batches of {BATCH} vectors for each")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    table = grid(given.seeds, given.steps)
    print("| run | FVU | L0 | dead | matched cosine |\n|---|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['fvu']:.4f} | {row['L0']:.2f} | {row['dead']:.3f} | {row['matched']:.3f} |")
    print("\n| expected | held |\n|---|---|")
    held = {statement: holds(table) for statement, holds in ORDERINGS.items()}
    for statement, true in held.items():
        print(f"| {statement} | {'yes' if true else 'NO'} |")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
