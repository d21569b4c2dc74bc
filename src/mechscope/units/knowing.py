"""Knowledge neurons: the MLP neurons that a fact's probability is attributed to, whatever the wording.

    attribution(n) = w_n * mean over steps k of  dP(answer) / dw_n  at  (k / m) w,    k = 1 ... m

w is a layer's activations at the last position, scaled as a whole from 0 to what they are; P is the probability of the
answer. For each wording the neurons above `share` of the greatest attribution are kept, then those that at least
`agree` of the wordings have in common. Dai et al. 2022 (arXiv:2104.08696), for decoders at the last position rather
than at a mask. That they are the fact's own is shown by suppressing and amplifying them, beside as many random neurons
of the same layers, and beside other facts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope import store
from mechscope.causal.evidence import Column, Evidence, Row, Scores
from mechscope.edits import unchanged
from mechscope.errors import UnitsError
from mechscope.tasks.intervals import mean_interval
from mechscope.units.which import neuron_site, neuron_sites, which_unit

if TYPE_CHECKING:
    from mechscope.models.model import Model

Neuron = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Knowledge:
    """This is a fact's `neurons` (layer, neuron), and attributions [wording layer neuron] to its answer.

    Neuron i of expert e is number e * d_mlp + i of its layer.
    """

    answer: int
    neurons: tuple[Neuron, ...]
    attributions: Tensor
    probabilities: Tensor


def knowledge_neurons(
    model: Model,
    wordings: Sequence[str],
    answer: str | int,
    steps: int = 20,
    share: float = 0.2,
    agree: float = 0.7,
) -> Knowledge:
    """This attributes the probability of `answer` after each wording of a fact, and keeps what the wordings share.

    answer: a token, or text that is one. Raises UnitsError for an answer that is not one token and without wordings.

    >>> knowledge_neurons(model, ["Tim lives in", "The home of Tim is"], " Paris").neurons  # doctest: +SKIP
    ((3, 17), (2, 301))
    """
    if not wordings:
        raise UnitsError("a fact needs at least one wording; give a list of prompts that the answer completes")
    token = one_token(model, answer)
    found, before = [], []
    for row in model.ids(list(wordings)):
        attribution, probability = _attributed(model, row, token, steps)
        found.append(attribution)
        before.append(probability)
    attributions = torch.stack(found)
    greatest = attributions.flatten(1).amax(1)[:, None, None]
    often = (attributions > share * greatest).float().mean(0)
    chosen = (often >= agree - 1e-6).nonzero().tolist()
    mean = attributions.mean(0)
    ranked = sorted(((layer, n) for layer, n in chosen), key=lambda at: -float(mean[at]))
    return Knowledge(token, tuple(ranked), attributions, torch.tensor(before))


def knowledge_effects(
    model: Model,
    facts: Mapping[str, Sequence[str]],
    answers: Mapping[str, str | int],
    controls: int = 5,
    seed: int = 0,
    **options: Any,
) -> Evidence:
    """This finds the neurons of each fact and says what suppressing (0) and amplifying (twice) them does to it.

    facts: name -> wordings; answers: name -> answer. Every number is a share of the answer's probability, over the
    fact's wordings: of the fact itself, of all other facts, and, as a control, with as many random neurons of the same
    layers, `controls` draws. Intervals are over facts. `options` go to `knowledge_neurons`.

    >>> knowledge_effects(model, {"Tim": ["Tim lives in"]}, {"Tim": " Paris"})  # doctest: +SKIP
    """
    started = time.perf_counter()
    found = {name: knowledge_neurons(model, wordings, answers[name], **options) for name, wordings in facts.items()}
    ids = {name: model.ids(list(wordings)) for name, wordings in facts.items()}
    changes: dict[str, list[tuple[float, float]]] = {"own": [], "others": [], "random": []}
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for name, fact in found.items():
        if not fact.neurons:
            continue
        rest = [other for other in found if other != name]
        own = _changed(model, ids[name], fact.answer, fact.neurons)
        changes["own"].append(own)
        others = [_changed(model, ids[other], found[other].answer, fact.neurons) for other in rest]
        drawn = [_changed(model, ids[name], fact.answer, random_neurons(fact, generator)) for _ in range(controls)]
        changes["random"].append(_mean(drawn))
        if others:
            changes["others"].append(_mean(others))
        rows.append(Row(name, tuple(_point(x) for x in own), note=", ".join(f"{a}.{b}" for a, b in fact.neurons)))
    if not rows:
        raise UnitsError("no fact has neurons that its wordings share; lower agree= or share=, or add wordings")
    summary = [
        Row(label, tuple(_over([pair[i] for pair in changes[key]]) for i in range(2)), control=key != "own")
        for key, label in (("own", "the fact's own"), ("random", "random, same layers"), ("others", "other facts"))
        if changes[key]
    ]
    columns = (
        Column("suppressed", "share", "change of the answer's probability with the neurons at 0"),
        Column("amplified", "share", "the same with the neurons doubled"),
    )
    own, control = summary[0].scores[0], summary[1].scores[0]
    assert own is not None and control is not None
    return Evidence(
        f"knowledge neurons of {len(rows)} facts in {model.name}",
        f"suppressing a fact's own neurons changes its probability by {own[0]:+.0%}, random ones by {control[0]:+.0%}",
        (Scores("mean over facts", columns, tuple(summary)), Scores("by fact", columns, tuple(rows))),
        {
            "unit": which_unit(model, neuron_sites(model)),
            "granularity": "neuron",
            "ablation": "zero, or twice",
            "positions": "last",
            "direction": "noising",
        },
        {
            **model.provenance(),
            "method": "knowledge_effects",
            "options": {"controls": controls, "seed": seed, **options},
            "facts": {name: list(wordings) for name, wordings in facts.items()},
            "versions": store.manifest(),
        },
        {"seconds": time.perf_counter() - started},
    )


def _attributed(model: Model, row: list[int], answer: int, steps: int) -> tuple[Tensor, float]:
    """This is the attribution [layer neuron] of one wording, and the answer's probability."""
    sites = [neuron_site(model, layer) for layer in range(model.n_layers)]
    with torch.no_grad():
        clean = model.run([row], save=[f"{site}[pos=-1]" for site in sites])
    probability = float(clean.logits[0, -1].float().softmax(-1)[answer])
    path = (torch.arange(1, steps + 1, device=model.device) / steps)[:, None]
    ids = torch.tensor([row] * steps)
    found = []
    for site in sites:
        key = f"{site}[pos=-1]"
        post = clean[key][0].flatten()

        def scaled(value: Tensor, post: Tensor = post) -> Tensor:
            return (path * post).view_as(value)

        out = model.run(ids, save=key, edits={key: unchanged(scaled)}, grad=lambda logits: _probability(logits, answer))
        assert out.grad is not None
        found.append((post * out.grad[key].flatten(1).mean(0)).float().cpu())
    widest = max(map(len, found))  # a layer of experts has more neurons than a dense one
    return torch.stack([torch.nn.functional.pad(each, (0, widest - len(each))) for each in found]), probability


def _probability(logits: Tensor, answer: int) -> Tensor:
    return logits[:, -1].float().softmax(-1)[:, answer].sum()


def _changed(model: Model, rows: list[list[int]], answer: int, neurons: Sequence[Neuron]) -> tuple[float, float]:
    """This is the relative change of the answer's probability with neurons suppressed and amplified, over wordings."""
    by_layer: dict[int, list[int]] = {}
    for layer, n in neurons:
        by_layer.setdefault(layer, []).append(n)

    def times(factor: float) -> Tensor:
        def edit(index: list[int]):
            def change(post: Tensor) -> Tensor:
                flat = post.flatten(1).clone()  # the neurons of all experts side by side, where there are experts
                flat[:, index] *= factor
                return flat.view_as(post)

            return unchanged(change)

        edits = {f"{neuron_site(model, layer)}[pos=-1]": edit(index) for layer, index in by_layer.items()}
        with torch.no_grad():
            outs = [model.run([row], edits=edits if factor != 1 else None) for row in rows]
        return torch.stack([out.logits[0, -1].float().softmax(-1)[answer] for out in outs])

    before = times(1.0)
    return tuple(float(((times(factor) - before) / before).mean()) for factor in (0.0, 2.0))  # type: ignore


def random_neurons(fact: Knowledge, generator: torch.Generator) -> list[Neuron]:
    """This is as many other neurons, of the same layers."""
    size, taken, drawn = fact.attributions.shape[-1], set(fact.neurons), []
    for layer, _ in fact.neurons:
        free = [n for n in range(size) if (layer, n) not in taken]
        chosen = layer, free[int(torch.randint(len(free), (), generator=generator))]
        taken.add(chosen)
        drawn.append(chosen)
    return drawn


def one_token(model: Model, answer: str | int) -> int:
    """This is the id of an answer that is one token, after a word where the tokenizer splits it off at a beginning.

    Raises UnitsError for text that is several.
    """
    if isinstance(answer, int):
        return answer

    def ids(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    alone, word = ids(answer), ids("The")
    after = ids(f"The{answer}")
    if len(alone) == 1:
        return alone[0]
    if after[:-1] == word:  # such as Llama's own, which puts a space before all text
        return after[-1]
    shown = ", ".join(map(repr, model.strings(alone)))
    raise UnitsError(f"the answer {answer!r} is {len(alone)} tokens here ({shown}); give one that is one token")


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return tuple(sum(pair[i] for pair in pairs) / len(pairs) for i in range(2))  # type: ignore


def _point(value: float) -> tuple[float, float, float]:
    return value, float("nan"), float("nan")


def _over(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), *mean_interval(list(values))
