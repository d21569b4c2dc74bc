"""Neurons that predict one token: those that write towards it, and those that bring it back when they are patched.

    congruence(n, t) = w_n . (u_t - mean over tokens u)         how far neuron n raises t's logit above the mean logit

w_n is what the neuron adds to the stream for an activation of 1, u_t the token's row of the unembedding, taken through
the final norm's gain. Miller and Neo 2023 ("We Found An Neuron in GPT-2") take the product with u_t itself; a logit
that every token gains says nothing, so the mean is taken away here. Controls: the same with the entries of u_t in
another order (what sizes alone would give: the greatest of any neuron is the threshold), and the most congruent neuron
of other tokens (whether this token's is anything out of the ordinary).

    patching(n) = what the metric gains where n alone has its clean activation, at the last position of the corrupt run

Every neuron of the layers asked for is patched in turn, as in the same post. Control: random changes as large, at some
of the same neurons; a neuron is above it where the low end of its interval is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import store
from mechscope.causal.evidence import Column, Evidence, Row, Scores
from mechscope.causal.sweep import patch_sweep
from mechscope.causal.table import recorded
from mechscope.errors import UnitsError
from mechscope.models.experts import neurons_written
from mechscope.tasks.intervals import mean_interval
from mechscope.units.confidence import unembedding
from mechscope.units.knowing import one_token
from mechscope.units.which import which_unit

if TYPE_CHECKING:
    from mechscope.models.model import Model
    from mechscope.tasks import Task

MILLER_NEO = "Miller and Neo 2023, We Found An Neuron in GPT-2"


def token_congruence(
    model: Model,
    token: str | int,
    layers: Sequence[int] | None = None,
    top: int = 10,
    controls: int = 20,
    seed: int = 0,
) -> Evidence:
    """This ranks all neurons by how far what they write raises one token's logit, by the weights alone.

    token: its id, or text that is one token. layers: all unless given. top: how many neurons are listed; `tensors`
    has all, [neuron] by layer. controls: how many shuffles of the token's row, and how many other tokens. Raises
    UnitsError for text that is not one token and a layer that is not there, WeightsError for an MLP without neurons.

    >>> token_congruence(model, " an").tables[0].rows[0].label  # doctest: +SKIP
    '31.892'
    """
    started = time.perf_counter()
    answer = one_token(model, token)
    chosen = _layers(model, layers)
    rows = unembedding(model)
    rows = rows - rows.mean(0)
    generator = torch.Generator().manual_seed(seed)
    own = rows[answer]
    shuffled = torch.stack([own[torch.randperm(len(own), generator=generator)] for _ in range(controls)])
    others = torch.randperm(len(rows), generator=generator)
    others = others[others != answer][:controls]
    said, names, best, ranks, sizes = {}, [], [], [], {"shuffled": [], "others": []}
    for layer in chosen:
        written = neurons_written(model, layer)
        logits = written.rows @ rows.T
        said[str(layer)] = logits[:, answer].clone()
        names += [f"{layer}.{name}" for name in written.names]
        best.append(logits[:, answer])
        ranks.append((logits > logits[:, answer, None]).sum(1))
        sizes["shuffled"].append((written.rows @ shuffled.T).amax(0))
        sizes["others"].append(logits[:, others].amax(0))
    score, rank = torch.cat(best), torch.cat(ranks)
    chance, usual = (torch.stack(sizes[name]).amax(0) for name in ("shuffled", "others"))
    threshold = float(chance.max())
    order = score.argsort(descending=True)[:top].tolist()
    table = [Row(names[n], (_point(float(score[n])), _point(float(rank[n]) + 1))) for n in order]
    table += [
        Row(
            "shuffled row", (_over(chance), None), control=True, note=f"greatest of any neuron, at most {threshold:.3g}"
        ),
        Row("another token", (_over(usual), None), control=True, note="greatest of any neuron for that token"),
    ]
    above = int((score > threshold).sum())
    shown = repr(model.strings([answer])[0]) if model.tokenizer is not None else str(answer)
    columns = (
        Column("congruence", "logits", "rise of the token's logit over the mean logit, for an activation of 1"),
        Column("rank of the token", "", "among all tokens, by what the neuron raises; 1 is the first"),
    )
    return Evidence(
        f"neurons of {model.name} congruent with {shown}",
        f"neuron {names[order[0]]} writes most towards {shown}, {float(score[order[0]]):.3g}; {above} of "
        f"{len(names):,} neurons are above {threshold:.3g}, the greatest of a shuffled row",
        (Scores("neurons", columns, tuple(table)),),
        {
            "unit": "an activation of 1 of what the down projection reads (in a gated MLP the product act(gate) * up)",
            "source": MILLER_NEO,
            "threshold": f"{threshold:.6g}: greatest of {controls} shuffles of the token's row",
        },
        {
            **model.provenance(),
            **{"method": "token_congruence", "versions": store.manifest()},
            "options": {"token": answer, "layers": chosen, "top": top, "controls": controls, "seed": seed},
        },
        {"seconds": time.perf_counter() - started, "forward_equivalents": 0.0},
        tensors=said,
    )


def neuron_patching(
    model: Model,
    task: Task,
    layers: Sequence[int] | None = None,
    top: int = 10,
    controls: int = 16,
    seed: int = 0,
) -> Evidence:
    """This patches every neuron's clean activation into the corrupt run, at the last position, and ranks what it gains.

    layers: all unless given; a run begins at the layer patched. top: how many neurons are listed; `tensors` has all.
    Effects are in the task's metric, a logit difference unless it says otherwise, and as a share of what the whole
    corruption costs; intervals are over prompts. Raises UnitsError for a layer that is not there, and what
    `causal.patch_sweep` raises.

    >>> neuron_patching(model, task, layers=[31]).tables[0].rows[0].label  # doctest: +SKIP
    '31.892'
    """
    started = time.perf_counter()
    chosen = _layers(model, layers)
    site = f"blocks.{{{','.join(map(str, chosen))}}}.mlp_post[pos=-1]"
    swept = patch_sweep(model, task, site, over=("layer", "unit"), controls=controls, seed=seed)
    name = task.metric.name
    mean, (low, high) = swept.mean(), swept.interval()
    drawn = swept.control[name] if name in swept.control else torch.zeros(0, len(task))
    drawn = drawn[drawn.isfinite().all(1)]  # a neuron that no pair moves has no change to be as large as
    ends = [mean_interval(row.tolist()) for row in drawn]
    threshold = max((abs(end) for pair in ends for end in pair), default=0.0)
    gap = swept.gap()
    size = mean.shape[1]
    order = mean.flatten().nan_to_num(float("-inf")).argsort(descending=True)[:top].tolist()
    table = []
    for at in order:
        row, n = divmod(at, size)
        value = float(mean[row, n]), float(low[row, n]), float(high[row, n])
        share = None if gap is None else (value[0] / gap, value[1] / gap, value[2] / gap)
        table.append(Row(f"{chosen[row]}.{n}", (value, share)))
    for i, (row, pair) in enumerate(zip(drawn, ends)):
        table.append(Row(f"random change {i + 1}", ((float(row.mean()), *pair), None), control=True))
    above = int((low > threshold).sum())
    columns = (
        Column("gain", swept.units.get(name, task.metric.unit), f"of {name}, with the neuron's clean activation"),
        Column("share", "share", "of the difference between the clean and the corrupt run"),
    )
    first = table[0]
    return Evidence(
        f"neurons of {model.name} that bring {task.name} back",
        f"neuron {first.label} alone brings back {first.scores[0][0]:+.3g} {columns[0].unit}"  # type: ignore[index]
        f"; {above} neurons are above the control's {threshold:.3g}",
        (Scores("neurons", columns, tuple(table)),),
        {
            **swept.choices,
            "unit": which_unit(model, site),
            "source": MILLER_NEO,
            "threshold": f"{threshold:.6g}: furthest end of the interval of {len(drawn)} random changes as large",
        },
        recorded(model, task, neuron_patching, layers=chosen, top=top, controls=controls, seed=seed),
        {**swept.cost, "seconds": time.perf_counter() - started},
        tensors={name: swept.effects[name].float()},
    )


def _layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    chosen = list(range(model.n_layers) if layers is None else layers)
    for layer in chosen:
        if layer not in range(-model.n_layers, model.n_layers):
            raise UnitsError(f"{model.name} has no layer {layer}; it has {model.n_layers}.")
    if not chosen:
        raise UnitsError("no layers to look at; leave out layers= for all")
    return [layer % model.n_layers for layer in chosen]


def _point(value: float) -> tuple[float, float, float]:
    return value, float("nan"), float("nan")


def _over(values: Tensor) -> tuple[float, float, float]:
    return float(values.mean()), *mean_interval(values.tolist())


__all__ = ["neuron_patching", "token_congruence"]
