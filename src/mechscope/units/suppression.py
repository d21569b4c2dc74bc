"""Copy suppression: heads that find in the prompt what is being predicted, and take part of it back.

Where the stream before the head already predicts a token of the prompt, the head attends to that token and lowers its
logit (McDougall et al. 2023, arXiv:2310.04625). Three measures of a head, each of another part of that sentence:

    OV    the share of tokens whose own logit is among the lowest twentieth where the head attends to them alone
    QK    percentile of the token attended to most, by the logit lens before the head, among the tokens seen
    CSPA  1 - KL(clean | head preserved in part) / KL(clean | head ablated to its mean), after the paper's ablation
          that preserves copy suppression alone:

        kept[q k]     token k is among the twentieth of the tokens seen that the lens predicts most at q, and what the
                      head writes for it has a negative part along g_k, the direction of its own logit
        head_out[q] = sum over k of  pattern[q k] (mean + kept[q k] ((o_k - mean) . g_k) g_k)

o_k is what attending to k writes, the mean is that over what the head attends to. A head that does copy suppression and
nothing else keeps all of its effect; the control does the same with the tokens' directions exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mechscope import store
from mechscope.causal.evidence import Column, Evidence, Row, Score, Scores
from mechscope.errors import UnitsError
from mechscope.models.stream import contexts
from mechscope.tasks.intervals import interval, mean_interval, resampled
from mechscope.units.effective import effective_ov
from mechscope.units.written import from_keys, gain, prove_keys

if TYPE_CHECKING:
    from mechscope.models.model import Model

LOWEST, CANDIDATES, DRAWS = 0.05, 5, 1000
SAMPLE = 512
"""How many of the text's tokens the OV evidence is measured on, at most."""


def copy_suppression(
    model: Model,
    texts: Sequence[str] | Tensor,
    heads: Sequence[tuple[int, int]] | None = None,
    share: float = 0.05,
    context: int = 64,
    rows: int = 32,
    seed: int = 0,
) -> Evidence:
    """This is how far heads are copy suppression: by OV, by QK, and by the ablation that preserves it alone.

    texts: text, cut into contexts, or ids [row pos]; the first `rows` of them are used. heads: which, (layer, head); by
    default the five with the most OV evidence. share: of the tokens seen, how many the ablation may keep, at least one.
    Costs five forwards a head, and one of a single position for each layer and token for the OV evidence.

    Raises UnitsError where there is no text, the heads are not there, or a gate stands after attention.

    >>> copy_suppression(model, texts, [(4, 4)])["4.4"]  # doctest: +SKIP
    (0.71, 0.66, 0.75)
    """
    ids = _rows(model, texts, context, rows)
    suppressed = _own_logits(model, ids, seed)
    if heads is None:
        order = suppressed.flatten().argsort(descending=True)[:CANDIDATES].tolist()
        heads = [divmod(at, model.n_heads) for at in order]
    for layer, head in heads:
        if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
            raise UnitsError(f"no head {layer}.{head}: {model.name} has {model.n_layers} layers of {model.n_heads}")
    save = [f"blocks.{layer}.{name}" for layer in {at for at, _ in heads} for name in ("pattern", "v", "resid_pre")]
    save += [f"blocks.{layer}.head_out" for layer in {at for at, _ in heads}]
    last = f"blocks.{model.n_layers - 1}.resid_post"
    with torch.no_grad():
        clean = model.run(ids, save=[*save, last])
        prove_keys(model, sorted({layer for layer, _ in heads}), clean)
    toward = directions(model, ids, clean[last])
    table: list[Row] = []
    shares: dict[str, float] = {}
    kept: dict[str, Tensor] = {}
    for layer, head in heads:
        name = f"{layer}.{head}"
        predicted = predicted_by_lens(model, clean[f"blocks.{layer}.resid_pre"], ids)
        looked = _percentiles(clean[f"blocks.{layer}.pattern"][:, head], predicted)
        whole = _divergence(model, ids, clean, layer, head, None)
        for control in (False, True):
            along = toward.roll(1, 1) if control else toward
            instead = Preserved(along, predicted.roll(1, 2) if control else predicted, share)
            lost = _divergence(model, ids, clean, layer, head, instead)
            kept[f"{name}{' exchanged' if control else ''}"] = torch.stack([lost, whole])
            preserved = _share(lost, whole)
            label = f"{name}, tokens exchanged" if control else name
            if preserved is not None and not control:
                shares[name] = preserved[0]
            ov = None if control else _counted(float(suppressed[layer, head]))
            qk = None if control else (float(looked.mean()), *mean_interval(looked.tolist()))
            table.append(Row(label, (preserved, ov, qk), control=control))
    columns = (
        Column("CSPA", "share", "of the head's effect that is left when only copy suppression is preserved"),
        Column("OV", "share", "of tokens that the head lowers among the most where it attends to them alone"),
        Column("QK", "share", "percentile of what the head attends to, by what is predicted", {"chance": 0.5}),
    )
    best = max(shares, key=lambda name: shares[name], default=None)
    answer = "no head that was looked at has an effect here"
    if best is not None:
        answer = f"head {best} keeps {shares[best]:.0%} of its effect as copy suppression"
    options = {"heads": [list(at) for at in heads], "share": share, "context": context, "rows": rows, "seed": seed}
    method = {"method": "copy_suppression", "options": options, "versions": store.manifest()}
    return Evidence(
        question=f"copy suppression in {model.name}",
        answer=answer,
        tables=(Scores("heads", columns, tuple(table)),),
        choices={
            "text": f"{len(ids)} rows of {ids.shape[1]} tokens",
            "ablation": "what the head writes on average for what it attends to",
            "kept": f"the {share:.0%} of the tokens seen that the logit lens before the head predicts most",
            "control": "the same with each token's direction and prediction exchanged for its neighbour's",
            "heads": "given, or those with the most OV evidence",
        },
        provenance={**model.provenance(), **method},
        cost={"forwards": 1 + 3 * len(heads)},
        tensors=kept,
    )


class Preserved:
    """This is what the ablation keeps: directions g [row key d_model], predictions [row query key], and how many."""

    def __init__(self, along: Tensor, predicted: Tensor, share: float):
        self.along = along
        seen = torch.ones(predicted.shape[1:], dtype=torch.bool, device=predicted.device).tril()
        ranked = predicted.masked_fill(~seen, -math.inf).sort(-1, descending=True).values
        many = (share * seen.sum(-1)).ceil().long().clamp(min=1) - 1
        self.among = (predicted >= ranked.gather(-1, many.expand(len(ranked), -1)[..., None])) & seen

    def parts(self, wrote: Tensor, mean: Tensor) -> Tensor:
        """This is the size along g of what is kept for each query and key [row query key]."""
        lowering = torch.einsum("rkd, rkd -> rk", wrote, self.along) < 0
        size = torch.einsum("rkd, rkd -> rk", wrote - mean, self.along)
        return self.among * (lowering * size)[:, None]


@torch.no_grad()
def _divergence(model: Model, ids: Tensor, clean, layer: int, head: int, instead: Preserved | None) -> Tensor:
    """This is KL(clean | the head ablated, or preserved in part), mean over positions [row]."""
    pattern, value = clean[f"blocks.{layer}.pattern"], clean[f"blocks.{layer}.v"]
    even = torch.ones_like(pattern[:, :, 0])
    wrote = from_keys(model, layer, even, value)[:, head]  # [row key d_model], where it is attended to with weight 1
    weight = pattern[:, head].to(wrote)
    attended = weight.sum(1)
    mean = (attended[..., None] * wrote).sum((0, 1)) / attended.sum()
    new = weight.sum(-1, keepdim=True) * mean
    if instead is not None:
        new = new + torch.einsum("rqk, rkd -> rqd", weight * instead.parts(wrote, mean), instead.along)
    change = (new - weight @ wrote) * gain(model, layer, clean[f"blocks.{layer}.head_out"])
    if not change.any():
        return torch.zeros(len(ids))
    out = model.run(ids, edits={f"blocks.{layer}.attn_out": lambda x: x + change})
    assert clean.logits is not None and out.logits is not None
    before, after = clean.logits.log_softmax(-1), out.logits.log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean(-1).cpu()


def _share(lost: Tensor, whole: Tensor) -> Score | None:
    """This is 1 - lost / whole with its bootstrap interval over rows; None for a head without an effect."""
    if float(whole.mean()) < 1e-7:
        return None
    draws = resampled([[i] for i in range(len(whole))], len(whole), DRAWS, seed=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = interval(1 - (draws @ lost.double().numpy()) / (draws @ whole.double().numpy()))
    return 1 - float(lost.mean() / whole.mean()), float(low), float(high)


def _counted(share: float) -> Score:
    return share, float("nan"), float("nan")


def _rows(model: Model, texts: Sequence[str] | Tensor, context: int, rows: int) -> Tensor:
    if isinstance(texts, Tensor):
        return texts[:rows].to(model.device)
    found = []
    for row in contexts(model, texts, context):
        if len(row) == context:
            found.append(row)
        if len(found) == rows:
            break
    if not found:
        raise UnitsError(f"no text of {context} tokens: give more of it, or a smaller context=")
    return torch.tensor(found, device=model.device)


def _own_logits(model: Model, ids: Tensor, seed: int) -> Tensor:
    """This is the share of the text's tokens [layer head] whose own logit is among the lowest by the effective OV."""
    tokens = ids.unique().cpu()
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    tokens = tokens[order[:SAMPLE]].to(ids)
    logits = effective_ov(model, tokens, tokens)
    own = logits.diagonal(0, 2, 3)[..., None]
    below = (logits < own).float().sum(-1) + 0.5 * ((logits == own).float().sum(-1) - 1)
    return (below <= LOWEST * (len(tokens) - 1)).float().mean(-1)


def predicted_by_lens(model: Model, stream: Tensor, ids: Tensor) -> Tensor:
    """This is what the logit lens gives each of a row's tokens at each position [row query key]."""
    with torch.no_grad():
        return model.readout.norm(stream) @ model.readout.direction(ids).mT


def _percentiles(pattern: Tensor, predicted: Tensor) -> Tensor:
    """This is, for each row, the mean percentile by prediction of what is attended to most [row]."""
    seen = torch.ones(predicted.shape[1:], dtype=torch.bool, device=predicted.device).tril()
    mine = predicted.gather(-1, pattern.argmax(-1, keepdim=True))
    below = ((predicted < mine).float() + 0.5 * (predicted == mine)) * seen
    return ((below.sum(-1) - 0.5) / (seen.sum(-1) - 1).clamp(min=1))[:, 1:].mean(-1).cpu()


def directions(model: Model, ids: Tensor, stream: Tensor) -> Tensor:
    """This is the unit direction of the stream along which each token's own logit rises most [row pos d_model]."""
    tokens, where = ids.unique(return_inverse=True)
    at = stream[:1, -1].expand(len(tokens), -1)
    part = torch.zeros_like(at, requires_grad=True)
    with torch.enable_grad():
        rise = (model.readout.frozen(at)(part) * model.readout.direction(tokens)).sum()
        (found,) = torch.autograd.grad(rise, part)
    return torch.nn.functional.normalize(found, dim=-1)[where]
