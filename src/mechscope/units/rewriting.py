"""Erasing and updating a fact through its knowledge neurons, by their values alone and without any training.

    erase     V_n = 0                        for the fact's neurons n, at every position
    update    V_n = V_n - a t + b t'         t the old answer's row of the unembedding, t' the new one's

V_n is what neuron n writes. Dai et al. 2022 (arXiv:2104.08696, section 5), with a = 1 and b = 8 and the word embeddings
of BERT, which are its unembedding too. Success is that the new answer comes first, over the fact's wordings. Beside it
stand as many random neurons of the same layers, rewritten alike, and the other facts: which of them keep their answer.
The weights are left alone: the change is made to what the MLP writes, which comes to the same.
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
from mechscope.models.mlps import norm_after
from mechscope.tasks.intervals import mean_interval
from mechscope.units.knowing import Neuron, knowledge_neurons, one_token, random_neurons
from mechscope.units.which import neuron_sites, which_unit

if TYPE_CHECKING:
    from mechscope.models.model import Model


def knowledge_edits(
    model: Model,
    facts: Mapping[str, Sequence[str]],
    answers: Mapping[str, str | int],
    new: Mapping[str, str | int],
    away: float = 1.0,
    towards: float = 8.0,
    controls: int = 5,
    seed: int = 0,
    **options: Any,
) -> Evidence:
    """This erases each fact through its own neurons, and updates it to another answer, one fact at a time.

    facts: name -> wordings; answers, new: name -> the answer, and the one it is to become. away, towards: a and b
    above. Intervals are over facts. `options` go to `knowledge_neurons`. Raises UnitsError where the answer and the new
    one are the same, where no fact has neurons, and where a norm stands after an MLP, so that values do not add up.

    >>> knowledge_edits(model, {"Tim": ["Tim lives in"]}, {"Tim": " Paris"}, {"Tim": " Rome"})  # doctest: +SKIP
    """
    started = time.perf_counter()
    for layer, block in enumerate(model.anatomy.layers()):
        if "mlp_post" not in block.places:
            raise UnitsError(f"layer {layer} of {model.name} has no values to rewrite: {block.absent['mlp_post']}.")
        if norm_after(block) is not None:
            raise UnitsError(f"a norm stands after the MLP of layer {layer}: what its neurons write does not add up")
    found = {name: knowledge_neurons(model, wordings, answers[name], **options) for name, wordings in facts.items()}
    wanted = {name: one_token(model, new[name]) for name in facts}
    for name, fact in found.items():
        if wanted[name] == fact.answer:
            raise UnitsError(f"the new answer of {name!r} is the one it has; give another in new=")
    asked = Asked(model, facts, {name: fact.answer for name, fact in found.items()})
    generator = torch.Generator().manual_seed(seed)
    measured: dict[str, list[list[float]]] = {"own": [], "random": []}
    rows = []
    for name, fact in found.items():
        if not fact.neurons:
            continue
        towards_new = asked.turn(fact.answer, wanted[name], away, towards)
        own = asked.both(name, wanted[name], fact.neurons, towards_new)
        drawn = [asked.both(name, wanted[name], random_neurons(fact, generator), towards_new) for _ in range(controls)]
        measured["own"].append(own)
        measured["random"].append([sum(column) / controls for column in zip(*drawn)])
        said = ", ".join(f"{a}.{b}" for a, b in fact.neurons)
        rows.append(Row(name, tuple((x, float("nan"), float("nan")) for x in own), note=said))
    if not rows:
        raise UnitsError("no fact has neurons that its wordings share; lower agree= or share=, or add wordings")
    summary = [
        Row(label, tuple(_over(column) for column in zip(*measured[key])), control=key == "random")
        for key, label in (("own", "the fact's own"), ("random", "random, same layers"))
        if measured[key] and measured[key][0]
    ]
    columns = (
        Column("erased", "share", "change of the answer's probability with the neurons' values at 0"),
        Column("answer lost", "share", "of the wordings that gave the answer, that no longer do, after erasing"),
        Column("others kept", "share", "of the other facts' right wordings, that keep their answer, after erasing"),
        Column("updated", "share", "of the wordings, whose first token is the new answer, after updating"),
        Column("others kept, updating", "share", "the same of the other facts, after updating"),
    )
    success, chance = summary[0].scores[3], summary[-1].scores[3]
    assert success is not None and chance is not None
    return Evidence(
        f"erasing and updating {len(rows)} facts in {model.name} through their knowledge neurons",
        f"updating a fact's own neurons gives the new answer for {success[0]:.0%} of its wordings, random ones "
        f"{chance[0]:.0%}",
        (Scores("mean over facts", columns, tuple(summary)), Scores("by fact", columns, tuple(rows))),
        {
            "unit": which_unit(model, neuron_sites(model)),
            "edit": f"neurons' values to 0; less {away:g} of the old answer's row, plus {towards:g} of the new one's",
            "positions": "all",
        },
        {
            **model.provenance(),
            **{"method": "knowledge_edits", "versions": store.manifest()},
            "options": {"away": away, "towards": towards, "controls": controls, "seed": seed, **options},
            "facts": {name: list(wordings) for name, wordings in facts.items()},
            "new": wanted,
        },
        {"seconds": time.perf_counter() - started},
    )


@dataclass
class Asked:
    """This is all wordings of all facts, what each gives as the model is, and what they give with values rewritten."""

    model: Model
    facts: Mapping[str, Sequence[str]]
    answers: Mapping[str, int]

    def __post_init__(self) -> None:
        self.owner, ids = [], []
        for name, wordings in self.facts.items():
            for row in self.model.ids(list(wordings)):
                self.owner.append(name)
                ids.append(row)
        lengths: dict[int, list[int]] = {}
        for i, row in enumerate(ids):
            lengths.setdefault(len(row), []).append(i)
        self.groups = [(members, torch.tensor([ids[i] for i in members])) for members in lengths.values()]
        self.right = torch.tensor([self.answers[name] for name in self.owner])
        self.before = self.predicted(lambda: None)

    def turn(self, old: int, new: int, away: float, towards: float) -> Tensor:
        """This is what is added to a value that is to give another answer [d_model]."""
        was, to_be = self.model.readout.direction([old, new])
        return towards * to_be - away * was

    def both(self, name: str, new: int, neurons: Sequence[Neuron], turn: Tensor) -> list[float]:
        """This is a fact's five measures, in the order of the table's columns, for neurons rewritten in both ways."""
        mine = torch.tensor([owner == name for owner in self.owner])
        knew = self.before.argmax(-1) == self.right
        erased = self.predicted(lambda: self.rewritten(neurons, None))
        updated = self.predicted(lambda: self.rewritten(neurons, turn))
        answer = self.answers[name]
        change = (erased[mine, answer] - self.before[mine, answer]) / self.before[mine, answer]
        kept = [
            _share((p.argmax(-1) == self.right)[~mine & knew].float()) if bool((~mine & knew).any()) else float("nan")
            for p in (erased, updated)
        ]
        lost = _share((erased.argmax(-1) != self.right)[mine & knew].float()) if bool((mine & knew).any()) else 0.0
        success = _share((updated.argmax(-1) == new)[mine].float())
        return [float(change.mean()), lost, kept[0], success, kept[1]]

    def predicted(self, edits: Any) -> Tensor:
        """This is the probabilities after every wording [wording d_vocab], under edits made anew for every run."""
        out = torch.zeros(len(self.owner), self.model.d_vocab)
        with torch.no_grad():
            for members, ids in self.groups:
                out[members] = self.model.run(ids, edits=edits()).logits[:, -1].float().softmax(-1).cpu()
        return out

    def rewritten(self, neurons: Sequence[Neuron], turn: Tensor | None) -> dict[str, Any]:
        """This is edits that act as the neurons' values set to 0 would, or (turn) with that vector added to each."""
        blocks, edits = self.model.anatomy.layers(), {}
        by_layer: dict[int, list[int]] = {}
        for layer, n in neurons:
            by_layer.setdefault(layer, []).append(n)
        for layer, index in by_layer.items():
            prefix, held = blocks[layer].prefix, {}

            def look(post: Tensor, index: list[int] = index, held: dict[str, Tensor] = held) -> Tensor:
                held["sum"] = post[..., index].sum(-1, keepdim=True)
                if turn is not None:
                    return post
                post = post.clone()
                post[..., index] = 0.0
                return post

            def add(out: Tensor, held: dict[str, Tensor] = held, scale: float = blocks[layer].places["mlp_out"].scale):
                assert turn is not None
                return out + scale * held["sum"] * turn.to(out)

            edits[f"{prefix}.mlp_post"] = unchanged(look)
            if turn is not None:
                edits[f"{prefix}.mlp_out"] = unchanged(add)
        return edits


def _share(values: Tensor) -> float:
    return float(values.mean())


def _over(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), *mean_interval(list(values))


__all__ = ["knowledge_edits"]
