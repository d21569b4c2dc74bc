"""The kinds of neurons in every layer, beside those of the untrained twin, and whether token neurons take tokens back.

    share(kind, layer)     of the layer's neurons, by `responses`: dead, token, bigram, positional
    suppressed(layer)      of the layer's token neurons, those that write against a token they respond to: at least one
                           of their triggers is among the `LOWEST` of all tokens by what the neuron adds to logits
                           control: the trigger of another token neuron, drawn at random, in the trigger's place

Voita, Ferrando & Nalmpantis 2023 (arXiv:2309.04827, sections 3 to 5): early layers are full of dead and of token
neurons, and many of the latter remove the very token from the stream that switched them on. The twin has the same
weights in another order within each matrix (`untrained_twin`). Intervals are over the neurons of a layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import store
from mechscope.causal.evidence import Column, Evidence, Row, Score, Scores
from mechscope.models.experts import neurons_written
from mechscope.tasks.intervals import mean_interval
from mechscope.units.confidence import unembedding
from mechscope.units.head_kinds import untrained_twin
from mechscope.units.responding import Responses, responses

if TYPE_CHECKING:
    from mechscope.models.model import Model

SHOWN = ("dead", "token", "bigram", "positional")
LOWEST = 0.01
"""The share of the vocabulary that counts as what a neuron writes against."""


def neuron_kinds(
    model: Model,
    texts: Iterable[str] | Tensor,
    at: str = "blocks.*.mlp_post",
    above: float = 0.25,
    context: int = 128,
    batch: int = 16,
    twin: bool = True,
    seed: int = 0,
) -> Evidence:
    """This is the share of dead, token, bigram and positional neurons in every layer, and of the untrained twin's.

    texts: a list, for it is read twice. above: what counts as active, as a share of the greatest activation on a first
    batch; 0 for a network of ReLUs. twin: whether the control is made too, at the same cost. Raises what `responses`
    raises.

    >>> print(neuron_kinds(model, texts))  # doctest: +SKIP
    """
    started = time.perf_counter()
    held = texts if isinstance(texts, Tensor) else list(texts)
    found = responses(model, held, at, above, context, batch, seed)
    tables = [table_of(model, found, "trained", seed)]
    if twin:
        other = untrained_twin(model, seed)
        tables.append(table_of(other, responses(other, held, at, above, context, batch, seed), "untrained twin", seed))
    counts = {kind: found.kinds.count(kind) for kind in SHOWN}
    said = ", ".join(f"{n / len(found.names):.1%} {kind}" for kind, n in counts.items())
    return Evidence(
        f"kinds of neurons in {model.name}, by layer",
        f"of {len(found.names):,} neurons {said}",
        tuple(tables),
        found.choices | {"control": "weights in another order within each matrix" if twin else "none"},
        {
            **model.provenance(),
            **{"method": "neuron_kinds", "versions": store.manifest(), "tokens": found.provenance["tokens"]},
            "options": {"at": at, "above": above, "context": context, "batch": batch, "seed": seed, "twin": twin},
        },
        {"seconds": time.perf_counter() - started},
    )


def table_of(model: Model, found: Responses, title: str, seed: int = 0) -> Scores:
    """This is a row for every site: the shares of its neurons that are of each kind, and of suppression."""
    sites: dict[str, list[int]] = {}
    for unit, name in enumerate(found.names):
        sites.setdefault(name.rpartition("[")[0], []).append(unit)
    taken = suppression(model, found, seed)
    rows = []
    for site, units in sites.items():
        kinds = [found.kinds[unit] for unit in units]
        shares: list[Score | None] = [_share([float(kind == shown) for kind in kinds]) for shown in SHOWN]
        back = [taken[unit] for unit in units if unit in taken]
        shares += [_share([float(pair[i]) for pair in back]) if back else None for i in range(2)]
        rows.append(Row(site, tuple(shares), control=title != "trained", note=f"{len(units)} neurons"))
    columns = [Column(kind, "share", "of the layer's neurons") for kind in SHOWN]
    columns.append(Column("suppressed", "share", "of its token neurons, that write against a token they respond to"))
    columns.append(Column("suppressed, control", "share", "the same with another token neuron's trigger"))
    return Scores(title, tuple(columns), tuple(rows))


def suppression(model: Model, found: Responses, seed: int = 0) -> dict[int, tuple[bool, bool]]:
    """This says of each token neuron whether it writes against a trigger of its own, and against another's.

    Empty where the units are not what an MLP's down projection reads, and so have no direction that they write.
    """
    mine = [unit for unit, kind in enumerate(found.kinds) if kind == "token" and unit in found.triggers]
    rows, out = unembedding(model), {}
    generator = torch.Generator().manual_seed(seed)
    written: dict[str, Tensor] = {}
    for unit in mine:
        site, _, number = found.names[unit].partition("[")
        if not site.endswith(("mlp_post", "expert_post")):
            return {}
        if site not in written:
            written[site] = neurons_written(model, int(site.split(".")[-2])).rows
        logits = rows @ written[site][int(number.rstrip("]"))]
        # A neuron that moves few tokens leaves the rest alike, and the lowest of those is nothing written against.
        low = float(torch.minimum(logits.quantile(LOWEST), logits.median() - 1e-3 * logits.abs().max()))
        others = [other for other in mine if not set(found.triggers[other]) & set(found.triggers[unit])]
        another = others[int(torch.randint(len(others), (), generator=generator))] if others else None
        against = [bool((logits[found.triggers[u]] <= low).any()) if u is not None else False for u in (unit, another)]
        out[unit] = against[0], against[1]
    return out


def _share(values: list[float]) -> Score:
    return sum(values) / len(values), *mean_interval(values)


__all__ = ["neuron_kinds", "suppression", "table_of"]
