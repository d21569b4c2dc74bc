"""Supervised dictionaries, and how close an unsupervised one comes to their control.

Where a task's attributes are known, the best features that one could hope for can be computed: x is about
mean + sum over attributes A of u[A, value of A]. Three questions are then asked of both dictionaries alike:

    sufficient   reading attributes off the reconstruction: as off x itself?
    necessary    reading them off what the reconstruction misses (and the mean): no better than guessing?
    control      x - u[A, before] + u[A, after]: is A now read as `after`, and all else as before? With a dictionary of
                 latents, the k of them that bring x nearest to a row x' which differs from it in A alone are set to
                 what they are there, one after another

Source: Makelov, Lange and Nanda 2024, "Towards principled evaluations of sparse autoencoders for interpretability and
control" (arXiv:2405.08366), sections 3 (supervised dictionaries, from means or by least squares) and 4 (the tests).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.reading import Read, Values, probed
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import bias, directions, features, reconstructed
from mechscope.dictionaries.evaluating.tally import share
from mechscope.errors import DictionaryError, did_you_mean

LATENTS = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class Supervised:
    """This is a dictionary with a feature for every value of every attribute. mean: [d]. features: {A: [value, d]}."""

    mean: Tensor
    features: Mapping[str, Tensor]

    def reconstruct(self, values: Values) -> Tensor:
        """This is the vectors [n, d] that rows of these values should have."""
        return self.mean + sum((u[values[name]] for name, u in self.features.items()), torch.zeros_like(self.mean))

    def edit(self, x: Tensor, attribute: str, before: Tensor, after: Tensor) -> Tensor:
        """This is x [n, d] with an attribute's value changed from `before` [n] to `after` [n].

        Raises DictionaryError for an attribute that it has no features of.
        """
        if attribute not in self.features:
            known = ", ".join(self.features)
            raise DictionaryError(f"no features of {attribute!r}{did_you_mean(attribute, self.features)}; of: {known}")
        u = self.features[attribute]
        return x - u[before] + u[after]

    def fvu(self, x: Tensor, values: Values) -> float:
        """This is the share of the variance of x [n, d] that it misses."""
        return float((x - self.reconstruct(values)).square().sum() / (x - x.mean(0)).square().sum())


def supervised(x: Tensor, values: Values, by: Literal["squares", "means"] = "squares") -> Supervised:
    """This is the supervised dictionary of rows x [n, d] whose attributes are known.

    by: "squares" fits all features together, and is right where attributes go together in the data; "means" takes for
    each value how far its rows' mean lies from the mean of all.

    >>> colour, shape = torch.arange(12) % 3, torch.arange(12) % 4
    >>> x = torch.cat([torch.eye(3)[colour], torch.eye(4)[shape]], 1)
    >>> supervised(x, {"colour": colour, "shape": shape}).fvu(x, {"colour": colour, "shape": shape}) < 1e-10
    True
    """
    mean = x.mean(0)
    sizes = {name: int(held.max()) + 1 for name, held in values.items()}
    hot = {name: torch.nn.functional.one_hot(held, sizes[name]).to(x) for name, held in values.items()}
    if by == "means":
        return Supervised(mean, {a: h.T @ (x - mean) / h.sum(0)[:, None].clamp_min(1) for a, h in hot.items()})
    # A value's indicator less its mean: all features of an attribute together then say nothing about the mean of x.
    table = torch.cat([h - h.mean(0) for h in hot.values()], 1).double()
    solved = torch.linalg.lstsq(table, (x - mean).double(), driver="gelsd").solution.to(x)
    made = {}
    for (name, h), u in zip(hot.items(), solved.split([*sizes.values()])):
        made[name] = u - h.mean(0) @ u
    return Supervised(mean, made)


def sparse_control(
    dictionary: Dictionary | None,
    x: Tensor,
    values: Values,
    read: Read | None = None,
    known: Supervised | None = None,
    latents: Sequence[int] = LATENTS,
    pairs: int = 256,
    seed: int = 0,
) -> DictionaryReport:
    """This holds a dictionary's approximation and control of a task against a supervised one's.

    dictionary: None to judge the supervised one alone. x: [n, d]. values: {attribute: [n] int}. read: how attributes
    are read off vectors; probes fitted on x unless given, `asked(model, ...)` for the model's own answers. known: the
    supervised dictionary; fitted on x by least squares unless given. latents: how many are changed. pairs: of rows
    that differ in an attribute alone, for each.

    An attribute counts as controlled where it is read as the other row's. The controls are the row itself, the other
    row, and as many random latents among those that differ. Raises DictionaryError where no two rows differ in one
    attribute alone.
    """
    values = {name: held.to(x.device) for name, held in values.items()}
    known = supervised(x, values) if known is None else known
    read = probed(x, values) if read is None else read
    rows, generator = torch.arange(len(x)), torch.Generator().manual_seed(seed)
    measures: list[Measure] = []

    made: dict[str, Tensor] = {"supervised": known.reconstruct(values)}
    if dictionary is not None:
        made["dictionary"] = reconstructed(dictionary, x)
    rest = {"supervised": known.mean} | ({} if dictionary is None else {"dictionary": bias(dictionary)})
    for name in values:
        right = read(name, rows, x) == values[name]
        for who, output in made.items():
            kept = read(name, rows, output) == values[name]
            left = read(name, rows, x - output + rest[who]) == values[name]
            measures += [
                Measure(f"sufficient, {who}", *share(kept), of=name, ideal=1.0, unit="share of rows"),
                Measure(f"left over, {who}", *share(left), of=name, unit="share of rows", about="ideal: guessing"),
            ]
        measures.append(Measure("read off x", *share(right), of=name, control=True, unit="share of rows"))

    hits: dict[str, list[Tensor]] = {}
    kept_hits: dict[str, list[Tensor]] = {}
    for name in values:
        base, source = _apart(values, name, pairs, generator)
        edits = {
            "supervised": known.edit(x[base], name, values[name][base], values[name][source]),
            "nothing": x[base],
            "other row": x[source],
        }
        if dictionary is not None:
            edits |= _edits(dictionary, x, base, source, latents, generator)
        for who, edited in edits.items():
            moved = read(name, base, edited) == values[name][source]
            others = [read(other, base, edited) == values[other][base] for other in values if other != name]
            hits.setdefault(who, []).append(moved)
            kept_hits.setdefault(who, []).append(torch.cat(others) if others else moved[:0])
            control = who in ("nothing", "other row") or who.startswith("random")
            ideal = None if control else 1.0
            measures.append(Measure(f"control, {who}", *share(moved), of=name, ideal=ideal, control=control))
    whole = []
    for who in hits:
        control = who in ("nothing", "other row") or who.startswith("random")
        moved, kept = torch.cat(hits[who]), torch.cat(kept_hits[who])
        ideal = None if control else 1.0
        whole.append(Measure(f"control, {who}", *share(moved), ideal=ideal, control=control, unit="share of edits"))
        if len(kept):
            whole.append(
                Measure(f"others kept, {who}", *share(kept), ideal=ideal, control=control, unit="share of edits")
            )
    whole.append(Measure("fvu, supervised", known.fvu(x, values), ideal=0.0))
    by_name = {measure.name: measure.value for measure in whole}
    shown = [f"{by_name[f'control, {k} latents']:.1%} with {k}" for k in latents if f"control, {k} latents" in by_name]
    return DictionaryReport(
        question=f"control of {', '.join(values)}" + ("" if dictionary is None else f" by {type(dictionary).__name__}"),
        verdict=f"supervised features control {by_name['control, supervised']:.1%} of edits"
        + (f", latents {', '.join(shown)}" if shown else ""),
        measures=(*whole, *measures),
        choices={
            "edits": f"of one attribute, at most {pairs} pairs of rows that differ in it alone",
            "latents": "those that bring a row nearest to the other one, one after another",
        },
        provenance={} if dictionary is None else described(dictionary),
    )


def _apart(values: Values, name: str, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """This draws (base, source) rows that differ in one attribute and agree in all others."""
    others = [held for other, held in values.items() if other != name]
    table = torch.stack(others, 1) if others else torch.zeros(len(values[name]), 1, dtype=torch.int64)
    _, family = table.cpu().unique(dim=0, return_inverse=True)
    held = values[name].cpu()
    drawn: list[tuple[int, int]] = []
    for base in torch.randperm(len(held), generator=generator).tolist():
        fitting = ((family == family[base]) & (held != held[base])).nonzero().flatten()
        if len(fitting):
            drawn.append((base, int(fitting[torch.randint(len(fitting), (1,), generator=generator)])))
        if len(drawn) == most:
            break
    if not drawn:
        raise DictionaryError(
            f"no two of {len(held)} rows differ in {name!r} alone; give rows that do, or fewer attributes"
        )
    base, source = torch.tensor(drawn).T
    return base, source


@torch.no_grad()
def _edits(
    dictionary: Dictionary, x: Tensor, base: Tensor, source: Tensor, latents: Sequence[int], generator: torch.Generator
) -> dict[str, Tensor]:
    """This is x[base] with k latents set to what they are in x[source], chosen one by one, and with random ones."""
    writers = directions(dictionary)
    change = features(dictionary, x[source]) - features(dictionary, x[base])
    cost = change.square() * writers.square().sum(1)
    free = change != 0
    missing, edited = x[source] - x[base], x[base].clone()
    found: dict[str, Tensor] = {}
    for k in range(1, max(latents) + 1):
        # How much nearer each latent would bring the row: |missing|^2 - |missing - change * writer|^2.
        gain = (2 * change * (missing @ writers.T) - cost).masked_fill(~free, -torch.inf)
        best, chosen = gain.max(1)
        step = change.gather(1, chosen[:, None]) * writers[chosen]
        step = torch.where((best > 0)[:, None], step, torch.zeros_like(step))
        edited, missing = edited + step, missing - step
        free = free.scatter(1, chosen[:, None], False)
        if k in latents:
            found[f"{k} latents"] = edited
    for k in latents:
        lots = torch.rand(change.shape, generator=generator).to(change).masked_fill(change == 0, -1)
        chosen = lots.topk(min(k, change.shape[1]), dim=1).indices
        kept = torch.zeros_like(change).scatter(1, chosen, change.gather(1, chosen))
        found[f"random, {k} latents"] = x[base] + kept @ writers
    return found
