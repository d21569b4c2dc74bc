"""Which size and which sparsity find the true atoms: dictionaries of every pair, trained on one stream, compared.

    recovery_sweep(make, batches, sizes, penalties, atoms=...)     mean max cosine to the truth, [sizes, penalties]
    report.tensors["between"]                                      the same to the next larger dictionary, without truth

With atoms known, their mean max cosine is greatest where the dictionary is large enough and the penalty neither finds
everything active nor nothing. Without them a latent that two dictionaries of different sizes agree on is likely real,
so that agreement with the next larger dictionary says where to look. The matched cosine, in which every latent counts
once and a latent too many counts against the dictionary, falls again beyond the true size.

Source: Sharkey, Braun, Millidge 2022, "Taking features out of superposition with sparse autoencoders", the heat maps of
mean max cosine similarity over dictionary size and L1 coefficient; Cunningham et al. 2023, arXiv:2309.08600, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.recovery import chance, matched_cosine, mean_max_cosine
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import directions
from mechscope.dictionaries.training import train
from mechscope.errors import DictionaryError


def recovery_sweep(
    make: Callable[[int, float], Dictionary],
    batches: Iterable[Any],
    sizes: Sequence[int],
    penalties: Sequence[float],
    *,
    atoms: Tensor | None = None,
    steps: int = 1000,
    **training: Any,
) -> DictionaryReport:
    """This trains make(size, penalty) for every pair on the same batches and says which pair recovers most.

    make: an untrained dictionary, as `lambda size, l1: ReLU(64, size, l1=l1)`. atoms: [atom d], the truth, where it is
    known. steps and further options are those of `train`.

    The report's tensors: `matched` [sizes, penalties], the sum of cosines of the best one-to-one matching over the
    larger of the two numbers of atoms; `mmcs`, mean max cosine of true atoms, and `control`, with latents' entries
    shuffled; `between` [sizes - 1, penalties], mean max cosine of each dictionary's latents to those of the next
    larger one; `sizes`, `penalties`. The measures name the best pair, and the window of penalties at the best size
    that come within 0.05 of it.

    Raises DictionaryError where there is nothing to compare, or sizes do not rise.

    >>> from mechscope.dictionaries import ReLU
    >>> x = torch.randn(64, 8)
    >>> report = recovery_sweep(lambda n, l1: ReLU(8, n, l1=l1), [x] * 3, [8, 16], [0.5, 1.0], steps=3)
    >>> report.tensors["between"].shape
    torch.Size([1, 2])
    """
    if not sizes or not penalties or list(sizes) != sorted(set(sizes)) or (atoms is None and len(sizes) < 2):
        raise DictionaryError(
            f"sizes {list(sizes)} and penalties {list(penalties)} do not make a sweep: give rising sizes, and two at "
            "least where no atoms are known"
        )
    grid = [[make(size, penalty) for penalty in penalties] for size in sizes]
    train([made for row in grid for made in row], batches, steps=steps, **training)
    rows = [[directions(made) for made in row] for row in grid]
    between = torch.tensor(
        [[mean_max_cosine(large, small) for small, large in zip(*pair)] for pair in pairwise(rows)]
    ).reshape(len(sizes) - 1, len(penalties))
    tensors = {"between": between, "sizes": torch.tensor(sizes), "penalties": torch.tensor(penalties).double()}
    if atoms is None:
        score, about = between, "mean max cosine to the next larger dictionary"
    else:
        known = atoms
        tensors |= {
            "mmcs": _table(rows, lambda found: mean_max_cosine(found, known)),
            "control": _table(rows, lambda found: chance(found, known)),
            "matched": _table(
                rows, lambda found: float(matched_cosine(found, known).cosine.sum()) / max(len(found), len(known))
            ),
        }
        score, about = tensors["matched"], "matched cosine, over the larger of the numbers of atoms and latents"
    best, column = divmod(int(score.argmax()), len(penalties))
    window = [p for p, value in zip(penalties, score[best].tolist()) if value > float(score.max()) - 0.05]
    measures = [
        Measure("best size", sizes[best], unit="latents", ideal=None if atoms is None else len(atoms)),
        Measure("best penalty", penalties[column]),
        Measure("window, low", min(window), about="the least penalty within 0.05 of the best"),
        Measure("window, high", max(window), about="the greatest penalty within 0.05 of the best"),
    ]
    for name in ("matched", "mmcs", "control", "between"):
        for size, values in zip(sizes, tensors[name].tolist() if name in tensors else ()):
            for penalty, value in zip(penalties, values):
                measures.append(Measure(name, value, of=f"{size} at {penalty:g}", control=name == "control"))
    return DictionaryReport(
        question=f"{len(sizes)} sizes and {len(penalties)} penalties of a {type(grid[0][0]).__name__} dictionary",
        verdict=(
            f"{score.max():.3f} at {sizes[best]:,} latents and a penalty of {penalties[column]:g} "
            f"(window {min(window):g} to {max(window):g}): {about}"
        ),
        measures=tuple(measures),
        choices={"score": about, "steps": str(steps)},
        tensors=tensors,
        provenance=described(grid[best][column]),
    )


def _table(rows: list[list[Tensor]], score: Callable[[Tensor], float]) -> Tensor:
    return torch.tensor([[score(found) for found in row] for row in rows])
