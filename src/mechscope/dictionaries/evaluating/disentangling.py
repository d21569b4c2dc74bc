"""Whether a few latents move one attribute and leave the others alone: RAVEL's Cause and Isolate for dictionaries.

A row's features of an attribute are replaced by another row's, x + sum over those latents of (f' - f) w, and all
attributes are read again:

    Cause(A)       share of pairs for which A is now the other row's
    Isolate(A, B)  share for which B is still the row's own
    score          mean over A of 1/2 Cause(A) + 1/2 mean over B of Isolate(A, B); 1/2 for doing nothing, and for
                   replacing everything

Source: Huang et al. 2024, RAVEL (arXiv:2402.17700), who choose latents by what tells the attribute, and whose scores
`causal.ravel` measures for subspaces; for dictionaries, SAEBench (Karvonen et al. 2025, arXiv:2503.09532).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.reading import Read, Values, probed
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import directions, features, halves
from mechscope.dictionaries.evaluating.tally import weighed
from mechscope.errors import DictionaryError

SIZES = (1, 2, 4, 8, 16, 32)


def disentanglement(
    dictionary: Dictionary,
    x: Tensor,
    values: Values,
    read: Read | None = None,
    sizes: Sequence[int] = SIZES,
    pairs: int = 512,
    entities: Tensor | None = None,
    seed: int = 0,
) -> DictionaryReport:
    """This interchanges each attribute's latents between rows, and scores what is read afterwards (RAVEL).

    x: [n, d]. values: {attribute: [n] int}, two or more. read: how attributes are read off edited vectors; probes
    fitted on half of the rows unless given, `asked(model, ...)` for the model's own answers. sizes: numbers of latents
    to try for an attribute; the best on the rows to choose on is taken. pairs: to judge each score on. entities: [n],
    rows of one entity stay on one side of the split.

    The tensors hold `latents.ATTRIBUTE`. The controls are random latents, all latents, and none. Raises DictionaryError
    with fewer than two attributes, or where no two rows differ in two of them.
    """
    if len(values) < 2:
        raise DictionaryError(
            f"to isolate an attribute takes another; got {', '.join(values) or 'none'}: give two or more"
        )
    values = {name: held.to(x.device) for name, held in values.items()}
    choosing, judging = _halves(len(x), entities, seed)
    read = probed(x[choosing], {a: held[choosing] for a, held in values.items()}) if read is None else read
    active, writers = features(dictionary, x), directions(dictionary)
    alive = (active != 0).any(0).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    drawn = {side: {(a, b): _pairs(values, a, b, rows, pairs, generator) for a in values for b in values}
             for side, rows in (("choosing", choosing), ("judging", judging))}  # fmt: skip

    def hits(latents: Tensor, moved: str, side: str) -> dict[tuple[str, str], Tensor]:
        """What moving one attribute's latents does to each attribute: Cause for itself, Isolate for the others."""
        found = {}
        for other in values:
            base, source = drawn[side][moved, other]
            edited = x[base] + (active[source][:, latents] - active[base][:, latents]) @ writers[latents]
            said = read(other, base, edited)
            found[moved, other] = said == values[other][source if other == moved else base]
        return found

    methods: dict[str, dict[tuple[str, str], Tensor]] = {"latents": {}, "random latents": {}, "all": {}, "none": {}}
    tensors = {}
    for name in values:
        order = _telling(active[choosing], values[name][choosing]).argsort(descending=True)
        tried = [order[:size] for size in sizes if size <= len(order)]
        chosen = max(tried, key=lambda latents: _score(hits(latents, name, "choosing"), [name], list(values))[0])
        tensors[f"latents.{name}"] = chosen.cpu()
        chance = alive[torch.randperm(len(alive), generator=generator)[: len(chosen)].to(alive.device)]
        everything = torch.arange(len(order), device=x.device)
        for method, latents in zip(methods, (chosen, chance, everything, everything[:0])):
            methods[method] |= hits(latents, name, "judging")
    measures = []
    for method, found in methods.items():
        control = method != "latents"
        suffix = f", {method}" if control else ""
        for what, cause in (("score", 0.5), ("cause", 1.0), ("isolate", 0.0)):
            ideal = None if control else 1.0
            interval = _score(found, list(values), list(values), cause, seed)
            measures.append(Measure(what + suffix, *interval, ideal=ideal, control=control, unit="share of pairs"))
    for name in values:
        about = f"{len(tensors[f'latents.{name}'])} latents"
        for what, cause in (("score", 0.5), ("cause", 1.0), ("isolate", 0.0)):
            interval = _score(methods["latents"], [name], list(values), cause, seed)
            measures.append(Measure(what, *interval, of=name, ideal=1.0, about=about))
    by_name = {m.name: m.value for m in measures if not m.of}
    return DictionaryReport(
        question=f"disentanglement of {', '.join(values)} in {type(dictionary).__name__}",
        verdict=(
            f"score {by_name['score']:.1%} (cause {by_name['cause']:.1%}, isolate {by_name['isolate']:.1%}); "
            f"random latents {by_name['score, random latents']:.1%}"
        ),
        measures=tuple(measures),
        choices={
            "latents": "those whose means differ most between values, as many as score best on other rows",
            "pairs": f"{pairs} for each two attributes, of rows that differ in both",
        },
        tensors=tensors,
        provenance=described(dictionary),
    )


def _halves(n: int, entities: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    if entities is None:
        return halves(n, seed)
    names = entities.unique()
    ours = names[halves(len(names), seed)[0]]
    mine = torch.isin(entities, ours).cpu()
    return mine.nonzero().flatten(), (~mine).nonzero().flatten()


def _telling(active: Tensor, values: Tensor) -> Tensor:
    """This is the share of each latent's variance that lies between values [n_latents]."""
    total = active.var(0, correction=0)
    between = torch.zeros_like(total)
    for value in values.unique():
        on = values == value
        between += on.double().mean().to(total) * (active[on].mean(0) - active.mean(0)).square()
    # A latent that hardly ever fires tells little, however sharply it fires when it does.
    return (between / total.clamp_min(1e-12)).masked_fill(total == 0, 0)


def _pairs(
    values: Values, one: str, other: str, rows: Tensor, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """This draws (base, source) rows that differ in both attributes."""
    bases, sources = (rows[torch.randint(len(rows), (20 * most,), generator=generator)] for _ in range(2))
    apart = (values[one][bases] != values[one][sources]) & (values[other][bases] != values[other][sources])
    kept = apart.nonzero().flatten().cpu()[:most]
    if not len(kept):
        raise DictionaryError(f"no two of {len(rows)} rows differ in both {one!r} and {other!r}; give more rows")
    return bases[kept], sources[kept]


def _score(
    hits: dict[tuple[str, str], Tensor],
    moved: Sequence[str],
    attributes: Sequence[str],
    cause: float = 0.5,
    seed: int = 0,
) -> tuple[float, float, float]:
    """This is `cause` x Cause + the rest x Isolate, mean over the attributes that are moved, with its interval."""
    share = {True: cause, False: (1 - cause) / (len(attributes) - 1)}
    weights = {(a, b): share[a == b] / len(moved) for a in moved for b in attributes if share[a == b] > 0}
    return weighed([hits[pair] for pair in weights], list(weights.values()), seed)
