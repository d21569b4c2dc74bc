"""The command `python -m mechscope.labs.sparse.recovery_table`: what each architecture recovers of data that is known.

    independent     every autoencoder at the right size, three seeds: atoms found, with the shuffled control, L0, FVU,
                    dead latents, and shrinkage (gamma, below 1 where reconstructions are too short)
    correlated, hierarchical, composed      the same, with the absorption of parents into their children, and of atoms
                    into sums, where they are planted
    map             transcoders of a planted map: the directions that they read and write
    sites           crosscoders of two sites that share half of their atoms: who tells shared from exclusive

Each row is trained on its own and written to a file of lines when it is done; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mechscope import dictionaries
from mechscope.dictionaries import evaluating
from mechscope.dictionaries.evaluating.recovery import chance, cosines, matched_cosine, mean_max_cosine
from mechscope.labs.sparse.generator import Sparse
from mechscope.labs.sparse.paired import PlantedMap, Sites

D, ATOMS, ACTIVE = 64, 64, 3
STEPS, BATCH, RATE = 2000, 256, 4e-3
RATES = {"Gated": 2e-3}
HELD = 10**6
"""The step from which batches are for judging: training sees none of them."""

REVIVED: dict[str, Any] = {"k": ACTIVE, "dead_after": 2000, "aux": 1.0}
"""A short run: a latent is dead after a few batches, and what it may mend counts in full."""

AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ReLU": ("ReLU", {"l1": 2.0}),
    "ReLU, tied": ("ReLU", {"l1": 1.0, "tied": True}),
    "Gated": ("Gated", {"l1": 8.0, "warmup": 0.5}),
    "TopK": ("TopK", REVIVED),
    "BatchTopK": ("BatchTopK", REVIVED),
    "JumpReLU": ("JumpReLU", {}),
    "PAnnealing": ("PAnnealing", {"l1": 2.0}),
    "Matryoshka": ("Matryoshka", REVIVED),
}
TRANSCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BatchTopK": ("BatchTopK", REVIVED),
    "TopK": ("TopK", REVIVED),
    "JumpReLU": ("JumpReLU", {}),
    "ReLU": ("ReLU", {"l1": 2.0}),
}
CROSSCODERS: dict[str, dict[str, Any]] = {"BatchTopK": REVIVED, "L1": {"l1": 2.0}}
TOLD = ("TopK", "BatchTopK", "Matryoshka")
"""The autoencoders that are measured where atoms are not independent."""

Row = dict[str, Any]


def autoencoder(name: str, structure: str, seed: int, steps: int) -> Row:
    """This is what one autoencoder makes of one kind of data."""
    kind, options = AUTOENCODERS[name]
    sums = structure == "composed"  # 8 x 8 of them, as many as latents: one latent a vector is enough for each
    atoms, active = (16, 2) if sums else (ATOMS, ACTIVE)
    data = Sparse(d=D, n_atoms=atoms, active=active, structure=structure, seed=seed)  # type: ignore[arg-type]
    options = options | ({"k": 1} if sums and "k" in options else {})
    sae = getattr(dictionaries, kind)(D, ATOMS, seed=seed, **options)
    dictionaries.train(sae, data.stream(BATCH), steps=steps, lr=RATES.get(kind, RATE))
    found = sae.W_dec.detach()
    row = {**recovered(found, data.atoms), **fidelity(sae, (data.batch(HELD + i, 1024).x for i in range(8)))}
    if structure == "hierarchical":
        row |= absorption(sae, data)
    if sums:
        row["composed"] = (
            (cosines(found, data.composites).amax(0) > cosines(found, data.atoms).amax(0)).float().mean().item()
        )
    return row


def recovered(found: Tensor, true: Tensor) -> Row:
    """This is the mean max cosine with its control, and the share of atoms that a latent of their own is near to."""
    matched = matched_cosine(found, true)
    return {"mmcs": mean_max_cosine(found, true), "control": chance(found, true), "recovered": matched.recovered()}


def fidelity(dictionary: Any, batches: Iterable[Any]) -> Row:
    """This is L0, FVU, the share of dead latents and gamma, on vectors that training did not see."""
    report = evaluating.evaluate(dictionary, batches)
    names = {"l0": "L0", "fvu": "fvu", "dead": "dead", "gamma": "gamma about the mean"}
    return {short: report[name].value for short, name in names.items()}


def absorption(dictionary: Any, data: Sparse) -> Row:
    """This is how often parents are written by their children's latents while their own is silent."""
    x, codes = data.batch(HELD, 4096)
    parents = (data.parents < 0).nonzero().flatten()
    labels = {f"parent {i}": codes[:, i] > 0 for i in parents.tolist()}
    probes = {f"parent {i}": data.atoms[i] for i in parents.tolist()}
    report = evaluating.feature_absorption(dictionary, x, labels, probes, main="aligned")
    return {"absorbed": report["absorbed"].value, "fraction": report["fraction"].value}


def transcoder(name: str, seed: int, steps: int) -> Row:
    """This is what one transcoder makes of a planted map, of orthonormal atoms: what it should read has one answer.

    The map is linear in x where codes are, so that a skip connection would write it all; there is none here.
    """
    kind, options = TRANSCODERS[name]
    source = Sparse(d=D, n_atoms=ATOMS, active=ACTIVE, orthogonal=True, seed=seed)
    planted = PlantedMap(source, n_units=ATOMS, d_out=D, seed=seed)
    made = dictionaries.transcoder(kind, D, ATOMS, D, seed=seed, **options)
    dictionaries.train(made, ((seen.x, seen.y) for seen in planted.batches(BATCH)), steps=steps, lr=RATE)
    match = matched_cosine(made.W_dec.detach(), planted.writes)
    reads = cosine_similarity(made.W_enc.detach()[match.partner], planted.reads @ source.atoms)
    held = (planted.batch(HELD + i, 1024) for i in range(8))
    control = chance(made.W_dec.detach(), planted.writes)
    row = {"writes": match.mean, "reads": reads.mean().item(), "control": control}
    return {**row, **fidelity(made, ((seen.x, seen.y) for seen in held))}


def crosscoder(name: str, seed: int, steps: int) -> Row:
    """This is what one crosscoder makes of two sites with half of their atoms in common."""
    data = Sites(Sparse(d=D, n_atoms=ATOMS, active=ACTIVE, seed=seed), n_sites=2, shared=0.5, aligned=True)
    made = dictionaries.Crosscoder(2, D, ATOMS, seed=seed, **CROSSCODERS[name])
    dictionaries.train(made, (seen.x for seen in data.batches(BATCH)), steps=steps, lr=RATE)
    atoms = (data.atoms * data.present[..., None]).transpose(0, 1).flatten(1)
    rows = made.W_dec.detach()
    match, exclusive = matched_cosine(rows, atoms), made.exclusivity()
    near = match.cosine > 0.9
    found, shared = exclusive[match.partner], data.present.all(0)
    scaling = dictionaries.latent_scaling(made, (data.batch(HELD + i, 4096).x for i in range(2)))
    x = data.batch(HELD, 4096).x
    with torch.no_grad():
        features = made.encode(x)
        missed = (x - made.decode(features)).square().sum() / (x - x.mean(0)).square().sum()
    return {
        **recovered(rows, atoms),
        "l0": (features > 0).float().sum(1).mean().item(),
        "fvu": missed.item(),
        "exclusivity of shared": found[near & shared].mean().item(),
        "exclusivity of second's": found[near & data.present[1] & ~shared].mean().item(),
        "false exclusives": (scaling.shrunk[exclusive > 0.8] > 0.5).float().mean().nan_to_num().item(),
    }


def jobs(seeds: int, steps: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """This is every row of the table: what it is, and what makes it."""

    def job(table: str, name: str, seed: int, make: Callable[..., Row], *more: Any) -> tuple[Row, Callable[[], Row]]:
        return {"table": table, "name": name, "seed": seed}, lambda: make(name, *more, seed, steps)

    for seed in range(1, seeds + 1):
        for name in AUTOENCODERS:
            yield job("independent", name, seed, autoencoder, "independent")
        for name in TRANSCODERS:
            yield job("map", name, seed, transcoder)
        for name in CROSSCODERS:
            yield job("sites", name, seed, crosscoder)
        for structure in ("hierarchical", "correlated", "composed"):
            for name in TOLD:
                yield job(structure, name, seed, autoencoder, structure)


def table(rows: list[Row]) -> str:
    """This is the rows as tables in Markdown, one for each kind of data.

    >>> print(table([{"table": "map", "name": "ReLU", "seed": 1, "reads": 0.95}]))
    ### map
    <BLANKLINE>
    | architecture | seed | reads |
    |---|---|---|
    | ReLU | 1 | 0.950 |
    """
    parts = []
    for kind in dict.fromkeys(row["table"] for row in rows):
        of = sorted((row for row in rows if row["table"] == kind), key=lambda row: (row["name"], row["seed"]))
        columns = [name for name in of[0] if name not in ("table", "name", "seed", "seconds")]
        lines = [f"| architecture | seed | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
        for row in of:
            lines.append(f"| {row['name']} | {row['seed']} | {' | '.join(f'{row[c]:.3f}' for c in columns)} |")
        parts.append(f"### {kind}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def run(out: Path, seeds: int = 3, steps: int = STEPS, only: str = "", part: tuple[int, int] = (0, 1)) -> list[Row]:
    """This makes the rows that the file `out` does not hold yet, and returns all that it holds.

    only: a part of the names of tables to make. part: (i, n) for every n-th row from the i-th, to share the work.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, (what, make) in enumerate(jobs(seeds, steps)):
        held = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        if number % part[1] != part[0] or only not in what["table"] or any(what.items() <= row.items() for row in held):
            continue
        began = time.process_time()
        row = {**what, **make(), "seconds": round(time.process_time() - began, 1)}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mechscope.labs.sparse.recovery_table", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/sparse/recovery.jsonl"), help="the file of lines")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, each of data and weights")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"batches of {BATCH} vectors for each")
    parser.add_argument(
        "--only", default="", help="a table: independent, map, sites, hierarchical, correlated, composed"
    )
    parser.add_argument("--part", default="0/1", help="i/n: every n-th row from the i-th, to share among processes")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    first, _, every = given.part.partition("/")
    print(table(run(given.out, given.seeds, given.steps, given.only, (int(first), int(every)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
