"""How many heads a model can do without: the loss as heads are taken away, the least important first.

    curve(order)[n] = loss with the first n heads of an order written over by their mean over the text
    control         = the same with heads in random orders

Importance is given, once, as in Bansal et al. 2023 (arXiv:2212.09095), who remove the heads of OPT-66B a tenth at a
time and find about 70 % of them superfluous for 14 tasks. Where the heads of a kind stand in the order is what
`over_represented` asks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import edits, store
from mechscope.causal.evidence import Column, Evidence, Row, Score, Scores
from mechscope.errors import UnitsError
from mechscope.tasks.intervals import mean_interval
from mechscope.units.ablating import row_loss

if TYPE_CHECKING:
    from mechscope.models.model import Model

TOLERATED = 0.05


@torch.no_grad()
def pruning_curve(
    model: Model,
    ids: Tensor,
    importance: Tensor,
    counted: Tensor | None = None,
    steps: int = 10,
    orders: int = 5,
    seed: int = 0,
) -> Evidence:
    """This is the loss of a model on rows as more and more of its heads are removed, against random orders.

    ids: [row pos]. importance: [layer head], such as `head_importance(...).score`; the least is removed first. counted:
    bool [row pos - 1], which predictions count, all by default (such as those that a repeat announces). steps: into how
    many parts the way is cut. orders: how many random orders are the control. Costs steps * (1 + orders) forwards.

    Raises UnitsError where importance has another shape than the model's heads.

    >>> pruning_curve(model, ids, head_importance(model, ids).score).answer  # doctest: +SKIP
    'without 6 of 8 heads the loss rises by less than 5 % ...'
    """
    if importance.shape != (model.n_layers, model.n_heads):
        raise UnitsError(
            f"importance of shape {list(importance.shape)} is not of {model.n_layers} layers of {model.n_heads} heads"
        )
    started = time.perf_counter()
    total = importance.numel()
    counts = sorted({round(total * step / steps) for step in range(steps + 1)})
    by_importance = importance.flatten().argsort()
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randperm(total, generator=generator) for _ in range(orders)]
    curves = torch.stack([_curve(model, ids, order, counts, counted) for order in (by_importance, *random)])
    kept, chance = curves[0], curves[1:].mean(0)  # [count row]
    columns = (
        Column("loss", "nats", "with the least important heads removed"),
        Column("random", "nats", f"with as many heads removed at random, mean of {orders} orders"),
    )
    rows = [
        Row(f"{count} of {total} heads removed", (_score(kept[i]), _score(chance[i]) if orders else None))
        for i, count in enumerate(counts)
    ]
    base, worst = float(kept[0].mean()), float(kept[-1].mean())
    spared = _spared(counts, kept.mean(1), base + TOLERATED * (worst - base))
    at_random = [_spared(counts, curve.mean(1), base + TOLERATED * (worst - base)) for curve in curves[1:]]
    against = f"; in random orders {sum(at_random) / orders:.1f}" if orders else ""
    return Evidence(
        question=f"how many heads {model.name} can do without",
        answer=(
            f"without {spared} of {total} heads the loss rises by less than {TOLERATED:.0%} of what it rises by "
            f"without any{against}"
        ),
        tables=(Scores("heads removed", columns, tuple(rows), about="the least important first"),),
        choices={
            "ablation": "z replaced by its mean over the text",
            "importance": "given, not measured again as heads go",
            "text": f"{len(ids)} rows of {ids.shape[1]} tokens" + (", some predictions" if counted is not None else ""),
        },
        provenance={**model.provenance(), "method": "pruning_curve", "versions": store.manifest()},
        cost={"seconds": time.perf_counter() - started, "forwards": len(counts) * (1 + orders)},
        tensors={"counts": torch.tensor(counts), "curves": curves, "order": by_importance},
    )


def _curve(model: Model, ids: Tensor, order: Tensor, counts: list[int], counted: Tensor | None) -> Tensor:
    """This is each row's loss with so many heads of an order removed [count row]."""
    found = []
    for count in counts:
        heads = [divmod(int(at), model.n_heads) for at in order[:count]]
        ablated = {f"blocks.{layer}.z[head={head}]": edits.mean(("batch", "pos")) for layer, head in heads}
        logits = model.run(ids, edits=ablated).logits
        found.append(row_loss(logits, ids, counted))
    return torch.stack(found)


def _spared(counts: list[int], losses: Tensor, most: float) -> int:
    """This is how many heads can go before the loss is above `most` for the first time."""
    for i, loss in enumerate(losses.tolist()):
        if loss > most:
            return counts[max(0, i - 1)]
    return counts[-1]


def _score(values: Tensor) -> Score:
    return float(values.mean()), *mean_interval(values.tolist())
