"""How well a dictionary reconstructs, with how few latents, and which of its latents live: one pass over activations.

    fvu                  sum |y - y_hat|^2 / sum |y - mean y|^2
    explained variance   1 - variance of (y - y_hat) / variance of y: what a constant offset could mend is not held
                         against it (so it is at least 1 - fvu)
    L0                   active latents in a vector
    gamma                sum |y_hat|^2 / sum y . y_hat: the relative reconstruction bias, by which all reconstructions
                         are best divided. Below 1 they are too short: shrinkage, which an L1 penalty causes
    gamma about the mean the same of y and y_hat less the mean of y, where a large mean cannot hide shrinkage
    dead                 share of latents that never fired; dense: that fire in more than a tenth of the vectors

Sources: L0, dead latents and the histogram of densities, Bricken et al. 2023 (Towards Monosemanticity); gamma,
Rajamanoharan et al. 2024 (arXiv:2404.16014), equation 10; the set of them, Karvonen et al. 2025 (SAEBench,
arXiv:2503.09532).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.report import NAN, DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import ROWS, chunks, coded, pair
from mechscope.dictionaries.evaluating.tally import Tally, share
from mechscope.dictionaries.sparse import Sparse
from mechscope.errors import DictionaryError

DENSE = 0.1
"""A latent that fires in more than this share of vectors is dense (SAEBench's higher bound)."""

BLOCK = 128
"""Neighbouring rows that are drawn together for intervals: a usual context of tokens."""

SCALARS = ("rows", "active", "missed", "centred", "written", "along", "centred_written", "centred_along")


@overload
def evaluate(
    dictionary: Dictionary, batches: Iterable[Any], *, steps: int | None = None, block: int = BLOCK, seed: int = 0
) -> DictionaryReport: ...


@overload
def evaluate(
    dictionary: Sequence[Dictionary],
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    block: int = BLOCK,
    seed: int = 0,
) -> list[DictionaryReport]: ...


def evaluate(
    dictionary: Dictionary | Sequence[Dictionary],
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    block: int = BLOCK,
    seed: int = 0,
) -> DictionaryReport | list[DictionaryReport]:
    """This measures reconstruction, sparsity and the life of latents in one pass over `batches`, with intervals.

    dictionary: one, or several that are all measured in the same pass. batches: what training takes: tensors [n, d],
    (x, y), or {site: tensor}. steps: batches to read at most, for those that never end. block: neighbouring rows that
    are one observation for the intervals. The report's tensors hold `density` [n_latents], the share of vectors in
    which each latent fires, and `histogram` with its `edges`, of log10 density over the latents that fired.

    Raises DictionaryError for batches that do not fit the dictionary, and where there are none.

    >>> from mechscope.dictionaries import TopK
    >>> report = evaluate(TopK(8, 32, k=2), [torch.randn(1000, 8) for _ in range(4)])
    >>> report["L0"].value <= 2, report["fvu"].low <= report["fvu"].value <= report["fvu"].high
    (True, True)
    """
    several = not isinstance(dictionary, Dictionary)
    passes = [_Pass(one, block) for one in (dictionary if several else [dictionary])]
    for batch in islice(batches, steps):
        for one in passes:
            one.add(batch)
    reports = [one.report(seed) for one in passes]
    return reports if several else reports[0]


class _Pass:
    """This is what one dictionary's pass adds up: sums by block, and how often each latent fires."""

    def __init__(self, dictionary: Dictionary, block: int):
        self.dictionary, self.tally = dictionary, Tally(block)
        self.fired: Tensor = torch.zeros(dictionary.n_latents, dtype=torch.int64)
        self.pivot: Tensor | None = None
        self.rows = 0

    @torch.no_grad()
    def add(self, batch: Any) -> None:
        x, y = pair(self.dictionary, batch)
        size = max(self.tally.block, ROWS // self.tally.block * self.tally.block)
        for part in chunks(len(x), size):
            found, output = coded(self.dictionary, x[part])
            if output.shape != y[part].shape:
                raise DictionaryError(
                    f"this {type(self.dictionary).__name__} writes {list(output.shape)} and the batch has "
                    f"{list(y[part].shape)} to compare with; give (x, y) for a transcoder, or {{site: tensor}}"
                )
            if isinstance(found, Sparse):
                counts, fired = found.counts(), found.fired()
            else:
                counts, fired = (found != 0).sum(-1), (found != 0).sum(0)
            self.fired += fired.cpu()
            self._sum(y[part].flatten(1).double(), output.flatten(1).double(), counts)

    def _sum(self, y: Tensor, output: Tensor, counts: Tensor) -> None:
        if self.pivot is None:  # sums of squares about the first mean do not cancel, as those about 0 would
            self.pivot = y.mean(0)
        error, near, near_output = y - output, y - self.pivot, output - self.pivot
        scalars = [
            torch.ones(len(y), dtype=torch.float64, device=y.device),
            counts.double(),
            error.square().sum(1),
            near.square().sum(1),
            output.square().sum(1),
            (y * output).sum(1),
            near_output.square().sum(1),
            (near * near_output).sum(1),
        ]
        self.tally.add(torch.cat([torch.stack(scalars, 1), near, error], 1))
        self.rows += len(y)

    def report(self, seed: int) -> DictionaryReport:
        if not self.rows:
            raise DictionaryError("there is nothing to evaluate: batches gave no rows; give an iterator of tensors")
        width = (self.tally.sums.shape[1] - len(SCALARS)) // 2

        def parts(total: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            """The means over rows: scalars, y about the pivot, the error."""
            means = total / total[..., :1]
            near, error = means[..., len(SCALARS) :].split(width, -1)
            return dict(zip(SCALARS, means[..., : len(SCALARS)].unbind(-1))), near, error

        def variance(total: Tensor) -> Tensor:
            scalar, near, _ = parts(total)
            return scalar["centred"] - near.square().sum(-1)

        def fvu(total: Tensor) -> Tensor:
            return parts(total)[0]["missed"] / variance(total)

        def explained(total: Tensor) -> Tensor:
            scalar, _, error = parts(total)
            return 1 - (scalar["missed"] - error.square().sum(-1)) / variance(total)

        def gamma(total: Tensor) -> Tensor:
            scalar, *_ = parts(total)
            return scalar["written"] / scalar["along"]

        def centred_gamma(total: Tensor) -> Tensor:
            # With u = y - pivot, v = y_hat - pivot and m the mean of u: |v - m|^2 over (u - m) . (v - m).
            scalar, near, error = parts(total)
            output = near - error
            squared = scalar["centred_written"] - 2 * (output * near).sum(-1) + near.square().sum(-1)
            return squared / (scalar["centred_along"] - (near * output).sum(-1))

        def measure(name: str, of: Any, ideal: float | None, about: str) -> Measure:
            return Measure(name, *self.tally.interval(of, seed), ideal=ideal, about=about)

        density = self.fired.double() / self.rows
        measures = (
            measure("fvu", fvu, 0.0, "share of the variance that is missed"),
            measure("explained variance", explained, 1.0, "a constant offset is not held against it"),
            measure("L0", lambda total: parts(total)[0]["active"], None, "active latents in a vector"),
            measure("gamma", gamma, 1.0, "relative reconstruction bias; below 1 is shrinkage"),
            measure("gamma about the mean", centred_gamma, 1.0, "the same, of vectors less their mean"),
            *self._life(density),
        )
        histogram, edges = _histogram(density, self.rows)
        by_name = {one.name: one.value for one in measures}
        return DictionaryReport(
            question=f"reconstruction by {_title(self.dictionary)}",
            verdict=(
                f"FVU {by_name['fvu']:.3f} with {by_name['L0']:.1f} of {self.dictionary.n_latents:,} latents active; "
                f"{by_name['dead']:.1%} dead"
            ),
            measures=measures,
            choices={
                "vectors": f"{self.rows:,}",
                "intervals": f"bootstrap over blocks of {self.tally.size} neighbouring vectors",
                "dead": f"fired in none of them: with 95 % confidence in fewer than 1 in {max(1, self.rows // 3):,}",
                "dense": f"fires in more than {DENSE:.0%} of the vectors",
            },
            tensors={"density": density.float(), "histogram": histogram, "edges": edges},
            provenance=described(self.dictionary),
        )

    def _life(self, density: Tensor) -> list[Measure]:
        dead, dense = density == 0, density > DENSE
        middle = float(density[~dead].median().log10()) if not dead.all() else NAN
        return [
            Measure("dead", *share(dead), ideal=0.0, about=f"share of latents: {int(dead.sum()):,} of {len(dead):,}"),
            Measure("dense", *share(dense), about=f"share of latents: {int(dense.sum()):,} of {len(dense):,}"),
            Measure("median density", middle, about="log10, of the latents that fired"),
        ]


def _title(dictionary: Dictionary) -> str:
    name = f"{type(dictionary).__name__} of {dictionary.n_latents:,} latents"
    reads, writes = (", ".join(s) if isinstance(s, list) else s for s in (dictionary.reads, dictionary.writes))
    return name + (f" at {reads}" if reads else "") + (f" -> {writes}" if writes != reads else "")


def _histogram(density: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """This is how many latents have a log10 density in each bin of a half, and the bins' edges, from 1/rows to 1."""
    lowest = -int(torch.tensor(float(max(rows, 2))).log10().ceil())
    edges = torch.arange(lowest, 0.25, 0.5)
    logs = density[density > 0].log10().clamp(lowest, 0).float()
    counts = torch.histogram(logs, bins=edges).hist.long() if len(logs) else torch.zeros(len(edges) - 1).long()
    return counts, edges
