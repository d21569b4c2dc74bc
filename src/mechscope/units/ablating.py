"""How much each head matters: what the model's loss on a text becomes without it.

    importance(head) = loss with the head's z replaced - loss      nats a token, on every row

zero      z = 0. A head that always writes the same is then missed for what it always writes
mean      z = its mean over the text: only what it says differently from token to token is taken away
resample  z = another row's, at the same position: as mean, with values that the model is used to

    control     the same head's z changed as much at every position, in a random direction: what a change of that size
                costs wherever it points

Every run begins at the head's own block, with the stream as it was, so one head of layer l in L costs (L - l) / L of
a forward, and as much again with the control. Zero and mean ablation as in Michel, Levy and Neubig 2019
(arXiv:1905.10650) and Wang et al. 2022 (arXiv:2211.00593); what each of them hides: Zhang and Nanda 2024
(arXiv:2309.16042).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope import edits, store
from mechscope.errors import UnitsError, did_you_mean
from mechscope.models.edit import Edit, Where
from mechscope.models.passing import resumed
from mechscope.units.kinds import bounds

if TYPE_CHECKING:
    from mechscope.models.model import Model

Progress = Callable[[str, int, int], None]

VALUES = ("mean", "zero", "resample")


@dataclass(frozen=True, eq=False)
class HeadImportance:
    """This is what a model's loss rises by without each head: `values` [layer head row] in nats a token.

    layers: the number of the layer that each row of `values` is of. base: [row], the loss of the whole model.
    control: the same of random changes as large [layer head row], where they were asked for.
    """

    values: Tensor
    layers: tuple[int, ...]
    base: Tensor
    choices: dict[str, str]
    provenance: dict[str, Any]
    cost: dict[str, Any] = field(default_factory=dict)
    control: Tensor | None = None
    kind: str = field(default="head-importance", init=False)

    @cached_property
    def score(self) -> Tensor:
        """This is each head's mean over rows [layer head]."""
        return self.values.mean(-1)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """This is the ends of the score's 95 % bootstrap interval over rows, [layer head] each."""
        return bounds(self.values)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This is the importance as tensors and a JSON header; `from_parts` is the inverse."""
        facts = {"choices": self.choices, "provenance": self.provenance, "cost": self.cost}
        tensors = {"values": self.values, "base": self.base}
        if self.control is not None:
            tensors["control"] = self.control
        return tensors, {**facts, "layers": list(self.layers)}

    @classmethod
    def from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> HeadImportance:
        facts = header["choices"], header["provenance"], header["cost"]
        return cls(tensors["values"], tuple(header["layers"]), tensors["base"], *facts, tensors.get("control"))

    def save(self, path: str | Path) -> Path:
        """This writes the importance to one file, which `ms.open` reads back."""
        return store.save(path, self.kind, *self.to_parts())

    def __str__(self) -> str:
        low, high = self.bounds
        order = self.score.flatten().argsort(descending=True)[:10].tolist()
        lines = [f"loss without each head, {self.choices['ablation']}; {float(self.base.mean()):.3f} nats with all"]
        for place in order:
            at = divmod(place, self.score.shape[1])
            name = f"{self.layers[at[0]]}.{at[1]}"
            beside = "" if self.control is None else f"  random {self.control[at].mean():+.4f}"
            lines.append(f"  {name:<6} {self.score[at]:+.4f} [{low[at]:+.4f}, {high[at]:+.4f}]{beside}")
        return "\n".join(lines)


def forwards(model: Model, control: bool = False) -> float:
    """This is how many forwards `head_importance` costs, the plain one included; no model is run."""
    layers = model.anatomy.layers()
    return 1 + (1 + control) * sum(block.heads * (len(layers) - i) / len(layers) for i, block in enumerate(layers))


@dataclass(frozen=True, eq=False)
class AsLarge(Edit):
    """This changes a site as much as another edit would at every position, in a random direction."""

    edit: Edit
    seed: int

    def apply(self, x: Tensor, where: Where) -> Tensor:
        size = (self.edit.apply(x, where) - x).norm(dim=-1, keepdim=True)
        random = torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed)).to(x)
        return x + size * random / random.norm(dim=-1, keepdim=True)


@torch.no_grad()
def head_importance(
    model: Model,
    ids: Tensor,
    value: str = "mean",
    seed: int = 0,
    progress: Progress | None = None,
    control: bool = False,
    counted: Tensor | None = None,
) -> HeadImportance:
    """This ablates one head after another and gives the rise of the loss on the next token, row by row.

    ids: [row pos], a text's contexts. value: what stands in for a head, "mean", "zero" or "resample". control: whether
    every head is also changed as much in a random direction, for as many runs again. counted: bool [row pos-1],
    which predictions count, all by default.

    Raises UnitsError for another value or no rows, SiteError where the model has no z.

    >>> head_importance(model, ids).score.argmax()  # doctest: +SKIP
    tensor(17)
    """
    if value not in VALUES:
        raise UnitsError(f"value={value!r}{did_you_mean(value, VALUES) or ';'} type one of {', '.join(VALUES)}")
    if ids.dim() != 2 or not ids.numel() or ids.shape[1] < 2:
        raise UnitsError(f"head importance takes ids [row, pos] of two positions or more, got {list(ids.shape)}")
    ablated: Edit = {"mean": edits.mean(("batch", "pos")), "zero": edits.zero(), "resample": edits.resample(seed)}[
        value
    ]
    sites = model.resolve("blocks.*.z")
    blocks = model.anatomy.layers()
    layers = [
        next(i for i, block in enumerate(blocks) if request.site.startswith(f"{block.prefix}.")) for request in sites
    ]
    started = time.perf_counter()
    streams = [f"{blocks[layer].prefix}.resid_pre" for layer in layers]
    out = model.run(ids, save=streams)
    base = row_loss(out.logits, ids, counted)
    wide = max(blocks[layer].heads for layer in layers)
    values = torch.full((len(layers), wide, len(ids)), float("nan"))
    chance = values.clone() if control else None
    done, of = 0, sum(blocks[layer].heads for layer in layers)
    for i, layer in enumerate(layers):
        with resumed(model, layer, out[streams[i]]):
            for head in range(blocks[layer].heads):
                at = f"{sites[i].site}[head={head}]"
                out_of = model.run(ids, edits={at: edits.unchanged(ablated)})
                values[i, head] = row_loss(out_of.logits, ids, counted) - base
                if chance is not None:
                    random = AsLarge(ablated, seed + done)
                    out_of = model.run(ids, edits={at: edits.unchanged(random)})
                    chance[i, head] = row_loss(out_of.logits, ids, counted) - base
                done += 1
                if progress is not None:
                    progress("ablating heads", done, of)
    about = {
        "mean": "its mean over the text",
        "zero": "zero",
        "resample": "what it is on another row, position by position",
    }
    choices = {
        "ablation": f"a head's z replaced by {about[value]}",
        "measure": "the loss on the next token, in nats a token, less that of the whole model",
        "text": f"{len(ids)} rows of {ids.shape[1]} tokens" + (", some predictions" if counted is not None else ""),
    }
    if control:
        choices["control"] = "a change of the same z as large, position by position, in a random direction"
    options = {"value": value, "seed": seed, "rows": len(ids), "length": ids.shape[1], "control": control}
    provenance = {**model.provenance(), "method": "head_importance", "options": options, "versions": store.manifest()}
    cost = {"seconds": time.perf_counter() - started, "forwards": forwards(model, control)}
    return HeadImportance(values, tuple(layers), base, choices, provenance, cost, chance)


def row_loss(logits: Tensor | None, ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """This is the mean loss [row] on the next token, in nats; `counted` [row pos-1] says which predictions count."""
    if logits is None or logits.dim() != 3:
        raise UnitsError("this model gives no logits at every position, so there is no loss on the next token")
    right = ids[:, 1:, None].to(logits.device)
    before = logits[:, :-1].float()
    each = (before.logsumexp(-1) - before.gather(-1, right).squeeze(-1)).cpu()
    return each.mean(1) if counted is None else (each * counted).sum(1) / counted.sum(1)


__all__ = ["VALUES", "HeadImportance", "forwards", "head_importance"]
