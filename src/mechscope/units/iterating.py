"""Iteration heads: while the t-th step of a chain of thought is written, they fetch the t-th input.

    x_1 ... x_n END s_1 ... s_n       s_t is predicted at the position of s_(t-1), the first at END

    iteration     mean over t of the attention from where s_t is predicted to x_t
    control       the same attention to another input of the row, drawn at random for every t

Rows should have different numbers of inputs: where all have as many, a head of fixed distance does the same.
Source: Cabannes et al. 2024 (arXiv:2406.02128), who find the head in the second layer of a transformer of two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import store
from mechscope.errors import UnitsError
from mechscope.units.kinds import Heads, Kind
from mechscope.units.patterns import looked

if TYPE_CHECKING:
    from mechscope.models.model import Model

CABANNES = "Cabannes et al. 2024, arXiv:2406.02128"
LEAST = 0.1


def iteration_heads(
    model: Model, rows: Sequence[Sequence[int]], inputs: Sequence[int], first: int = 0, seed: int = 0
) -> Heads:
    """This is which heads attend to the t-th input while the t-th step is written: one kind, "iteration".

    rows: ids of each row, up to the last token before the last step; inputs: how many inputs each has; first: the
    position of the first input, after a BOS for example. Each row is inputs, one token that ends them, and the steps,
    one token each. One run.

    Raises UnitsError where a row has fewer than two inputs in every case, or is too short for its steps.

    >>> iteration_heads(model, chains.rows(), chains.lengths.tolist())["iteration"].heads  # doctest: +SKIP
    [(1, 0)]
    """
    started = time.perf_counter()
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (ids, n) in enumerate(zip(rows, inputs, strict=True)):
        if n >= 2:  # of a single input there is no other to compare with
            groups.setdefault((n, len(ids)), []).append(row)
        if len(ids) < first + 2 * n:
            raise UnitsError(
                f"row {row} has {len(ids)} tokens; {n} inputs from position {first}, their end and {n} steps but the "
                f"last take {first + 2 * n}"
            )
    if not groups:
        raise UnitsError("no row has two inputs or more, so that none tells which input is attended to")
    sites = model.resolve("blocks.*.pattern")
    generator = torch.Generator().manual_seed(seed)
    values, controls = [], []
    for (n, _), members in groups.items():
        ids = torch.tensor([list(rows[row]) for row in members])
        with torch.no_grad():
            out = model.run(ids, save="blocks.*.pattern", stop_at=sites[-1].site)
        step = torch.arange(n).expand(len(members), n)
        other = (step + torch.randint(1, n, step.shape, generator=generator)) % n
        for held, which in ((values, step), (controls, other)):
            held.append(_attention(out, sites, first + n + step, first + which))
    text = f"{sum(map(len, groups.values()))} rows of {min(groups)[0]} to {max(groups)[0]} inputs"
    kind = Kind(
        "iteration",
        "mean attention to the t-th input from where the t-th step is predicted",
        CABANNES,
        f"{text}; control: attention to another input of the row, drawn at random at every step",
        torch.cat(values, -1),
        torch.cat(controls, -1),
        LEAST,
    )
    choices = {"text": text, "threshold": "the greatest high end of a 95 % interval over rows on the control"}
    provenance = {**model.provenance(), "method": "iteration_heads", "versions": store.manifest()}
    cost = {"seconds": time.perf_counter() - started, "forwards": 1}
    return Heads({kind.name: kind}, choices, provenance, cost)


def _attention(out, sites, query: Tensor, key: Tensor) -> Tensor:
    """This is the mean attention [layer head row] from queries to keys, [row n] each."""
    return torch.stack([looked(out[site.key].float().cpu(), query, key) for site in sites])
