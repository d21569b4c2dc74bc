"""Copy suppression as one of the kinds of heads: what each head takes from what the text is being predicted to repeat.

    predicted(q)      the token of the row, among those seen, that the logit lens before the head gives most to
    copy-suppression  minus what the head adds at q to that token's logit, over the mean of the tokens seen; mean over q
    control           the same of another token seen, drawn at random

Two forwards' worth tell it of every head, in logits. Whether that is all that a head does takes the ablation that
preserves it: `copy_suppression`. Source: McDougall et al. 2023 (arXiv:2310.04625).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope.errors import UnitsError
from mechscope.models.passing import resumed
from mechscope.units.kinds import Kind
from mechscope.units.written import added, to_logits

if TYPE_CHECKING:
    from mechscope.models.model import Model

MCDOUGALL = "McDougall et al. 2023, arXiv:2310.04625"
SKIPPED = 2
"""At the first positions there is no other token to compare with."""


@torch.no_grad()
def copy_suppression_kind(model: Model, ids: Tensor, seed: int = 0) -> Kind:
    """This is the kind "copy-suppression" of every head, on rows of text.

    ids: [row pos], a text's contexts of three positions or more. Two forwards' worth, one row and one layer at a time,
    so that the vectors of all heads are never held together. Raises UnitsError for shorter rows, SiteError for a model
    whose heads' outputs are not told apart.

    >>> copy_suppression_kind(model, ids).heads  # doctest: +SKIP
    [(4, 4)]
    """
    if ids.dim() != 2 or ids.shape[1] <= SKIPPED or not len(ids):
        raise UnitsError(f"copy suppression takes ids [row, pos] of three positions or more, got {list(ids.shape)}")
    generator = torch.Generator().manual_seed(seed)
    last = f"blocks.{model.n_layers - 1}.resid_post"
    values, controls = [], []
    for row in ids.split(1):
        out = model.run(row, save=["blocks.*.resid_pre", last])
        effect = to_logits(model, out[last], row)
        new = _first_seen(row)
        other = _another(new, generator)
        by_layer = [_taken(model, layer, out, row, effect, new, other) for layer in range(model.n_layers)]
        for into, part in zip((values, controls), zip(*by_layer)):
            into.append(torch.stack(part))
    return Kind(
        "copy-suppression",
        "what a head takes, before the end of a text, from the logit of the token seen that is predicted most",
        MCDOUGALL,
        f"{len(ids)} rows of {ids.shape[1]} tokens of the text; control: another token seen, drawn at random",
        torch.stack(values, -1),
        torch.stack(controls, -1),
        least=0.0,
    )


def _first_seen(row: Tensor) -> Tensor:
    """This is which tokens [query key] a query has seen, each at its first place alone."""
    first = torch.tensor([i == row[0].tolist().index(token) for i, token in enumerate(row[0].tolist())])
    return torch.ones(row.shape[1], row.shape[1]).tril().bool() & first


def _another(seen: Tensor, generator: torch.Generator) -> Tensor:
    """This is, for each query, what has been seen in a random order of keys [query key], the unseen last."""
    return torch.rand(seen.shape, generator=generator).masked_fill(~seen, -1.0)


def _taken(model: Model, layer: int, out, row: Tensor, effect, seen: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """This is what each head takes from the token predicted most, and from another [head]."""
    stream, site = out[f"blocks.{layer}.resid_pre"], f"blocks.{layer}.head_out"
    with resumed(model, layer, stream):
        head_out = model.run(row, save=site, stop_at=site)[site]
    lens = (model.readout.norm(stream) @ model.readout.direction(row).mT)[0].float().cpu()
    predicted = lens.masked_fill(~seen, float("-inf")).argmax(-1)  # [query]
    other = draw.scatter(1, predicted[:, None], -1.0).argmax(-1)
    logits = effect(added(model, layer, head_out))[0].float().cpu()  # [head query key]
    mean = (logits * seen).sum(-1) / seen.sum(-1)
    taken = [mean - logits.gather(-1, at.expand(len(logits), -1)[..., None])[..., 0] for at in (predicted, other)]
    later = seen.sum(-1) > 1
    later[:SKIPPED] = False
    return taken[0][:, later].mean(-1), taken[1][:, later].mean(-1)
