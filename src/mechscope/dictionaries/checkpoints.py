"""A training run's folder: checkpoints that appear whole or not at all, each of them a usable dictionary.

OUT/step-000500.safetensors      weights, Adam's moments, where the batches had got to, the log (two are kept)
OUT/dictionary.safetensors       the end of the run
OUT/NAME/...                     the same for each of several dictionaries
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechscope import store
from mechscope.dictionaries.dictionary import Dictionary
from mechscope.errors import DictionaryError, StoreError

LAST = "dictionary.safetensors"
KEPT = 2


@dataclass
class Started:
    """This is what a checkpoint says beside the weights: the steps done, the state of the batches, the logs."""

    step: int
    state: Any
    logs: list[list[dict[str, float]]]


class Checkpoints:
    """This is the folder of one run: what is saved to it, and what a killed run finds in it.

    names: of several dictionaries, a folder each; None for one dictionary. recipes: for each, what makes a run the
    same.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None, recipes: Sequence[dict[str, Any]]):
        self.folder, self.recipes = folder, recipes
        self.folders = [folder] if names is None else [folder / name for name in names]

    def finished(self) -> bool:
        """This is whether the run has ended."""
        return all((folder / LAST).is_file() for folder in self.folders)

    def open_into(self, dictionaries: Sequence[Dictionary]) -> None:
        """This gives the dictionaries what the ended run left."""
        for dictionary, folder, recipe in zip(dictionaries, self.folders, self.recipes):
            header, tensors = store.read(folder / LAST)
            _same(folder / LAST, header, recipe)
            _load(dictionary, header, tensors)
            dictionary.eval()

    def save(
        self,
        dictionaries: Sequence[Dictionary],
        optimisers: Sequence[torch.optim.Optimizer],
        step: int,
        logs: Sequence[Any],
        state: Any,
    ) -> None:
        """This writes a checkpoint of `step` for each dictionary and removes all but the last two."""
        for dictionary, optimiser, folder, log, recipe in zip(
            dictionaries, optimisers, self.folders, logs, self.recipes
        ):
            moments = {name: value for name, value, _, _ in _moments(dictionary, optimiser)}
            training = {"recipe": recipe, "step": step, "state": state, "log": log}
            header = {**dictionary.header(), "training": training}
            path = folder / f"step-{step:06d}.safetensors"
            store.save(path, "dictionary", {**dictionary.tensors(), **moments}, header)
        for folder in self.folders:
            for old in _steps(folder)[:-KEPT]:
                (folder / f"step-{old:06d}.safetensors").unlink(missing_ok=True)

    def restore(
        self, dictionaries: Sequence[Dictionary], optimisers: Sequence[torch.optim.Optimizer]
    ) -> Started | None:
        """This puts back the last checkpoint that all dictionaries have whole; None where there is none.

        A damaged one is passed over with a warning. Raises DictionaryError for the checkpoint of another run.
        """
        shared = set.intersection(*(set(_steps(folder)) for folder in self.folders))
        for step in sorted(shared, reverse=True):
            paths = [folder / f"step-{step:06d}.safetensors" for folder in self.folders]
            try:
                read = [store.read(path) for path in paths]
            except StoreError as error:
                warnings.warn(f"a checkpoint is passed over: {error}", stacklevel=3)
                continue
            for path, (header, _), recipe in zip(paths, read, self.recipes):
                _same(path, header, recipe)
            for (header, tensors), dictionary, optimiser in zip(read, dictionaries, optimisers):
                _load(dictionary, header, tensors)
                for name, _, parameter, key in list(_moments(dictionary, optimiser, fresh=True)):
                    optimiser.state[parameter][key] = tensors[name].clone()
            training = read[0][0]["training"]
            return Started(step, training["state"], [header["training"]["log"] for header, _ in read])
        return None

    def finish(self, dictionaries: Sequence[Dictionary]) -> None:
        """This writes the end of the run, and removes the checkpoints that led to it."""
        for dictionary, folder, recipe in zip(dictionaries, self.folders, self.recipes):
            dictionary.save(folder / LAST, training={"recipe": recipe})
        for folder in self.folders:
            for step in _steps(folder):
                (folder / f"step-{step:06d}.safetensors").unlink(missing_ok=True)


def _same(path: Path, header: dict[str, Any], recipe: dict[str, Any]) -> None:
    there = header["training"]["recipe"]
    other = [name for name in recipe if there.get(name) != recipe[name]]
    if other:
        says = ", ".join(f"{name}={there.get(name)!r} where {recipe[name]!r} was asked for" for name in other)
        raise DictionaryError(f"'{path}' is of another run: {says}. Give another out=, or delete the folder")


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))


@torch.no_grad()
def _load(dictionary: Dictionary, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    dictionary.load_state_dict({n: value for n, value in tensors.items() if not n.startswith("training.")})
    dictionary.facts = header["facts"]
    dictionary.reads, dictionary.writes = header["reads"], header["writes"]


def _moments(
    dictionary: Dictionary, optimiser: torch.optim.Optimizer, fresh: bool = False
) -> Iterator[tuple[str, Tensor, Any, str]]:
    """This walks Adam's moments under the names that they have in a checkpoint; `fresh` makes them first."""
    ours = {id(p): name for name, p in dictionary.named_parameters()}
    for parameter in (p for group in optimiser.param_groups for p in group["params"]):
        if fresh:
            zero = torch.zeros_like(parameter)
            optimiser.state[parameter] = {"step": torch.zeros(()), "exp_avg": zero, "exp_avg_sq": zero.clone()}
        for key, value in optimiser.state[parameter].items():
            yield f"training.{ours[id(parameter)]}.{key}", torch.as_tensor(value), parameter, key
