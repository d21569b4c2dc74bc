"""What a successor head reads of a number: its residue, which can be exchanged by adding a vector.

    stream(i)     what block 0 makes of member i alone (E + MLP0(E)), as in `succession.py`
    feature(r)    mean of stream(i) over the members with i = r modulo the period, less that over all members; a member
                  that is changed is left out of the means
    shifted(i, k) stream(i) - feature(i mod period) + feature((i + k) mod period)

    moved         share of members and shifts k for which the head, attending to shifted(i, k) alone, gives the highest
                  logit among the members to one of residue i + k + 1: the successor, shifted by k
    controls      a random change of the same size; features of members dealt out to residues at random; nothing (k = 0)

Source: Gould et al. 2023 (arXiv:2312.09230): features modulo 10 of sparse autoencoders and of linear probes, found in
the numbers of GPT-2, Pythia and Llama 2, and added to and taken from the head's input. Means over classes are the
simplest linear reading; members that end a period carry, which is not asked of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import store
from mechscope.causal.evidence import Column, Evidence, Row, Score, Scores
from mechscope.errors import UnitsError
from mechscope.models.passing import resumed
from mechscope.tasks.intervals import mean_interval
from mechscope.units.effective import effective_embedding
from mechscope.units.succession import member_ids
from mechscope.units.written import added

if TYPE_CHECKING:
    from mechscope.models.model import Model


def residue_features(
    model: Model, head: tuple[int, int], members: Sequence[str] | Sequence[int], period: int = 10, seed: int = 0
) -> Evidence:
    """This is how often adding the feature of another residue shifts what a successor head writes by as much.

    head: (layer, head). members: words or ids in order, such as numerals; each one token. Costs a forward of one
    position for each member and shift, four times.

    Raises UnitsError where there are fewer than three members of every residue.

    >>> residue_features(model, (1, 1), range(40)).answer  # doctest: +SKIP
    'adding a feature modulo 10 shifts what head 1.1 writes by as much for 100 % of members and shifts'
    """
    started = time.perf_counter()
    tokens = torch.tensor(member_ids(model, members), device=model.device)
    if len(tokens) < 3 * period:
        raise UnitsError(
            f"{len(tokens)} members are too few for features modulo {period}; give {3 * period}, one token each"
        )
    stream = effective_embedding(model, tokens)
    index = torch.arange(len(tokens))
    generator = torch.Generator().manual_seed(seed)
    dealt = torch.randperm(len(tokens), generator=generator)
    shifts = torch.arange(1, period)
    change = torch.stack([_exchange(stream, index % period, k, period) for k in shifts.tolist()])  # [k member d]
    dealt_out = torch.stack([_exchange(stream, (index % period)[dealt], k, period) for k in shifts.tolist()])
    random = torch.randn(change.shape, generator=generator).to(change)
    random = random * change.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)
    wanted = (index + shifts[:, None] + 1) % period
    named = {
        f"features modulo {period}": (change, wanted),
        "a random change as large": (random, wanted),
        "features of residues dealt out at random": (dealt_out, wanted),
        "nothing, the successor's own residue": (torch.zeros_like(change[:1]), (index[None] + 1) % period),
    }
    rows = []
    for place, (name, (by, residue)) in enumerate(named.items()):
        found = written_for(model, head, stream + by, tokens) % period == residue
        rows.append(Row(name, (_score(found.float().mean(0)),), control=place > 0))
    said = f"{head[0]}.{head[1]}"
    share = rows[0].scores[0]
    assert share is not None
    columns = (Column("moved", "share", "of members and shifts, whose highest member has the residue asked for"),)
    return Evidence(
        question=f"features modulo {period} that head {said} of {model.name} reads",
        answer=(
            f"adding a feature modulo {period} shifts what head {said} writes by as much for {share[0]:.0%} of members "
            "and shifts"
        ),
        tables=(Scores("shifts", columns, tuple(rows), about=f"chance is {1 / period:.2f}"),),
        choices={
            "members": f"{len(tokens)}, one token each",
            "features": "class means of the effective embedding, the changed member left out",
            "shifts": f"1 to {period - 1}",
        },
        provenance={**model.provenance(), "method": "residue_features", "versions": store.manifest()},
        cost={"seconds": time.perf_counter() - started, "positions": (3 * (period - 1) + 2) * len(tokens)},
        tensors={"change": change.cpu()},
    )


def written_for(model: Model, head: tuple[int, int], stream: Tensor, tokens: Tensor) -> Tensor:
    """This is the member [..] that a head gives the highest logit where it attends to a stream [.. d] alone."""
    layer, which = head
    site, flat = f"blocks.{layer}.head_out", stream.flatten(0, -2)[:, None]
    words = model.readout.direction(tokens)
    ids = tokens[:1].expand(len(flat))[:, None]  # what stands there is the stream's to say
    with torch.no_grad(), resumed(model, layer, flat):
        out = model.run(ids, save=site)
    wrote = added(model, layer, out[site])[:, which, 0]
    best = (model.readout.norm(wrote) @ words.T).argmax(-1).cpu()
    return best.view(stream.shape[:-1])


def _exchange(stream: Tensor, residue: Tensor, k: int, period: int) -> Tensor:
    """This is feature(residue + k) - feature(residue) for each member [member d], itself left out of both."""
    mine = torch.nn.functional.one_hot(residue, period).to(stream)  # [member residue]
    sums, counts = mine.T @ stream, mine.sum(0)
    moved = (residue + k) % period
    own = (sums[residue] - stream) / (counts[residue] - 1).clamp(min=1)[:, None]
    return sums[moved] / counts[moved][:, None] - own


def _score(values: Tensor) -> Score:
    return float(values.mean()), *mean_interval(values.tolist())
