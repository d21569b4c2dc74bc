"""Neurons that regulate confidence: entropy neurons, and neurons that follow how frequent tokens are.

An entropy neuron writes with a large norm where the unembedding reads next to nothing, so that no logit gains; but the
final norm divides by the size of the stream, and all logits shrink:

    null share(n)     |V0' w| / |w|, V0 the k directions of the stream that the unembedding reads least
    logit variance(n) variance over tokens of the unembedding's cosine with w
    total effect      entropy where the neuron is fixed at its mean, less the entropy of the run as it is
    direct effect     the same with the final norm's scale held as it is in the run

A token-frequency neuron moves each logit in proportion to the logarithm of how often the token occurs:

    frequency(n)      correlation over tokens of (unembedding . w) with log count

w is what the neuron adds to the stream for an activation of 1, the unembedding's rows are taken through the final
norm's gain. Stolfo et al. 2024 (arXiv:2406.16254); Gurnee et al. 2024 (arXiv:2401.12181) for the entropy neurons.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import store
from mechscope.causal.evidence import Column, Evidence, Row, Scores
from mechscope.edits import unchanged
from mechscope.errors import UnitsError
from mechscope.models.experts import neurons_written
from mechscope.models.stream import contexts
from mechscope.tasks.intervals import mean_interval
from mechscope.units.harvesting import batches
from mechscope.units.which import neuron_site, which_unit

if TYPE_CHECKING:
    from mechscope.models.model import Model


@dataclass(frozen=True, eq=False)
class Written:
    """This is what a layer's neurons write, by the unembedding: each [neuron]. `norm` is the length of what is written.

    null: the share of it that the unembedding hardly reads; variance: of its cosine with tokens' rows; frequency: its
    correlation with the logarithm of token counts (NaN without counts).
    """

    layer: int
    norm: Tensor
    null: Tensor
    variance: Tensor
    frequency: Tensor


def written(model: Model, layer: int, k: int | None = None, counts: Tensor | None = None) -> Written:
    """This reads the weights alone: what each neuron of a layer does to logits if it reached them directly.

    k: how many directions count as unread, a hundredth of d_model unless given, and all that are not read at all.
    counts: how often each token occurs [d_vocab]. Raises WeightsError where the MLP has no neurons to read.

    >>> written(model, 5).null.topk(3).indices  # doctest: +SKIP
    tensor([ 17, 301,  44])
    """
    values = neurons_written(model, layer).rows
    rows = unembedding(model)
    squared, directions = torch.linalg.eigh((rows.T @ rows).double())
    unread = int((squared < 1e-10 * squared[-1]).sum())
    k = max(unread, round(0.01 * model.d_model), 1) if k is None else k
    norm = values.norm(dim=1)
    null = (values.double() @ directions[:, :k]).norm(dim=1) / norm.clamp_min(1e-12)
    logits = values @ rows.T
    cosine = logits / (norm[:, None] * rows.norm(dim=1).clamp_min(1e-12)).clamp_min(1e-12)
    frequency = torch.full_like(norm, float("nan"))
    if counts is not None:
        log = (counts.double() + 1).log()
        frequency = _correlation(logits.double(), log - log.mean()).float()
    return Written(layer, norm, null.float(), cosine.var(1), frequency)


def confidence_neurons(
    model: Model,
    texts: Iterable[str] | Tensor,
    layer: int = -1,
    top: int = 6,
    k: int | None = None,
    controls: int = 6,
    context: int = 64,
    rows: int = 32,
    seed: int = 0,
) -> Evidence:
    """This is a layer's likeliest entropy and token-frequency neurons, and what fixing each does to the entropy.

    layer: the last unless given. The `top` neurons by null share and by (absolute) frequency correlation are each
    fixed at their mean over `rows` contexts of the texts, with the final norm free (total) and with its scale held
    (direct); intervals are over contexts. `controls` neurons drawn at random are treated alike. Raises UnitsError for
    a layer that is not there and for an empty corpus.

    >>> print(confidence_neurons(model, texts))  # doctest: +SKIP
    """
    started = time.perf_counter()
    if not -model.n_layers <= layer < model.n_layers:
        raise UnitsError(f"{model.name} has no layer {layer}; it has {model.n_layers}.")
    layer %= model.n_layers
    held = next((rows_ for rows_ in batches(contexts(model, texts, context), rows)), None)
    if held is None:
        raise UnitsError("there is no text to run: the corpus is empty")
    ids = torch.tensor(held)
    counts = torch.bincount(ids.flatten(), minlength=model.d_vocab)
    said = written(model, layer, k, counts)
    chosen = dict.fromkeys(said.null.topk(min(top, len(said.null))).indices.tolist(), "null space")
    for n in said.frequency.abs().nan_to_num().topk(min(top, len(said.null))).indices.tolist():
        chosen.setdefault(n, "token frequency")
    others = [n for n in range(len(said.null)) if n not in chosen]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    chosen |= {others[i]: "random" for i in order[:controls].tolist()}
    effects, names = Effects(model, ids, layer), neurons_written(model, layer).names
    table = []
    for n, why in chosen.items():
        total, direct = effects.of(n)
        scores = [_point(float(x[n])) for x in (said.null, said.variance, said.frequency, said.norm)]
        scores += [_over(total), _over(direct)]
        table.append(Row(f"{layer}.{names[n]}", tuple(scores), group=why, control=why == "random"))
    columns = (
        Column("null share", "share", "of what is written, in the directions that the unembedding reads least"),
        Column("logit variance", "", "of the cosine with tokens' rows"),
        Column("frequency", "", "correlation of its logits with the logarithm of token counts"),
        Column("norm", "", "of what is written"),
        Column("total effect", "nats", "entropy with the neuron fixed at its mean, less the run's"),
        Column("direct effect", "nats", "the same with the final norm's scale held"),
    )
    best = max(table, key=lambda row: abs((row.scores[4] or (0.0,))[0]) - abs((row.scores[5] or (0.0,))[0]))
    through = (best.scores[4] or (0.0,))[0] - (best.scores[5] or (0.0,))[0]
    return Evidence(
        f"neurons of layer {layer} that regulate confidence in {model.name}",
        f"neuron {best.label} works most through the final norm: {through:+.3f} nats of entropy, that it would not "
        "change otherwise",
        (Scores(f"neurons of layer {layer}", columns, tuple(table)),),
        {
            "unit": which_unit(model, effects.site),
            "ablation": "mean over the text",
            "text": f"{len(ids)} contexts of {ids.shape[1]} tokens",
            "k": str(k or ""),
        },
        {
            **model.provenance(),
            **{"method": "confidence_neurons", "versions": store.manifest()},
            "options": {"layer": layer, "top": top, "k": k, "controls": controls, "context": context, "rows": rows},
        },
        {"seconds": time.perf_counter() - started, "forward_equivalents": 1.0 + len(chosen)},
    )


class Effects:
    """This is what fixing a neuron of `layer` at its mean does to the entropy of every prediction, by context."""

    def __init__(self, model: Model, ids: Tensor, layer: int):
        self.model, self.ids, self.site = model, ids, neuron_site(model, layer)
        self.last = f"blocks.{model.n_layers - 1}.resid_post"
        experts = self.site.endswith("expert_post")
        weights = [self.site.replace("expert_post", "expert_weight")] if experts else []
        with torch.no_grad():
            out = model.run(ids, save=[self.site, self.last, *weights])
        post, self.stream = out[self.site], out[self.last]
        if experts:  # an expert's neuron has a value on the tokens that it was sent, and its mean is over those
            sent = (out[weights[0]] != 0).sum((0, 1)).clamp_min(1)
            self.mean = (post.sum((0, 2)) / sent[:, None]).flatten()
        else:
            self.mean = post.mean((0, 1))
        self.entropy = _entropy(out.logits)
        self.held, self.final = model.readout.frozen(self.stream), model.readout.norm(self.stream)

    @torch.no_grad()
    def of(self, neuron: int) -> tuple[Tensor, Tensor]:
        """This is the total and the direct effect on the entropy [context], in nats."""

        def fixed(post: Tensor) -> Tensor:  # unchanged: a neuron that never fires is at its mean already
            post = post.clone()
            unit = divmod(neuron, post.shape[-1])
            (post[:, unit[0]] if post.dim() == 4 else post)[..., unit[1]] = self.mean[neuron]
            return post

        out = self.model.run(self.ids, save=self.last, edits={self.site: unchanged(fixed)})
        direct = self.model.readout.unembed(self.final + self.held(out[self.last] - self.stream))
        return tuple((_entropy(logits) - self.entropy).mean(1) for logits in (out.logits, direct))  # type: ignore


def unembedding(model: Model) -> Tensor:
    """This is the unembedding's rows by the last stream [d_vocab d_model], up to one scale: norm and gain included."""
    eye = torch.eye(model.d_model, device=model.device, dtype=model.dtype)
    start = torch.ones(model.d_model, device=model.device, dtype=model.dtype)
    start[1::2] = -1.0
    with torch.no_grad():
        through = model.readout.frozen(start.expand_as(eye))(eye)
        return (model.readout.scale * through @ model.readout.weight.T.to(through)).T.float().cpu()


def _entropy(logits: Tensor) -> Tensor:
    log = logits.float().log_softmax(-1)
    return -(log.exp() * log).sum(-1)


def _correlation(rows: Tensor, with_: Tensor) -> Tensor:
    rows = rows - rows.mean(1, keepdim=True)
    return rows @ with_ / (rows.norm(dim=1) * with_.norm()).clamp_min(1e-12)


def _point(value: float) -> tuple[float, float, float]:
    return value, float("nan"), float("nan")


def _over(values: Tensor) -> tuple[float, float, float]:
    return float(values.mean()), *mean_interval(values.tolist())
