"""Sparse probing: how well a handful of latents tells a concept, beside as many dimensions of the raw activations.

The k features whose means differ most between rows with a concept and without are chosen on half of the rows, balanced;
a logistic regression reads them, and its accuracy on other rows, balanced too, is the score: 1/2 is chance.

Sources: Gurnee et al. 2023, "Finding neurons in a haystack" (arXiv:2305.01610); for dictionaries, Gao et al. 2024
(arXiv:2406.04093) and SAEBench (Karvonen et al. 2025, arXiv:2503.09532). That a probe of the raw activations often does
as well is why it stands beside (Kantamneni et al. 2025, arXiv:2502.16681).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.probes import balanced, fit, k_sparse
from mechscope.dictionaries.evaluating.report import DictionaryReport, Interval, Measure, described
from mechscope.dictionaries.evaluating.rows import Labels, features, halves, named, usable
from mechscope.dictionaries.evaluating.tally import mean, share


def sparse_probing(
    dictionary: Dictionary, x: Tensor, labels: Labels, k: Sequence[int] = (1, 2, 5), seed: int = 0
) -> DictionaryReport:
    """This probes concepts from k latents, from k raw dimensions, from k random latents, and from all of x.

    x: [n, d]. labels: {name: [n] bool}, or [n, concepts]. The whole's intervals are over concepts, a concept's over its
    rows. The tensors hold `latents.NAME`, those that were chosen, the first first.

    Raises DictionaryError where no concept is both present and absent.

    >>> from mechscope.dictionaries import TopK
    >>> x = torch.randn(400, 8)
    >>> sparse_probing(TopK(8, 32, k=4), x, x[:, 0] > 0, k=[1])["all of x"].value > 0.8
    True
    """
    choosing, judging = halves(len(x), seed)
    concepts = usable(named(labels, len(x)), (choosing, judging))
    active = features(dictionary, x)
    generator = torch.Generator().manual_seed(seed)
    alive = (active != 0).any(0).nonzero().flatten()
    measures, tensors = [], {}
    for name, held in concepts.items():
        on = held.to(x.device)
        rows, others = balanced(on, choosing, seed), balanced(on, judging, seed)

        def judged(read: Tensor, rows: Tensor = rows, others: Tensor = others, on: Tensor = on) -> Interval:
            return share(fit(read[rows], on[rows])(read[others]) == on[others])

        order = k_sparse(active[rows], on[rows], max(k))
        raw = k_sparse(x[rows], on[rows], max(k))
        tensors[f"latents.{name}"] = order.cpu()
        for size in k:
            chance = alive[torch.randperm(len(alive), generator=generator)[:size]]
            measures += [
                Measure(f"latents, k = {size}", *judged(active[:, order[:size]]), of=name, ideal=1.0),
                Measure(f"dimensions, k = {size}", *judged(x[:, raw[:size]]), of=name),
                Measure(f"random latents, k = {size}", *judged(active[:, chance]), of=name, control=True),
            ]
        measures.append(Measure("all of x", *judged(x), of=name, ideal=1.0))
    names = list(dict.fromkeys((m.name, m.control, m.ideal) for m in measures))
    whole = tuple(
        Measure(
            name,
            *mean(torch.tensor([m.value for m in measures if m.name == name])),
            ideal=ideal,
            control=control,
            about="accuracy, mean over concepts; chance is 1/2",
        )
        for name, control, ideal in names
    )
    by_name = {measure.name: measure.value for measure in whole}
    return DictionaryReport(
        question=f"sparse probing of {len(concepts)} concepts in {type(dictionary).__name__}",
        verdict=", ".join(
            f"{by_name[f'latents, k = {size}']:.1%} from {size} (raw: {by_name[f'dimensions, k = {size}']:.1%})"
            for size in k
        ),
        measures=(*whole, *measures),
        choices={
            "chosen": "features whose means differ most, on half of the rows",
            "judged": "accuracy on the other half, balanced",
            "probe": "logistic regression, L2",
        },
        tensors=tensors,
        provenance=described(dictionary),
    )
