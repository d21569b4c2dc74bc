"""Successor heads: attending to Monday, they write Tuesday; and the same of months, numbers and letters.

    succession score = share of a sequence's members whose successor has the highest logit among the sequence's members,
                       by the effective OV circuit (W_U OV MLP0(W_E))
    control          = the same where each member's successor is another member, drawn at random

Source: Gould et al. 2023 (arXiv:2312.09230).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import store
from mechscope.errors import UnitsError
from mechscope.tasks import words
from mechscope.tasks.choose import are_whole
from mechscope.units.effective import effective_ov
from mechscope.units.kinds import Heads, Kind

if TYPE_CHECKING:
    from mechscope.models.model import Model

SEQUENCES: dict[str, Sequence[str]] = {
    "days": words.DAYS,
    "months": words.MONTHS,
    "number words": words.NUMBER_WORDS,
    "numerals": words.NUMERALS,
    "letters": [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"],
}
CYCLES = {"days", "months"}
FEWEST = 4
"""Of a shorter run of members, which comes next says little."""


def successor_heads(
    model: Model, sequences: Mapping[str, Sequence[str] | Sequence[int]] | None = None, seed: int = 0
) -> Heads:
    """This is every head's succession score, over all sequences and for each: kinds "successor", "successor: days" ...

    sequences: {name: members in order}, words or ids; by default days, months, number words, numerals and letters. The
    longest run of members that are one token each is taken of each. A head is a successor head where it is right of
    more than half of the members. One forward of one position for each layer and member.

    Raises UnitsError where no sequence has four members in a row that are one token each.

    >>> successor_heads(model)["successor"].heads  # doctest: +SKIP
    [(5, 1)]
    """
    started = time.perf_counter()
    known: dict[str, list[int]] = {}
    for name, members in (SEQUENCES if sequences is None else sequences).items():
        run = member_ids(model, members)
        if len(run) >= FEWEST:
            known[name] = run
    if not known:
        asked = ", ".join(SEQUENCES if sequences is None else sequences)
        raise UnitsError(
            f"{model.name} has no {FEWEST} members in a row, one token each, of {asked}: give "
            "sequences={name: members}"
        )
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    controls: dict[str, Tensor] = {}
    for name, run in known.items():
        tokens = torch.tensor(run, device=model.device)
        top = effective_ov(model, tokens, tokens).argmax(-1)
        whole = name in CYCLES and len(run) == len(SEQUENCES[name])
        after = torch.arange(1, len(run) + 1) % len(run)
        values[name], controls[name] = (
            (top == target)[..., : len(run) if whole else -1].float() for target in (after, _others(after, generator))
        )
    values, controls = (
        {"successor": torch.cat(list(of.values()), -1)} | {f"successor: {name}": x for name, x in of.items()}
        for of in (values, controls)
    )
    kinds = {
        name: Kind(
            name,
            "share of members whose successor has the highest logit among the members, by the effective OV circuit",
            "Gould et al. 2023, arXiv:2312.09230",
            f"{values[name].shape[-1]} members; control: another member taken for the successor, at random",
            values[name],
            controls[name],
            least=0.5,
        )
        for name in values
    }
    choices = {name: f"{len(run)} members, one token each" for name, run in known.items()}
    provenance = {**model.provenance(), "method": "successor_heads", "versions": store.manifest()}
    cost = {"seconds": time.perf_counter() - started, "positions": sum(map(len, known.values())) * model.n_layers}
    return Heads(kinds, choices, provenance, cost)


def member_ids(model: Model, members: Sequence[str] | Sequence[int]) -> list[int]:
    """This is the ids of the longest run of members that are one token each."""
    if all(isinstance(member, int) for member in members):
        return [int(member) for member in members]
    if model.tokenizer is None:
        raise UnitsError(f"{model.name} has no tokenizer: give the members of sequences as ids")
    said = [f" {member}" for member in members]
    runs: list[list[int]] = [[]]
    for word, whole in zip(said, are_whole(model.tokenizer, said, after="then")):
        if whole:
            runs[-1].append(model.ids("then" + word)[0][-1])
        else:
            runs.append([])
    return max(runs, key=len)


def _others(after: Tensor, generator: torch.Generator) -> Tensor:
    """This is another member than the successor for each, at random."""
    step = torch.randint(1, len(after), (len(after),), generator=generator)
    return (after + step) % len(after)
