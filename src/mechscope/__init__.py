"""Mechscope: from a transformer and a behaviour to the mechanism, with evidence.

    import mechscope as ms

    model = ms.load("grammar")
    task = ms.tasks.ioi(model.tokenizer, n=128)
    scores = ms.circuits.eap_ig(model, task, steps=5)
    ms.view(ms.circuits.evaluate(model, task, scores.top(200)))

This is the front door: it names what the rooms hold and fetches a name when it is first used (PEP 562), so that
`import mechscope` costs next to nothing. It defines nothing itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mechscope._version import __version__

if TYPE_CHECKING:
    from mechscope import (
        causal,
        circuits,
        dictionaries,
        edits,
        errors,
        labs,
        lenses,
        models,
        store,
        tasks,
        units,
        viz,
        weights,
    )
    from mechscope.causal import patch_sweep
    from mechscope.edits import add, freeze, mean, patch, project, resample, scale, set, unchanged, zero
    from mechscope.models import Model, Run, load
    from mechscope.store import open
    from mechscope.viz import view

__all__ = [
    "__version__",
    # a model with names on it
    "load",
    "Model",
    "Run",
    # edits, to give to model.run(..., edits={site: edit})
    "zero",
    "mean",
    "set",
    "add",
    "patch",
    "project",
    "resample",
    "freeze",
    "scale",
    "unchanged",
    # interventions over a grid, as one table of effects
    "patch_sweep",
    # results: from disk, and on a page
    "open",
    "view",
    # rooms
    "causal",
    "circuits",
    "dictionaries",
    "edits",
    "errors",
    "labs",
    "lenses",
    "models",
    "store",
    "tasks",
    "units",
    "viz",
    "weights",
]

_ROOMS = frozenset(
    {
        "causal",
        "circuits",
        "dictionaries",
        "edits",
        "errors",
        "labs",
        "lenses",
        "models",
        "store",
        "tasks",
        "units",
        "viz",
        "weights",
    }
)
_OWNER = {
    **dict.fromkeys(["load", "Model", "Run"], "models"),
    **dict.fromkeys(
        ["zero", "mean", "set", "add", "patch", "project", "resample", "freeze", "scale", "unchanged"], "edits"
    ),
    "patch_sweep": "causal",
    "open": "store",
    "view": "viz",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"mechscope.{name}")
    if name in _OWNER:
        value = getattr(import_module(f"mechscope.{_OWNER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mechscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
