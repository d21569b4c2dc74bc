"""Semantic induction heads: attending to the head of a relation, they raise its tail ("France ... Paris").

    raised(triple) = mean over positions q from the head token on of
                     attention[q, head token] * (what the head writes for it, on the tail's logit
                                                 - the same on the mean of the relation's other tails)
    control        the tail of another triple of the relation in the tail's place

A triple is of a text, and says where its head token stands (the last, of a word of several) and which token its tail
is; the tail need not stand in the text. A head is of this kind by what it raises and not by where it looks alone: one
that attends to every subject and writes nothing of the relation raises no tail over the others.
Source: Ren et al. 2024 (arXiv:2402.13055), for relations of a knowledge graph and dependencies of syntax.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import store
from mechscope.errors import UnitsError
from mechscope.units.kinds import Heads, Kind
from mechscope.units.written import from_keys, gain, prove_keys, to_logits

if TYPE_CHECKING:
    from mechscope.models.model import Model

REN = "Ren et al. 2024, arXiv:2402.13055"
FEWEST = 3
"""Of fewer tails of a relation, which is raised says little."""


@dataclass(frozen=True)
class Related:
    """This is a triple in a text: where its head token is, and its tail.

    text: a text or ids. head: the position of the head token, or words of the text, whose last token it is. tail: an
    id, or a word that follows a space. relation: its name.

    >>> Related("Paris is in", "Paris", "France", "country").relation
    'country'
    """

    text: str | tuple[int, ...]
    head: str | int
    tail: str | int
    relation: str = "relation"


@dataclass(frozen=True)
class Placed:
    """This is a triple as ids, the position of its head token, and the tail's id."""

    ids: tuple[int, ...]
    head: int
    tail: int


def semantic_induction_heads(model: Model, triples: Sequence[Related], seed: int = 0) -> Heads:
    """This is how much every head raises the tails of relations: "semantic-induction", and one kind for each relation.

    Texts of one length run together, once. Raises UnitsError for a relation of fewer than three tails, a tail of
    several tokens, a head token that is not there, and where a gate stands after attention.

    >>> semantic_induction_heads(model, triples)["semantic-induction: capital"].heads  # doctest: +SKIP
    [(2, 1)]
    """
    started = time.perf_counter()
    relations: dict[str, list[Placed]] = {}
    for triple in triples:
        relations.setdefault(triple.relation, []).append(_placed(model, triple))
    for relation, found in relations.items():
        tails = {one.tail for one in found}
        if len(tails) < FEWEST:
            raise UnitsError(f"relation {relation!r} has {len(tails)} tails; give triples of {FEWEST} tails or more")
    generator = torch.Generator().manual_seed(seed)
    values, controls = {}, {}
    for relation, found in relations.items():
        measured = [_raised(model, group, found, generator) for group in _of_one_length(found)]
        values[relation], controls[relation] = (torch.cat(part, -1) for part in zip(*measured))
    several = {"semantic-induction": list(relations)}
    several |= {f"semantic-induction: {relation}": [relation] for relation in relations}
    kinds = {}
    for name, members in several.items():
        of = [torch.cat([held[relation] for relation in members], -1) for held in (values, controls)]
        text = f"{of[0].shape[-1]} triples of {', '.join(members)}"
        kinds[name] = Kind(
            name,
            "what attending to the head token of a relation adds to the tail's logit, over the relation's other tails",
            REN,
            f"{text}; control: the tail of another triple of the relation",
            *of,
            least=0.0,
        )
    choices = {relation: f"{len(found)} triples" for relation, found in relations.items()}
    provenance = {**model.provenance(), "method": "semantic_induction_heads", "versions": store.manifest()}
    groups = sum(len(_of_one_length(found)) for found in relations.values())
    cost = {"seconds": time.perf_counter() - started, "runs": groups}
    return Heads(kinds, choices, provenance, cost)


def _of_one_length(found: list[Placed]) -> list[list[Placed]]:
    groups: dict[int, list[Placed]] = {}
    for one in found:
        groups.setdefault(len(one.ids), []).append(one)
    return list(groups.values())


@torch.no_grad()
def _raised(
    model: Model, group: list[Placed], relation: list[Placed], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """This is how much each head raises each triple's tail, and another of the relation's, [layer head triple]."""
    ids = torch.tensor([one.ids for one in group], device=model.device)
    head = torch.tensor([one.head for one in group], device=model.device)
    tails = torch.tensor(sorted({one.tail for one in relation}), device=model.device)
    right = (tails == torch.tensor([one.tail for one in group], device=model.device)[:, None]).int().argmax(1)
    step = torch.randint(1, len(tails), (len(group),), generator=generator).to(right)
    last, rows = f"blocks.{model.n_layers - 1}.resid_post", torch.arange(len(group), device=model.device)
    out = model.run(ids, save=["blocks.*.pattern", "blocks.*.v", "blocks.*.head_out", last])
    prove_keys(model, range(model.n_layers), out)
    effect = to_logits(model, out[last], tails.expand(len(group), -1))
    later = torch.arange(ids.shape[1], device=model.device) >= head[:, None]  # [row query]
    values, controls = [], []
    for layer in range(model.n_layers):
        pattern = out[f"blocks.{layer}.pattern"][rows, :, :, head] * later[:, None]  # [row head query]
        value = out[f"blocks.{layer}.v"][rows, :, head][:, :, None]
        whole = torch.ones_like(pattern[:, :, :1])
        wrote = from_keys(model, layer, whole, value)[:, :, 0]  # [row head d_model], attended to with weight 1
        added = torch.einsum("rhq, rhd -> rhqd", pattern.to(wrote), wrote)
        held = gain(model, layer, out[f"blocks.{layer}.head_out"])
        raised = effect(added * (held[:, None] if isinstance(held, Tensor) else held))  # [row head query tail]
        mean = (raised.sum(2) / later.sum(1)[:, None, None]).float().cpu()
        for into, which in ((values, right), (controls, (right + step) % len(tails))):
            own = mean.gather(-1, which.cpu()[:, None, None].expand(-1, mean.shape[1], 1))[..., 0]
            into.append((own - (mean.sum(-1) - own) / (len(tails) - 1)).T)
    return torch.stack(values), torch.stack(controls)


def _placed(model: Model, triple: Related) -> Placed:
    ids = model.ids(triple.text)[0] if isinstance(triple.text, str) else list(triple.text)
    head = triple.head if isinstance(triple.head, int) else _end_of(model, triple.text, triple.head)
    if not 0 <= head < len(ids):
        raise UnitsError(f"no position {head} in {triple.text!r}, which has {len(ids)} tokens")
    if isinstance(triple.tail, int):
        return Placed(tuple(ids), head, triple.tail)
    more = model.ids(f"{triple.text} {triple.tail}")[0] if isinstance(triple.text, str) else []
    if more[:-1] != ids:
        raise UnitsError(
            f"the tail {triple.tail!r} is not one token after {triple.text!r}; give the id of its first token"
        )
    return Placed(tuple(ids), head, more[-1])


def _end_of(model: Model, text: str | tuple[int, ...], words: str) -> int:
    """This is the position of the last token of words in a text."""
    if not isinstance(text, str) or words not in text:
        raise UnitsError(f"{words!r} does not stand in {text!r}; give the position of the head token")
    return len(model.ids(text[: text.index(words) + len(words)])[0]) - 1
