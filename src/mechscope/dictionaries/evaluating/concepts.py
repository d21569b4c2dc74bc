"""Which concepts single latents tell: the best AUROC and F1 of any latent for each, chosen and judged on other rows.

This is how the features of board games were counted: a board's squares are concepts whose truth is known, and a
dictionary is as good as the number of them that it has a latent for.

Sources: Huben 2024, "Sparse autoencoders find only 9/180 board state features in OthelloGPT"; Karvonen et al. 2024,
"Measuring progress in dictionary learning with board game models" (arXiv:2408.00113): coverage, the mean over concepts
of the best F1 of a latent above a threshold among tenths of its maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import Labels, features, halves, named, usable
from mechscope.dictionaries.evaluating.tally import mean, share

CANDIDATES = 64
"""How many latents are tried for each concept: those whose mean differs most, in standard deviations."""

TENTHS = torch.arange(10) / 10


def concept_recovery(
    dictionary: Dictionary, x: Tensor, labels: Labels, least: float = 0.9, seed: int = 0
) -> DictionaryReport:
    """This finds for each concept the latent that tells it best, on half of the rows, and scores it on the other half.

    x: [n, d]. labels: {name: [n] bool}, or [n, concepts]. least: the AUROC from which a concept counts as found. The
    control is the same with each concept's labels shuffled. The tensors hold `latent` [concept] and `threshold`.

    Raises DictionaryError where no concept is both present and absent.

    >>> from mechscope.dictionaries import TopK
    >>> report = concept_recovery(TopK(8, 32, k=4), x := torch.randn(400, 8), x[:, 0] > 0.5)
    >>> 0.5 < report["AUROC"].value <= 1
    True
    """
    choosing, judging = halves(len(x), seed)
    concepts = usable(named(labels, len(x)), (choosing, judging))
    active = features(dictionary, x)
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, list[tuple[float, float]]] = {"true": [], "shuffled": []}
    latents, thresholds, measures = [], [], []
    for name, held in concepts.items():
        on = held.to(active.device)
        best = _best(active[choosing], on[choosing])
        found = _judged(active[judging], on[judging], *best)
        mixed = on[torch.randperm(len(on), generator=generator).to(on.device)]
        scores["shuffled"].append(_judged(active[judging], mixed[judging], *_best(active[choosing], mixed[choosing])))
        scores["true"].append(found)
        latents.append(best[1])
        thresholds.append(best[2])
        measures += [
            Measure("AUROC", found[0], of=name, ideal=1.0, about=f"latent {best[0]}"),
            Measure("F1", found[1], of=name, ideal=1.0, about=f"latent {best[1]} above {best[2]:.2g}"),
        ]
    auroc, f1 = torch.tensor(scores["true"]).T
    chance_auroc, chance_f1 = torch.tensor(scores["shuffled"]).T
    whole = (
        Measure("AUROC", *mean(auroc), ideal=1.0, about="mean over concepts of the best latent's"),
        Measure("F1", *mean(f1), ideal=1.0, about="mean over concepts (coverage)"),
        Measure(
            "found", *share(auroc > least), ideal=1.0, about=f"{int((auroc > least).sum())} of {len(auroc)} concepts"
        ),
        Measure("AUROC, shuffled", *mean(chance_auroc), control=True, about="labels shuffled"),
        Measure("F1, shuffled", *mean(chance_f1), control=True, about="labels shuffled"),
    )
    return DictionaryReport(
        question=f"{len(concepts)} concepts in single latents of {type(dictionary).__name__}",
        verdict=(
            f"{int((auroc > least).sum())} of {len(auroc)} have a latent with an AUROC above {least:g}; "
            f"F1 {whole[1].value:.2f}"
        ),
        measures=(*whole, *measures),
        choices={
            "rows": f"{len(choosing):,} to choose latents on, {len(judging):,} to judge",
            "candidates": f"{CANDIDATES} latents whose means differ most",
            "thresholds": "tenths of a latent's maximum",
        },
        tensors={"latent": torch.tensor(latents), "threshold": torch.tensor(thresholds), "auroc": auroc, "f1": f1},
        provenance=described(dictionary),
    )


def auroc(values: Tensor, on: Tensor) -> Tensor:
    """This is the area under the curve of each column of values [n, m] as a score for `on` [n]; ties count a half.

    >>> auroc(torch.tensor([[0.0], [1.0], [2.0], [0.0]]), torch.tensor([False, True, True, False])).item()
    1.0
    """
    off, up = values[~on].T.contiguous().sort(1).values, values[on].T.contiguous()
    below = torch.searchsorted(off, up) + torch.searchsorted(off, up, right=True)
    return below.double().mean(1) / (2 * off.shape[1])


def f1(predicted: Tensor, on: Tensor) -> Tensor:
    """This is the F1 of predictions [n, ...] for `on` [n]."""
    hits = predicted & on.view(-1, *[1] * (predicted.ndim - 1))
    return 2 * hits.sum(0) / (predicted.sum(0) + on.sum()).clamp_min(1)


def difference(active: Tensor, on: Tensor) -> Tensor:
    """This is how far each feature's mean is higher where a concept is present [n_latents], in standard deviations."""
    up, off = active[on], active[~on]
    spread = (up.var(0, correction=0) + off.var(0, correction=0)).sqrt()
    return (up.mean(0) - off.mean(0)) / spread.clamp_min(1e-6)


def _best(active: Tensor, on: Tensor) -> tuple[int, int, float]:
    """This is the latent of the best AUROC, that of the best F1, and its threshold."""
    chosen = difference(active, on).topk(min(CANDIDATES, active.shape[1])).indices
    some = active[:, chosen]
    levels = TENTHS.to(some)[:, None] * some.amax(0)  # [tenth candidate]
    scores = torch.stack([f1(some > level, on) for level in levels])
    tenth, place = divmod(int(scores.argmax()), len(chosen))
    first = int(chosen[auroc(some, on).argmax()])
    return first, int(chosen[place]), float(levels[tenth, place])


def _judged(active: Tensor, on: Tensor, first: int, second: int, level: float) -> tuple[float, float]:
    return float(auroc(active[:, [first]], on)[0]), float(f1(active[:, second] > level, on))
