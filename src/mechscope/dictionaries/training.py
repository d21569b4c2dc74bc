"""The one training loop: any number of dictionaries on one iterator of tensors, killed and continued at will.

    sae = train(TopK(768, 24_576, k=32), model.stream(texts, at="blocks.8.resid_post", vectors=4096), steps=10_000)

The loop draws nothing at random: what a step does follows from the weights, the optimiser's moments and the batch. A
checkpoint holds the first two and where the batches had got to, so a run that was killed goes on with the numbers that
it would have had. See `checkpoints.py` for the files, `callbacks.py` for what can be hung into the loop.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from mechscope.dictionaries.checkpoints import Checkpoints
from mechscope.dictionaries.dictionary import Dictionary, Reconstruction
from mechscope.dictionaries.parallel import PATIENCE, Together
from mechscope.errors import DictionaryError, did_you_mean

Progress = Callable[[str, int, int], None]

FIRST = 8192
"""How many vectors set the scales and the middle, at least."""


@dataclass
class Training:
    """This is a run under way, as callbacks see it after each step.

    step: the steps done. batch: what the step was made on. found: each dictionary's reconstruction, before the step.
    logs: for each dictionary its figures so far, [{"step": 50, "loss": 3.1, "mse": 3.0, "fvu": ..., "l0": ...}, ...].
    """

    dictionaries: list[Dictionary]
    optimisers: list[torch.optim.Optimizer]
    steps: int
    step: int
    batch: Any
    found: list[Reconstruction]
    logs: list[list[dict[str, float]]]
    names: list[str]


Callback = Callable[[Training], None]
T = TypeVar("T", bound=Dictionary | Sequence[Dictionary])


def train(
    dictionaries: T,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float | None = None,
    warmup: float = 0.02,
    decay: float = 0.2,
    clip: float | None = None,
    out: str | Path | None = None,
    every: int = 500,
    record: int = 50,
    schedules: Mapping[str, Callable[[float], float]] | None = None,
    callbacks: Sequence[Callback] = (),
    patience: float = PATIENCE,
    progress: Progress | None = None,
) -> T:
    """This trains dictionaries in place with Adam and returns them; a folder `out` makes the run safe to kill.

    dictionaries: one, or a list that shares each batch. batches: yields vectors [n, d], or (x, target) for a
    transcoder, or tensors by site as `model.stream(texts, at=[...])` does, of which each dictionary takes the sites
    that it reads and writes. steps: one batch each. lr: Adam's rate, by default 2e-4 * sqrt(2^14 / n_latents), at most
    2e-3 (Gao et al. 2024, figure 3); it rises over the first `warmup` of the steps and falls over the last `decay`.
    clip: the largest norm of a gradient. every: steps between checkpoints, of which the last two are kept. record:
    steps between figures in the log, `facts["training"]["log"]`. schedules: options that change on the way, each a
    function of the share of the training that is done: {"l1": lambda done: 5 * min(1, 20 * done)}. callbacks: called
    with a `Training` after each step. progress(what, done, of). Started by `torchrun`, within `processes()`, a step is
    of the batches of all processes (`parallel.py`); one that is late by `patience` seconds is named.

    A run that `out` holds half done is gone on with, from where its batches had got to: `batches` is told by
    `.resume(state)`, or, where it has none, the batches already seen are drawn and left out. A run that `out` holds
    whole is opened. Raises DictionaryError for a folder of another run, batches that end early, and a loss that is
    not a number.

    >>> x = torch.randn(256, 16)
    >>> train(TopK(16, 64, k=4), [x] * 20, steps=20).facts["training"]["steps"]  # doctest: +SKIP
    20
    """
    trained: list[Dictionary] = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    for dictionary in trained:
        if dictionary.reads is None and isinstance(at := getattr(batches, "at", None), str):
            dictionary.reads = dictionary.writes = at
    names = named(trained)
    rates = [lr or min(2e-3, 2e-4 * (2**14 / d.n_latents) ** 0.5) for d in trained]
    recipe = {"steps": steps, "lr": lr, "warmup": warmup, "decay": decay, "clip": clip, "record": record}
    for option, d in itertools.product(schedules or (), trained):
        if not hasattr(d, option):
            raise DictionaryError(
                f"a {type(d).__name__} has no {option!r} to schedule{did_you_mean(option, d.options())}; it has "
                f"{', '.join(d.options())}"
            )
    recipes = [{"architecture": type(d).__name__, **d.options(), **recipe} for d in trained]
    kept = Checkpoints(Path(out), None if dictionaries is trained[0] else names, recipes) if out is not None else None
    if kept is not None and kept.finished():
        kept.open_into(trained)
        return dictionaries

    optimisers = [adam(d, rate) for d, rate in zip(trained, rates)]
    together = Together(patience)
    started = kept.restore(trained, optimisers) if kept is not None else None
    if started is None:
        step, logs = 0, [[] for _ in trained]
        batches = _begin(trained, batches, together)
    else:
        step, logs = started.step, started.logs
        batches = _resumed(batches, together.mine(started.state), step)
    source = iter(batches)

    for d in trained:
        d.train()
    found: list[Reconstruction] = []
    while step < steps:
        batch = next(source, None)
        together.meet(step)
        if not together.has(batch is not None):
            raise DictionaryError(
                f"the batches ended after {step} of {steps} steps; give more text, or stream it with loop=True"
            )
        factor = rate_at(step, steps, warmup, decay)
        for d, optimiser, rate in zip(trained, optimisers, rates):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            for option, value in (schedules or {}).items():
                setattr(d, option, value(step / steps))
        made = [one_step(d, o, batch, step / steps, clip, together) for d, o in zip(trained, optimisers)]
        found = [new or old for new, old in zip(made, found or made)]  # what a process without a batch saw last
        step += 1
        if step % record == 0 or step in (1, steps):
            for d, what, log in zip(trained, found, logs):
                log.append(figures(d, what, step))
        moment = Training(trained, optimisers, steps, step, batch, found, logs, names)
        for callback in callbacks:
            callback(moment)
        if kept is not None and step % every == 0 and step < steps:
            state = together.states(_state(batches))
            if together.rank == 0:
                kept.save(trained, optimisers, step, logs, state)
        if progress is not None:
            progress("steps", step, steps)

    described = batches.facts() if hasattr(batches, "facts") else {}  # type: ignore[attr-defined]
    for d, log, rate in zip(trained, logs, rates):
        d.facts |= {**described, "training": {**recipe, "lr": rate, "processes": together.size, "log": log}}
        d.eval()
    if kept is not None and together.rank == 0:
        kept.finish(trained)
    together.settle()
    return dictionaries


def one_step(
    dictionary: Dictionary,
    optimiser: torch.optim.Optimizer,
    batch: Any,
    fraction: float,
    clip: float | None = None,
    together: Together | None = None,
) -> Any:
    """This is one step of one dictionary: forward, backward, update, constraints, and the count of idle latents.

    Returns the Reconstruction, or None where this process has no batch and `together` has others that do.
    """
    dictionary.anneal(fraction)
    found = None if batch is None else dictionary.reconstruct(batch)
    if found is not None:
        found.loss.backward()
    examples = found.examples if found is not None else 0
    if together is not None:
        together.share(dictionary, examples)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(dictionary.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    dictionary.after_step()
    with contextlib.nullcontext() if together is None else together.counting(dictionary, examples):
        if found is not None:
            dictionary.count(found)
    return found


def adam(dictionary: Dictionary, lr: float) -> torch.optim.Optimizer:
    """This is Adam on what a dictionary trains, in one fused kernel where the device has one."""
    parameters = [p for p in dictionary.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=lr, fused=parameters[0].device.type in ("cpu", "cuda"))


def rate_at(step: int, steps: int, warmup: float, decay: float) -> float:
    """This is the factor on the learning rate: up in a line over `warmup` of the steps, down over the last `decay`.

    >>> [round(rate_at(step, 10, 0.2, 0.5), 2) for step in (0, 1, 2, 5, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.2]
    """
    rising = (step + 1) / max(1.0, warmup * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


def figures(dictionary: Dictionary, found: Reconstruction, step: int) -> dict[str, float]:
    """This is a line of the log; raises DictionaryError where the loss is no number."""
    loss = found.loss.item()
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise DictionaryError(
            f"the loss of {type(dictionary).__name__} at step {step} is {loss}; give a lower lr=, or clip=1.0, "
            "and look whether the activations hold such numbers"
        )
    line = {"step": step, "loss": loss, **{name: value.item() for name, value in found.losses.items()}, "l0": found.l0}
    if found.fvu is not None:
        line["fvu"] = found.fvu.item()
    return {**line, "dead": (dictionary.idle > getattr(dictionary, "dead_after", 100_000)).float().mean().item()}


def named(dictionaries: Sequence[Dictionary]) -> list[str]:
    """This is a name for each dictionary: the site that it writes, or its number; with both where sites repeat."""
    sites = [d.writes if isinstance(d.writes, str) else "" for d in dictionaries]
    return [
        site if site and sites.count(site) == 1 else f"{site or type(d).__name__}-{i}"
        for i, (site, d) in enumerate(zip(sites, dictionaries))
    ]


def _begin(trained: list[Dictionary], batches: Iterable[Any], together: Together) -> Iterable[Any]:
    """This sets scales and middles from the first vectors, and gives back batches that start where they did."""
    state = _state(batches)
    source = iter(batches)
    first: list[Any] = []
    seen = 0
    while seen < FIRST // together.size and (batch := next(source, None)) is not None:
        first.append(batch)
        x = trained[0].parts(batch)[0]
        seen += x.shape[0]
    if not seen:
        raise DictionaryError("there is nothing to train on: the iterator of batches is empty")
    together.meet(0)
    for d in trained:
        parts = [d.parts(batch) for batch in first]
        targets = [target for _, target in parts if target is not None]
        together.begin(d, torch.cat([x for x, _ in parts]), torch.cat(targets) if targets else None)
    if state is not None:
        batches.resume(state)  # type: ignore[attr-defined]
        return batches
    return itertools.chain(first, source)


def _resumed(batches: Iterable[Any], state: Any, step: int) -> Iterable[Any]:
    if state is not None and hasattr(batches, "resume"):
        batches.resume(state)  # type: ignore[attr-defined]
        return batches
    source: Iterator[Any] = iter(batches)
    for _ in range(step):
        next(source, None)
    return source


def _state(batches: Any) -> Mapping[str, Any] | None:
    return batches.state() if hasattr(batches, "state") else None
