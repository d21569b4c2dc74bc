"""What neurons respond to, by whether they are active at all: dead, token, bigram and positional neurons.

    dead         never active on the text
    token        active only on a few tokens: those on which it is nearly always active (`SURE` of the time) account
                 for nearly all of its activity (`SURE` of it), there are at most `FEW` of them, each seen `SEEN` times
    bigram       the same with the token before and the token, where the token alone does not tell
    positional   being active tells the position: their mutual information, in nats, less that with positions handed
                 out at random, is above `INFORMED`

Voita, Ferrando & Nalmpantis 2023 (arXiv:2309.04827), who use ReLU networks, where active means above 0. Elsewhere a
neuron is hardly ever exactly 0, and `above` says what counts as active, as a share of the highest activation on the
first batch. In a gated MLP the unit is the product of gate and linear factor (`mlp_post`); `at` names another site:
the gate (`mlp_pre`), or the neurons of experts (`expert_post`), which are 0, so not active, where the router did not
send the token: a dead one is then never sent what it would respond to, or does not respond to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mechscope import store
from mechscope.errors import UnitsError
from mechscope.models.stream import contexts
from mechscope.units.harvesting import batches, token_sites
from mechscope.units.highest import places
from mechscope.units.which import which_unit

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.models.model import Model

SURE, FEW, SEEN, INFORMED, RARE = 0.95, 5, 3, 0.05, 0.2
"""See above; a unit that is active on more than `RARE` of a first batch is not looked at as a detector of tokens."""

KINDS = ("dead", "token", "bigram", "positional", "other")


def responses(
    model: Model,
    texts: Iterable[str] | Tensor,
    at: str = "blocks.*.mlp_post",
    above: float = 0.0,
    context: int = 128,
    batch: int = 16,
    seed: int = 0,
) -> Responses:
    """This says of every unit of `at` when it is active, from one pass over texts.

    Memory grows with the number of different tokens (and bigrams) that rarely active units respond to, not with the
    text. Special tokens are not counted. Raises UnitsError for an empty corpus or a site without positions.

    >>> found = responses(model, texts)  # doctest: +SKIP
    >>> found.of("dead")[:3]  # doctest: +SKIP
    ['blocks.0.mlp_post[7]', 'blocks.0.mlp_post[90]', 'blocks.1.mlp_post[4]']
    """
    sites = token_sites(model, at)
    special = torch.tensor(sorted(set(getattr(model.tokenizer, "all_special_ids", ()) or ())))
    counts: Counts | None = None
    generator = torch.Generator().manual_seed(seed)
    for rows in batches(contexts(model, texts, context), batch):
        ids = torch.tensor(rows)
        with torch.no_grad():
            out = model.run(ids, save=sites, stop_at=sites[-1])
        acts = torch.cat([_flat(out[site]) for site in sites], 1)
        if counts is None:
            sizes = [_flat(out[site]).shape[1] for site in sites]
            counts = Counts(sizes, context, model.d_vocab, above * acts.amax(0).clamp_min(0))
        keep = (~torch.isin(ids, special)).flatten()
        before = torch.cat([torch.full_like(ids[:, :1], model.d_vocab), ids[:, :-1]], 1)
        position = torch.arange(ids.shape[1]).expand_as(ids).flatten()[keep]
        counts.add(acts[keep], ids.flatten()[keep], before.flatten()[keep], position, generator)
    if counts is None or not counts.tokens:
        raise UnitsError("there is no text to look at: the corpus is empty, or has nothing but special tokens.")
    names = [f"{site}[{unit}]" for site, size in zip(sites, counts.sizes) for unit in range(size)]
    options = {"at": at, "above": above, "context": context, "batch": batch, "seed": seed}
    choices = {"unit": which_unit(model, at), "active": f"above {above:g} of the greatest activation of a first batch"}
    provenance = {**model.provenance(), "options": options, "tokens": counts.tokens, "choices": choices}
    tokens = counts.triggers(counts.pairs, counts.of_token)
    bigrams = counts.triggers(counts.triples, counts.of_bigram)
    strings = model.strings if model.tokenizer is not None else lambda row: [str(i) for i in row]
    return Responses(
        names,
        counts.active / counts.tokens,
        counts.information(counts.by_position),
        counts.information(counts.by_chance),
        {unit: strings(found) for unit, found in tokens.items()},
        {unit: [" ".join(_pair(strings, code, model.d_vocab)) for code in found] for unit, found in bigrams.items()},
        provenance,
        tokens,
    )


@dataclass(frozen=True, eq=False)
class Responses:
    """This is when every unit is active: `active` [unit] is the share of tokens, `information` [unit] in nats.

    chance: [unit], the information about positions handed out at random. tokens, bigrams: unit -> what triggers it,
    as text; triggers: the ids of `tokens`.
    """

    names: list[str]
    active: Tensor
    information: Tensor
    chance: Tensor
    tokens: dict[int, list[str]]
    bigrams: dict[int, list[str]]
    provenance: dict[str, Any] = field(default_factory=dict)
    triggers: dict[int, list[int]] = field(default_factory=dict)
    kind: str = field(default="responses", init=False)

    @property
    def choices(self) -> dict[str, str]:
        """This is what was chosen: which tensor a unit is, in a gated MLP and of experts, and what counts as active."""
        return self.provenance.get("choices", {})

    @cached_property
    def kinds(self) -> list[str]:
        """This is what each unit is, one of `KINDS`; a unit that is several is the first."""
        told = (self.information - self.chance > INFORMED).tolist()
        return [
            "dead"
            if share == 0
            else "token"
            if unit in self.tokens
            else "bigram"
            if unit in self.bigrams
            else "positional"
            if told[unit]
            else "other"
            for unit, share in enumerate(self.active.tolist())
        ]

    def of(self, kind: str) -> list[str]:
        """This is the names of the units of a kind. Raises UnitsError for a kind that there is none of."""
        if kind not in KINDS:
            raise UnitsError(f"no kind of response {kind!r}; there are {', '.join(KINDS)}")
        return [name for name, one in zip(self.names, self.kinds) if one == kind]

    def to_frame(self) -> pd.DataFrame:
        """This is a row for every unit: what it is, how often it is active, what triggers it, what it tells."""
        import pandas as pd

        triggers = [self.tokens.get(i) or self.bigrams.get(i) or [] for i in range(len(self.names))]
        columns = {"unit": self.names, "kind": self.kinds, "active": self.active, "information": self.information}
        return pd.DataFrame(columns | {"chance": self.chance, "triggers": [" | ".join(t) for t in triggers]})

    def by_layer(self) -> pd.DataFrame:
        """This is how many units of each kind every site has."""
        import pandas as pd

        frame = self.to_frame()
        site = frame["unit"].str.replace(r"\[.*", "", regex=True).rename("site")
        return pd.crosstab(site, frame["kind"]).reindex(columns=list(KINDS), fill_value=0)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"active": self.active, "information": self.information, "chance": self.chance}
        header = {"names": self.names, "provenance": self.provenance}
        header |= {"tokens": list(self.tokens.items()), "bigrams": list(self.bigrams.items())}
        header["triggers"] = list(self.triggers.items())
        return tensors, header

    @classmethod
    def from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Responses:
        tokens, bigrams = ({int(unit): said for unit, said in header[name]} for name in ("tokens", "bigrams"))
        triggers = {int(unit): ids for unit, ids in header.get("triggers", ())}
        active, information, chance = (tensors[name] for name in ("active", "information", "chance"))
        return cls(header["names"], active, information, chance, tokens, bigrams, header["provenance"], triggers)

    def save(self, path: str | Path) -> Path:
        """This writes the result to one file, which `ms.open` reads back."""
        return store.save(path, self.kind, *self.to_parts())

    def __str__(self) -> str:
        counts = {kind: self.kinds.count(kind) for kind in KINDS}
        return ", ".join(f"{n:,} {kind}" for kind, n in counts.items()) + f" of {len(self.names):,} units"


class Counts:
    """This is how often every unit was active: in all, by position, and by token where it rarely is."""

    def __init__(self, sizes: list[int], context: int, vocab: int, floor: Tensor):
        self.sizes, self.vocab, self.floor, self.tokens = sizes, vocab, floor, 0
        units = sum(sizes)
        self.active = torch.zeros(units).double()
        self.by_position, self.by_chance = (torch.zeros(units, context).double() for _ in range(2))
        self.positions = torch.zeros(context).double()
        self.rare: Tensor | None = None
        self.pairs, self.triples, self.of_token, self.of_bigram = (Tally() for _ in range(4))

    def add(self, acts: Tensor, token: Tensor, before: Tensor, position: Tensor, generator: torch.Generator) -> None:
        """This takes in activations [tokens units] of tokens, the tokens before them and where they stand."""
        on = acts > self.floor
        self.tokens += len(acts)
        self.active += on.sum(0)
        where = torch.nn.functional.one_hot(position, self.by_position.shape[1]).float()
        self.positions += where.sum(0)
        self.by_position += on.float().T @ where
        self.by_chance += on.float().T @ where[torch.randperm(len(where), generator=generator)]
        if self.rare is None:
            self.rare = on.float().mean(0) <= RARE
        row, unit = places(on & self.rare)
        bigram = before * self.vocab + token
        self.of_token.add(token)
        self.of_bigram.add(bigram)
        self.pairs.add(unit * self.vocab + token[row])
        self.triples.add(unit * (self.vocab + 1) * self.vocab + bigram[row])

    def information(self, together: Tensor) -> Tensor:
        """This is the mutual information [unit] of being active and the position, in nats, from counts together."""
        joint = torch.stack([together, self.positions - together]) / self.tokens
        apart = joint.sum(-1, keepdim=True) * (self.positions / self.tokens)
        return torch.where(joint > 0, joint * (joint / apart.clamp_min(1e-300)).log(), 0.0).sum((0, 2)).float()

    def triggers(self, tally: Tally, occurrences: Tally) -> dict[int, list[int]]:
        """This is unit -> the tokens (or bigrams) that trigger it, for units that nothing else does."""
        size = self.vocab if tally is self.pairs else (self.vocab + 1) * self.vocab
        unit, code = np.divmod(tally.keys, size)
        often = occurrences.of(code)
        # What was seen once or twice tells nothing of "nearly always".
        sure = (tally.counts >= SURE * often) & (often >= SEEN)
        explained = np.bincount(unit[sure], tally.counts[sure], minlength=len(self.active))
        many = np.bincount(unit[sure], minlength=len(self.active))
        active = self.active.numpy()
        told = (active >= 5) & (explained >= SURE * active) & (many <= FEW)
        return {int(u): code[sure & (unit == u)].tolist() for u in np.flatnonzero(told)}


class Tally:
    """This is how often each of many whole numbers was seen, in order: `keys` and `counts`."""

    def __init__(self) -> None:
        self.keys, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, keys: Tensor) -> None:
        new, counts = np.unique(keys.numpy(), return_counts=True)
        self.keys, inverse = np.unique(np.concatenate([self.keys, new]), return_inverse=True)
        self.counts = np.bincount(inverse, np.concatenate([self.counts, counts])).astype(np.int64)

    def of(self, keys: np.ndarray) -> np.ndarray:
        """This is how often keys, all of which were seen, were seen."""
        return self.counts[np.searchsorted(self.keys, keys)]


def _flat(acts: Tensor) -> Tensor:
    return (acts.transpose(1, 2).flatten(2) if acts.dim() == 4 else acts).flatten(0, 1).float().cpu()


def _pair(strings: Any, code: int, vocab: int) -> list[str]:
    before, token = divmod(code, vocab)
    return strings([token]) if before == vocab else strings([before, token])
