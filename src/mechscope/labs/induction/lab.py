"""The laboratory of induction: the evidence on the shipped models and on their controls, and the run with its plot.

Shipped are the last weights of the two-layer model and of a one-layer one of the same recipe, the control; and of one
layer with smeared keys, which has what the control lacks. The other control is the two-layer model before its first
step. Beside each, `training.json` holds the measures of `measures` over its run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechscope.labs import shelf
from mechscope.labs.lab import Fact, Lab, Report

if TYPE_CHECKING:
    from mechscope.labs.induction.measures import Row
    from mechscope.labs.induction.train import Recipe
    from mechscope.labs.toy import ToyTransformer
    from mechscope.labs.training import Progress
    from mechscope.models import Model

NAME = "induction"
CONTROL = f"{NAME}-1l"
SMEARED = f"{CONTROL}-smeared"
"""One layer whose keys may be mixed with the ones before them: what takes the others a second layer."""


def made(name: str) -> dict[str, Any]:
    """This is the record of how a shipped model was made; its "losses" are the measures over the run, row by row."""
    return json.loads((shelf.ZOO / name / "training.json").read_text())


def recipe(name: str = NAME) -> Recipe:
    """This is the recipe of a shipped model."""
    from mechscope.labs.induction.train import Recipe

    return Recipe(**made(name)["recipe"])


def untrained() -> Model:
    """This is the control without training: the two-layer model before its first step."""
    from mechscope import models
    from mechscope.labs.induction.train import new_model

    return models.load(new_model(recipe()).eval())


# ------------------------------------------------------------------------------------------------ the evidence


def check() -> Iterator[Fact]:
    """This yields the evidence on the shipped models: the two heads, how they came to be, and the controls."""
    from mechscope.labs.induction.measures import measures

    model = shelf.load(NAME)
    row = measures(model, recipe())
    yield from formed_facts(row)
    yield from cut_facts(model, *pair(row))
    yield from course_facts(made(NAME)["losses"])
    for who, control in (("one layer", shelf.load(CONTROL)), ("untrained", untrained())):
        yield from absent_facts(measures(control, recipe()), f"control, {who}")
    yield from smeared_facts(made(SMEARED)["losses"], measures(shelf.load(SMEARED), recipe(SMEARED)))


def pair(row: Row) -> tuple[str, str]:
    """This is the best previous-token head of layer 0 and the best induction head of layer 1, such as 0.0, 1.0."""
    from mechscope.labs.induction.picture import heads

    before, _, after, _ = heads(row)
    return before[0], after[0]


def formed_facts(row: Row) -> Iterator[Fact]:
    """This yields what is known of a model with induction heads, from its measures."""
    from mechscope.labs.induction.measures import ranked
    from mechscope.labs.induction.picture import heads

    (before, previous), _, (after, induction), (_, next_best) = heads(row)
    yield Fact("loss on the first copy, nats", row["loss, first copy"], at_least=3.5)
    yield Fact("loss on the second copy, nats", row["loss, second copy"], at_most=0.5)
    yield Fact(f"previous-token score of head {before}", previous, at_least=0.4)
    yield Fact(f"induction score of head {after}", induction, at_least=0.4)
    yield Fact("control: induction score of the next best head", next_best, at_most=0.1)
    (top, highest), (_, second), *_ = ranked(row, "K-composition")
    yield Fact(f"K-composition of {before} with {after}, by weights", row[f"K-composition {before} {after}"], 0.18)
    yield Fact("over that of any other pair", highest / second if top == f"{before} {after}" else 0.0, at_least=1.2)


def cut_facts(model: Model, before: str, after: str) -> Iterator[Fact]:
    """This yields what is left of the repeat's advantage without the pair's edge, without a head, without others."""
    from mechscope.labs.induction.cut import left

    graph = model_graph(model)
    edge = f"a{before.replace('.', '.h')}->a{after.replace('.', '.h')}<k>"
    others = [name for name in graph if name.startswith("a0.") and "->a1." in name and name != edge]
    outs = {head: [name for name in graph if name.startswith(f"a1.h{head}->")] for head in range(model.n_heads)}
    top = outs.pop(int(after.split(".")[1]))
    advantage, (cut, ablated, *rest) = left(model, [[edge], top, *([name] for name in others), *outs.values()])
    yield Fact("advantage of a repeat, nats", advantage, at_least=3.0)
    yield Fact(f"share of it left with {edge} cut", cut, at_most=0.2)
    yield Fact(
        f"control: least share left with another of the {len(others)} such edges cut", min(rest[: len(others)]), 0.8
    )
    yield Fact(f"share left with head {after} ablated", ablated, at_most=0.2)
    yield Fact("control: least share left with another head of layer 1 ablated", min(rest[len(others) :]), 0.8)


def model_graph(model: Model) -> Sequence[str]:
    """This is the names of a model's edges."""
    from mechscope.causal.wiring import wire

    return wire(model).graph.edges


def course_facts(rows: Sequence[Row]) -> Iterator[Fact]:
    """This yields what is known of a run: a sudden rise of induction, at which learning in context comes."""
    from mechscope.labs.induction.measures import crossing

    _, after = pair(rows[-1])
    score, steps = f"induction {after}", rows[-1]["step"]
    rise, fall = crossing(rows, score, 0.5), crossing(rows, "in-context score", 0.5)
    width = crossing(rows, score, 0.9) - crossing(rows, score, 0.1)
    yield Fact("in-context score at the end, nats", rows[-1]["in-context score"], at_most=-2.5)
    yield Fact("share of the run in which the induction score rises from a tenth to nine", width / steps, at_most=0.25)
    yield Fact("its halfway step from that of the in-context score, of the run", abs(rise - fall) / steps, at_most=0.05)


def smeared_facts(rows: Sequence[Row], row: Row) -> Iterator[Fact]:
    """This yields what is known of one layer with smeared keys: induction, as suddenly, where one layer had none.

    Olsson et al. 2022 predicted it: with the token before mixed into every key, an induction head needs no other head.
    """
    from mechscope.labs.induction.measures import crossing, ranked

    who = "one layer, smeared keys"
    (after, score), *_ = ranked(row, "induction")
    name, steps = f"induction {after}", rows[-1]["step"]
    width = crossing(rows, name, 0.9) - crossing(rows, name, 0.1)
    apart = abs(crossing(rows, name, 0.5) - crossing(rows, "in-context score", 0.5))
    yield Fact(f"{who}: loss on the second copy, nats", row["loss, second copy"], at_most=0.5)
    yield Fact(f"{who}: induction score of head {after}", score, at_least=0.4)
    yield Fact(f"{who}: in-context score, nats", row["in-context score"], at_most=-2.5)
    yield Fact(f"{who}: share of the run in which that rises from a tenth to nine", width / steps, at_most=0.25)
    yield Fact(f"{who}: its halfway step from that of the in-context score, of the run", apart / steps, at_most=0.05)


def absent_facts(row: Row, who: str) -> Iterator[Fact]:
    """This yields the same of a model without induction heads, of which none of it may hold."""
    from mechscope.labs.induction.measures import ranked

    yield Fact(f"{who}: loss on the second copy, nats", row["loss, second copy"], at_least=3.0)
    yield Fact(f"{who}: highest induction score", ranked(row, "induction")[0][1], at_most=0.1)
    yield Fact(f"{who}: in-context score, nats", row["in-context score"], at_least=-1.0)


# ------------------------------------------------------------------------------------------------ the run


def run(out: Path, report: Report) -> Path:
    """This trains the model and its controls, or continues where `out`/work stands, and draws the phase change."""
    from mechscope.labs.induction.train import Recipe

    return trained(Recipe(), out / "work", out / f"{NAME}.html", report)[1]


def every(recipe: Recipe) -> dict[str, Recipe]:
    """This is the recipes of the model, of its control and of the control with smeared keys, by their shipped names."""
    control = replace(recipe, n_layers=1)
    return {NAME: recipe, CONTROL: control, SMEARED: replace(control, smeared_keys=True)}


def trained(
    recipe: Recipe, work: Path, path: Path, report: Report
) -> tuple[dict[str, tuple[ToyTransformer, Progress]], Path]:
    """This trains every model in the folder `work`, or continues there, measures their runs and draws them at `path`.

    Returns each model with its progress, whose figures are the measures, by its shipped name; and the path.
    """
    from mechscope.labs.induction.measures import history
    from mechscope.labs.induction.picture import draw
    from mechscope.labs.induction.train import train

    made = {}
    for name, one in every(recipe).items():
        model, progress = train(one, work / name, on_measured=lambda step: report("training", step, recipe.steps))
        rows = history(kept(work / name), one)
        made[name] = model, replace(progress, figures=rows)
    return made, draw(*(made[name][1].figures for name in (NAME, CONTROL, SMEARED)), path=path)


def kept(folder: Path) -> Iterator[tuple[int, Model]]:
    """This yields the models of a folder of step-NNNNN folders, with their steps, in order."""
    from mechscope import models

    for path in sorted(folder.glob("step-*")):
        yield int(path.name.removeprefix("step-")), models.load(path)


LABS = (
    Lab(
        NAME,
        "trained",
        "2 layers of 4 heads, width 64, no MLP; a one-layer control, and one with smeared keys; 48 tokens",
        "a previous-token head, an induction head that reads it by K-composition; a phase change; a control without",
        check,
        run,
    ),
)
