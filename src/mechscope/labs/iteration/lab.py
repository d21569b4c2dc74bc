"""The laboratory of iteration: the evidence on the shipped model and its untrained twin, and the runs with their plot.

Shipped is the model of the polynomial; `training.json` beside it holds the course of every run: each task from scratch,
and parity from the weights that copying and the polynomial left, for three seeds where they are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechscope.labs import plot, shelf
from mechscope.labs.lab import Fact, Lab, Report

if TYPE_CHECKING:
    from mechscope.labs.iteration.chains import Chains
    from mechscope.labs.iteration.train import Recipe
    from mechscope.labs.toy import ToyTransformer
    from mechscope.labs.training import Progress
    from mechscope.models import Model
    from mechscope.units.kinds import Kind

NAME = "iteration"
SEEDS = (0, 1, 2)
ENOUGH = 0.99
"""The share of held-out chains at which a task counts as learned in the comparison of runs."""


def made() -> dict[str, Any]:
    """This is the record of how the shipped model was made; "runs" has the course of every run by its name."""
    return json.loads((shelf.ZOO / NAME / "training.json").read_text())


def recipe() -> Recipe:
    """This is the recipe of the shipped model."""
    from mechscope.labs.iteration.train import Recipe

    return Recipe(**made()["recipe"])


def untrained() -> Model:
    """This is the control: the shipped model before its first step."""
    from mechscope import models
    from mechscope.labs.iteration.train import new_model

    return models.load(new_model(recipe()).eval())


def tried(recipe: Recipe, n: int = 256) -> Chains:
    """This is chains that were never trained on, others than those that judged the run."""
    from mechscope.labs.iteration.train import held_out

    return held_out(recipe, n, seed=1)


def iteration(model: Model, made: Chains) -> Kind:
    """This is which heads of a model attend to the t-th input while the t-th state is written."""
    from mechscope.units.iterating import iteration_heads

    return iteration_heads(model, made.rows(), made.lengths.tolist())["iteration"]


# ------------------------------------------------------------------------------------------------ the evidence


def check() -> Iterator[Fact]:
    """This yields the evidence: every chain is right, one head fetches each step's input, and the skill transfers."""
    from mechscope.labs.iteration.train import right

    model, twin, chains = shelf.load(NAME), untrained(), tried(recipe())
    yield Fact("held-out chains written without an error, polynomial modulo 7", right(model.hf, chains), at_least=0.99)
    yield Fact("  by the untrained twin", right(twin.hf, chains), at_most=0.05)
    kind = iteration(model, chains)
    yield Fact("iteration heads", len(kind.heads), at_least=1)
    best = max(float(kind.score[at]) for at in kind.heads) if kind.heads else 0.0
    yield Fact("attention of the best to the t-th input while state t is written", best, at_least=0.5)
    yield Fact("  the threshold that the control sets", kind.threshold, at_most=0.35)
    yield Fact("  iteration heads of the untrained twin", len(iteration(twin, chains).heads), at_most=0)
    yield from transfer_facts(made()["runs"])


def transfer_facts(runs: Mapping[str, Any]) -> Iterator[Fact]:
    """This yields how many steps parity takes from another task's weights, against random ones."""
    for name in ("copy, seed 0", "polynomial, seed 0", "parity from copy, seed 0"):
        yield Fact(f"held-out chains right at the end, {name}", runs[name]["right"], at_least=0.99)
    worst = min(runs[f"parity, seed {seed}"]["right"] for seed in SEEDS)
    yield Fact("  parity from scratch after as many steps, worst seed", worst, at_most=0.99)
    for start in ("copy", "polynomial"):
        pairs = [(f"parity from {start}, seed {seed}", f"parity, seed {seed}") for seed in SEEDS]
        shares = [runs[after]["steps"] / runs[scratch]["steps"] for after, scratch in pairs if after in runs]
        text = f"parity from {start}: steps until {ENOUGH:.0%} are right, of those from scratch, worst of {len(shares)}"
        yield Fact(text, max(shares), at_most=0.8)


# ------------------------------------------------------------------------------------------------ the runs


def run(out: Path, report: Report) -> Path:
    """This trains every task, or continues where `out`/work stands, and draws how fast each is learned."""
    from mechscope.labs.iteration.train import Recipe

    return trained(Recipe(), out / "work", out / f"{NAME}.html", report)[-1]


def planned(recipe: Recipe) -> list[Recipe]:
    """This is every run, those that others start from before them."""
    found = [recipe]
    for seed in SEEDS:
        found += [replace(recipe, task=task, seed=seed) for task in ("copy", "parity")]
        found += [replace(recipe, task="parity", start="copy", seed=seed)]
    return [*found, replace(recipe, task="parity", start="polynomial")]


def trained(
    recipe: Recipe, work: Path, path: Path, report: Report
) -> tuple[ToyTransformer, Progress, dict[str, Any], Path]:
    """This is the polynomial's model, its record, the course of every run by its name, and the path of the picture."""
    from mechscope.labs.iteration.train import steps_until, train

    models: dict[str, ToyTransformer] = {}
    courses: dict[str, Progress] = {}
    plan = planned(recipe)
    for place, one in enumerate(plan):
        report(f"training {one.name}", place, len(plan))
        start = models[replace(one, task=one.start, start="").name] if one.start else None
        folder = work / one.name.replace(", ", "-").replace(" ", "-")
        models[one.name], courses[one.name] = train(one, folder, start)
    runs = {
        name: {
            "right": course.figures[-1]["right"],
            "steps": steps_until(course, ENOUGH),
            "seconds": round(course.processor_seconds),
        }
        for name, course in courses.items()
    }
    return models[recipe.name], courses[recipe.name], runs, draw(courses, path)


def record_runs(folder: Path, runs: Mapping[str, Any]) -> None:
    """This adds the course of every run to the record beside the shipped weights."""
    from mechscope import store

    path = folder / "training.json"
    store.write_text(path, json.dumps({**json.loads(path.read_text()), "runs": runs}, indent=1))


def draw(courses: Mapping[str, Progress], path: Path) -> Path:
    """This draws the share of held-out chains that are right over each run."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, course in courses.items():
        rows = [row for row in course.figures if "right" in row]
        line = [row["step"] for row in rows], [row["right"] for row in rows]
        task, seed = name.rsplit(", ", 1)
        panels.setdefault(seed, {})[task] = line
    return plot.write(plot.lines(panels, "step"), path)


LABS: tuple[Lab, ...] = (
    Lab(
        NAME,
        "trained",
        "2 layers of 2 heads, width 64, 128 neurons each; up to 10 inputs",
        "writes an iteration's states one by one; a head fetches the t-th input at step t; parity then comes sooner",
        check,
        run,
    ),
)
"""The laboratory of this room."""
