"""The laboratory of nested brackets: the evidence on the shipped model and its controls, and the run with its plot.

All figures are of the hard places (`Brackets.hard`), where the bracket that closes next is not the last token. The
simplifications are made on sequences drawn as for training, and tried on others of the same kind and on deeper ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mechscope.labs import plot, shelf
from mechscope.labs.dyck.sequences import Brackets, brackets
from mechscope.labs.lab import Fact, Lab, Report

if TYPE_CHECKING:
    from mechscope.causal.simplification import Fidelity
    from mechscope.labs.dyck.train import Recipe
    from mechscope.labs.toy import ToyTransformer
    from mechscope.labs.training import Progress
    from mechscope.models import Model

NAME = "dyck"
SEEN, DEEPER = "depths trained on", "deeper"
SIMPLER = (("svd", 4), ("svd", 8), ("svd", 16), ("clusters", 16), ("clusters", 128))
CONTROLS = (("svd", 0), ("random", 8))
"""The whole width of a head (0), which changes nothing; and as many directions as above, drawn at random."""


def made() -> dict[str, Any]:
    """This is the record of how the shipped model was made."""
    return json.loads((shelf.ZOO / NAME / "training.json").read_text())


def recipe() -> Recipe:
    """This is the recipe of the shipped model."""
    from mechscope.labs.dyck.train import Recipe

    return Recipe(**made()["recipe"])


def untrained() -> Model:
    """This is the control: the shipped model before its first step."""
    from mechscope import models
    from mechscope.labs.dyck.train import new_model

    return models.load(new_model(recipe()).eval())


def drawn(recipe: Recipe, deeper: bool, n: int, seed: int) -> Brackets:
    """This is sequences that were never trained on; `deeper` ones nest up to twice as deep, and more often deeply."""
    deepest, opens = (2 * recipe.deepest, 0.6) if deeper else (recipe.deepest, recipe.opens)
    generator = torch.Generator().manual_seed(2**31 + seed)
    return brackets(n, recipe.total, recipe.kinds, deepest, opens, generator)


def right(model: Model, recipe: Recipe, made: Brackets, where: torch.Tensor) -> float:
    """This is the share of places where the likeliest closing bracket is the one that closes."""
    first = recipe.kinds + 1
    with torch.no_grad():
        kind = model.run(made.ids).logits[:, :-1, first:].argmax(-1) + first
    return float((kind == made.ids[:, 1:])[where[:, :-1]].double().mean())


def called(how: str, size: int) -> str:
    return {"clusters": f"{size} clusters", "svd": f"svd, rank {size}" if size else "full rank"}.get(
        how, f"random, rank {size}"
    )


def compared(
    model: Model, recipe: Recipe, n: int = 256, by_depth: bool = False, simpler: Sequence[tuple[str, int]] = SIMPLER
) -> Fidelity:
    """This is how far each simplification agrees, where the model was trained and deeper; or depth by depth.

    They are made on 128 sequences like those trained on, and tried on `n` others of each kind.
    """
    from mechscope.causal.simplification import fidelity, simplified

    near, far = drawn(recipe, deeper=False, n=n, seed=1), drawn(recipe, deeper=True, n=n, seed=2)
    sets = {SEEN: (near.ids, near.hard()), DEEPER: (far.ids, far.hard(deeper_than=recipe.deepest))}
    if by_depth:  # nothing closes at the greatest depth but the last token
        depths = range(1, 2 * recipe.deepest)
        sets = {f"{depth}": (far.ids, far.hard(depth - 1, depth)) for depth in depths}
    seen = drawn(recipe, deeper=False, n=128, seed=0).ids
    every = {
        called(how, size): simplified(model, seen, how, size or model.d_head) for how, size in (*simpler, *CONTROLS)
    }
    controls = [called(how, size) for how, size in CONTROLS]
    return fidelity(model, every, sets, slice(recipe.kinds + 1, None), controls)


# ------------------------------------------------------------------------------------------------ the evidence


def check() -> Iterator[Fact]:
    """This yields the evidence on the shipped model: that it goes deeper, and that its simplified copies do not."""
    yield from facts(shelf.load(NAME), untrained(), recipe())


def facts(model: Model, untrained: Model, recipe: Recipe) -> Iterator[Fact]:
    """This yields what is known of a finished model, and of its untrained twin."""
    for on, deeper, least in ((SEEN, False, 0.98), (DEEPER, True, 0.6)):
        tried = drawn(recipe, deeper, n=128, seed=3)
        where = tried.hard(deeper_than=recipe.deepest if deeper else 0)
        yield Fact(f"the bracket that closes is named, {on}", right(model, recipe, tried, where), at_least=least)
        yield Fact("  by the untrained twin", right(untrained, recipe, tried, where), at_most=0.3)
    found = compared(model, recipe, n=128, simpler=(("svd", 8), ("clusters", 128)))
    for name, least, gap in (("svd, rank 8", 0.95, 0.02), ("128 clusters", 0.75, 0.2)):
        yield Fact(f"{name}: agreement, {SEEN}", found.agreement(name, SEEN)[0], at_least=least)
        yield Fact(f"  less that {DEEPER}, low end of the interval", found.gap(name)[1], at_least=gap)
    for on in (SEEN, DEEPER):
        yield Fact(f"control: full rank, {on}", found.agreement("full rank", on)[0], at_least=1.0)
        yield Fact(f"control: random, rank 8, {on}", found.agreement("random, rank 8", on)[0], at_most=0.85)


# ------------------------------------------------------------------------------------------------ the run


def run(out: Path, report: Report) -> Path:
    """This trains the model, or continues where `out`/work stands, and draws how far its copies agree, by depth."""
    from mechscope.labs.dyck.train import Recipe

    return trained(Recipe(), out / "work", out / f"{NAME}.html", report)[-1]


def trained(
    recipe: Recipe, work: Path, path: Path, report: Report
) -> tuple[ToyTransformer, Progress, dict[str, Any], Path]:
    """This is a trained model, its record, what was found of it, and the path of the picture."""
    from mechscope import models
    from mechscope.labs.dyck.train import new_model, train

    hf, progress = train(recipe, work, report=report)
    model = models.load(hf)
    report("simplifying", 0, 0)
    found = compared(model, recipe)
    figures = {
        "parameters": sum(p.numel() for p in hf.parameters()),
        "agreement": {name: {on: found.agreement(name, on) for on in found.sets} for name in found.names},
        "gap": {name: found.gap(name) for name in found.names},
        "facts": [str(fact) for fact in facts(model, models.load(new_model(recipe).eval()), recipe)],
    }
    return hf, progress, figures, draw(model, recipe, path)


def draw(model: Model, recipe: Recipe, path: Path) -> Path:
    """This draws the agreement of each simplification by depth, and what the model itself gets right."""
    by_depth = compared(model, recipe, n=256, by_depth=True)
    depths = [float(depth) for depth in by_depth.sets]
    agreement = {name: (depths, [by_depth.agreement(name, on)[0] for on in by_depth.sets]) for name in by_depth.names}
    far = drawn(recipe, deeper=True, n=256, seed=2)
    own = [right(model, recipe, far, far.hard(int(depth) - 1, int(depth))) for depth in depths]
    panels = {"agreement with the model": agreement, "right brackets": {"the model": (depths, own)}}
    figure = plot.lines(panels, f"depth (trained to {recipe.deepest})")
    figure.add_vline(x=recipe.deepest + 0.5, line_dash="dot", line_color="grey")
    return plot.write(figure, path)


LABS: tuple[Lab, ...] = (
    Lab(
        NAME,
        "trained",
        "2 layers of 2 heads, width 64, 128 neurons each; brackets of 8 kinds, trained to depth 6",
        "copies with projected or clustered keys and queries agree with it at the depths trained on, and less below",
        check,
        run,
    ),
)
"""The laboratory of this room."""
