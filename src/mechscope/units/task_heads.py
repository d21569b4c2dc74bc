"""What a task's metric loses without each head, and whether the heads of a kind matter more than others.

`ablating.py` asks the same of the loss on a text; `over_represented` takes either.

Every head is ablated alone (`causal.ablation_sweep`) to zero, to its mean and to another prompt's value, three answers
that need not agree. Whether the heads of a kind matter more than others is asked by permutation: their mean importance
against that of as many heads drawn at random (Bansal et al. 2023, arXiv:2212.09095, found induction heads among the
important ones of OPT-66B).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope.causal.ablate import ablation_sweep
from mechscope.causal.cost import plan
from mechscope.causal.evidence import Column, Evidence, Row, Score, Scores
from mechscope.causal.table import EffectTable, recorded

if TYPE_CHECKING:
    from mechscope.models.model import Model
    from mechscope.tasks import Task
    from mechscope.units.kinds import Heads

WAYS = ("zero", "mean", "resample")
DRAWS = 10_000


def head_effects(
    model: Model, task: Task, kinds: Heads | None = None, by: Sequence[str] = WAYS, seed: int = 0
) -> Evidence:
    """This is what a task's metric loses without each head, by each kind of ablation, and which kinds matter most.

    kinds: what `units.heads` found; the heads of each kind are then held against random sets of as many heads. The cost
    is predicted before anything is run (`cost["predicted"]`) and measured.

    Raises what `causal.ablation_sweep` raises.

    >>> head_effects(model, task, units.heads(model))["1.0"]  # doctest: +SKIP
    (3.1, 2.9, 3.3)
    """
    predicted = {way: plan(ablation_sweep, model, task, "z", over=("layer", "head"), by=way, seed=seed) for way in by}
    started = time.perf_counter()
    swept = {way: ablation_sweep(model, task, "z", over=("layer", "head"), by=way, seed=seed) for way in by}
    seconds = time.perf_counter() - started
    lost = {way: -table.mean() for way, table in swept.items()}
    unit = next(iter(swept.values())).units.get(task.metric.name, task.metric.unit)
    heads = lost[by[0]].shape[1]
    order = lost[by[0]].flatten().argsort(descending=True).tolist()
    columns = tuple(Column(way, unit, f"what {task.metric.name} loses under {way} ablation") for way in by)
    intervals = {way: _lost(table) for way, table in swept.items()}
    rows = []
    for at in order:
        layer, head = divmod(at, heads)
        note = ", ".join(kinds.label(layer, head)) if kinds is not None else ""
        rows.append(Row(f"{layer}.{head}", tuple(intervals[way][at] for way in by), note=note))
    for number in range(
        max(table.control[task.metric.name].shape[0] if table.control else 0 for table in swept.values())
    ):
        found = tuple(_control(table, number, task.metric.name) for table in swept.values())
        rows.append(Row(f"random change {number + 1}", found, control=True, note="as large, at one of the heads"))
    tables = [Scores("heads", columns, tuple(rows), about="the most important first, by the first ablation")]
    if kinds is not None:
        tables.append(_by_kind(kinds, lost, unit, seed))
    most = rows[0].label
    return Evidence(
        question=f"importance of the heads of {model.name} for {task.name}",
        answer=f"without head {most}, {task.metric.name} loses {float(lost[by[0]].flatten()[order[0]]):.2f} {unit}",
        tables=tuple(tables),
        choices=swept[by[0]].choices | {"ablation": ", ".join(by)},
        provenance=recorded(model, task, head_effects, by=list(by), seed=seed),
        cost={
            "predicted": {way: asdict(cost) for way, cost in predicted.items()},
            "measured": {way: table.cost for way, table in swept.items()},
            "seconds": seconds,
        },
        tensors={way: table.effects[task.metric.name].float() for way, table in swept.items()},
    )


def over_represented(
    importance: Tensor, members: Tensor, seed: int = 0, within: Tensor | None = None, ranks: bool = False
) -> tuple[float, float]:
    """This is how much more the members matter than the mean head, and the chance that random ones do as much.

    importance: [n]; members: bool [n]. within: [n], the group of each head, such as its model: as many heads of every
    group are then drawn as are members of it. ranks: whether heads are compared by their place in their group, from 0
    for the least important to 1 for the most, instead of by size, of which one head may have nearly all. p counts the
    draw that was made, so it is never 0 (Phipson and Smyth 2010).

    >>> over_represented(torch.tensor([5.0, 5.0, 0.0, 0.0]), torch.tensor([True, True, False, False]))[0]
    2.5
    """
    generator = torch.Generator().manual_seed(seed)
    groups = torch.zeros(len(importance), dtype=torch.long) if within is None else within
    mine, mean, chance, count = 0.0, 0.0, torch.zeros(DRAWS), int(members.sum())
    for group in groups.unique():
        here, of = importance[groups == group], members[groups == group]
        if ranks:
            here = here.argsort().argsort().float() / max(1, len(here) - 1)
        n = int(of.sum())
        draws = torch.rand(DRAWS, len(here), generator=generator).argsort(1)[:, :n]
        mine += float(here[of].sum())
        mean += n * float(here.mean())
        chance += here[draws].sum(1)
    p = ((chance >= mine - 1e-6).sum() + 1) / (DRAWS + 1)
    return (mine - mean) / count, float(p)


def _by_kind(kinds: Heads, lost: dict[str, Tensor], unit: str, seed: int) -> Scores:
    columns = []
    for way in lost:
        columns.append(Column(f"excess, {way}", unit, "mean importance of the kind's heads over that of all heads"))
        columns.append(Column(f"p, {way}", "p", "share of random sets of as many heads that matter as much"))
    rows = []
    for kind in kinds:
        scores: list[Score | None] = []
        for importance in lost.values():
            members = torch.zeros(importance.shape, dtype=torch.bool)
            for at in kind.heads:
                members[at] = True
            if not kind.heads:
                scores += [None, None]
                continue
            scores += [
                (x, float("nan"), float("nan")) for x in over_represented(importance.flatten(), members.flatten(), seed)
            ]
        rows.append(Row(kind.name, tuple(scores), note=f"{len(kind.heads)} of {kind.score.numel()} heads"))
    return Scores("kinds", tuple(columns), tuple(rows), about="whether the heads of a kind matter more than others")


def _lost(table: EffectTable) -> list[Score]:
    low, high = table.interval()
    ends = table.mean().flatten(), high.flatten(), low.flatten()  # of a loss the signs turn, and so do the ends
    return [(-float(effect), -float(most), -float(least)) for effect, most, least in zip(*ends)]


def _control(table: EffectTable, number: int, metric: str) -> Score | None:
    values = table.control.get(metric)
    if values is None or number >= len(values):
        return None
    return -float(values[number].nanmean()), float("nan"), float("nan")
