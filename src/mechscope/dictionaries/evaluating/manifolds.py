"""Features that are not directions: how a dictionary tiles a circle or a sphere, and whether its shape can be read off.

Points on a curved set have no finite set of true atoms. A greater dictionary tiles it more finely, with more latents
that each answer to a smaller patch, while what a linear probe makes of all the features, the place on the manifold,
stays as good. Distances are measured along the manifold (great circles), in radians:

    latents          latents that fire on a patch and write within the manifold's own subspace
    width            mean distance of the points at which a latent fires from the middle of its patch
    gap              greatest distance from a point of the manifold to the nearest latent's direction
    probe error      median distance of the place that a ridge regression reads off the features
    shuffled         the same where the places were shuffled: about pi / 2

Sources: Anthropic's Circuits Updates, May 2023 (a toy model of feature manifolds); Engels et al. 2024, "Not all
language model features are linear" (arXiv:2405.14860); Michaud, Gorton and McGrath 2025, on dictionaries that tile
manifolds as they grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import bias, directions, features, halves
from mechscope.dictionaries.evaluating.tally import mean
from mechscope.errors import DictionaryError

WITHIN = 0.8
"""A latent writes within the manifold's subspace where so much of its direction's square lies in it."""

PATCH = math.pi / 2
"""A latent answers to a patch where it fires within so much of the patch's middle, on average."""

RIDGE = 1e-3


def manifold_features(
    dictionaries: Mapping[int | str, Dictionary], x: Tensor, points: Tensor, seed: int = 0
) -> DictionaryReport:
    """This measures how dictionaries of several sizes represent a manifold whose points are known.

    x: [n, d]. points: [n, m], where on the unit circle (m = 2) or sphere (m = 3, ...) each row is. Intervals are over
    latents, or over rows. The tensors hold `middle.NAME` and `width.NAME` of the latents that are on the manifold.

    Raises DictionaryError for points that are not of length 1.

    >>> from mechscope.dictionaries import TopK
    >>> angle = 2 * torch.pi * torch.rand(500)
    >>> points = torch.stack([angle.cos(), angle.sin()], 1)
    >>> report = manifold_features({16: TopK(2, 16, k=2)}, points, points)
    >>> report["probe error", "16"].value < report["shuffled", "16"].value
    True
    """
    if points.ndim != 2 or len(points) != len(x) or (points.norm(dim=1) - 1).abs().max() > 1e-3:
        raise DictionaryError(
            f"points {list(points.shape)} are not places of {len(x)} rows on a unit circle or sphere; "
            "give unit vectors [n, m]"
        )
    points = points.to(x)
    choosing, judging = halves(len(x), seed)
    plane = torch.linalg.qr(torch.linalg.lstsq(points, x - x.mean(0)).solution.T).Q  # [d m], orthonormal
    turn = plane.T @ torch.linalg.lstsq(points, x - x.mean(0)).solution.T  # from places to the subspace's coordinates
    mixed = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).to(x.device)]
    measures, tensors = [], {}
    for size, dictionary in dictionaries.items():
        active = features(dictionary, x)
        writers = directions(dictionary)
        middle, width, ours = _patches(active, writers, points, plane)
        patches = torch.nn.functional.normalize(writers[ours] @ plane @ torch.linalg.pinv(turn).T, dim=1)
        gap = _distance(points, patches).amin(1).max() if len(patches) else torch.tensor(math.pi)
        error = _read(active, points, choosing, judging)
        chance = _read(active, mixed, choosing, judging)
        of = str(size)
        tensors |= {f"middle.{of}": middle[ours].cpu(), f"width.{of}": width[ours].cpu()}
        measures += [
            Measure("latents", float(ours.sum()), of=of, about=f"of {len(writers):,}"),
            Measure("width", *mean(width[ours]), of=of, unit="radians"),
            Measure("gap", float(gap), of=of, unit="radians"),
            Measure("probe error", *_median(error, seed), of=of, unit="radians", ideal=0.0),
            Measure("shuffled", *_median(chance, seed), of=of, unit="radians"),
        ]
    direct = _read(x - bias(next(iter(dictionaries.values()))), points, choosing, judging)
    measures.append(Measure("probe error of x", *_median(direct, seed), unit="radians", about="read off x itself"))
    counts = {m.of: m.value for m in measures if m.name == "latents"}
    errors = [m.value for m in measures if m.name == "probe error"]
    return DictionaryReport(
        question=f"a manifold in {points.shape[1]} dimensions, in {len(dictionaries)} dictionaries",
        verdict=(
            ", ".join(f"{value:.0f} latents at size {of}" for of, value in counts.items())
            + f"; its place is read within {min(errors):.2f} to {max(errors):.2f} radians"
        ),
        measures=tuple(measures),
        choices={
            "latents": f"{WITHIN:.0%} of their direction in the subspace, firing within {PATCH:.2f} radians on average",
            "distances": "along great circles",
            "probe": "ridge regression of places on features, judged on other rows",
        },
        tensors=tensors,
        provenance={str(size): described(dictionary) for size, dictionary in dictionaries.items()},
    )


def _distance(points: Tensor, others: Tensor) -> Tensor:
    """This is the distance along great circles of unit vectors [n, m] from others [k, m]: [n, k]."""
    return (points @ others.T).clamp(-1, 1).acos()


def _patches(active: Tensor, writers: Tensor, points: Tensor, plane: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This is each latent's middle [n_latents, m], its width [n_latents], and whether it is on the manifold."""
    total = active.sum(0)
    middle = torch.nn.functional.normalize(active.T @ points, dim=1)
    weights = active / total.clamp_min(1e-12)
    width = (weights * _distance(points, middle)).sum(0)
    unit = torch.nn.functional.normalize(writers, dim=1)
    inside = (unit @ plane).square().sum(1)
    ours = (total > 0) & (inside >= WITHIN) & (width < PATCH)
    return middle, width, ours


def _read(active: Tensor, points: Tensor, choosing: Tensor, judging: Tensor) -> Tensor:
    """This is the distance of the places that a ridge regression reads off features of the rows to judge on [n]."""
    table = torch.cat([active, torch.ones_like(active[:, :1])], 1).double()
    some = table[choosing]
    gram = some.T @ some
    strength = RIDGE * gram.diagonal().mean()
    weights = torch.linalg.solve(
        gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), some.T @ points[choosing].double()
    )
    said = torch.nn.functional.normalize(table[judging] @ weights, dim=1)
    return (said * points[judging].double()).sum(1).clamp(-1, 1).acos()


def _median(values: Tensor, seed: int, draws: int = 500) -> tuple[float, float, float]:
    """This is the median of values [n] and its bootstrap interval."""
    generator = torch.Generator().manual_seed(seed)
    drawn = values.cpu()[torch.randint(len(values), (draws, len(values)), generator=generator)].median(1).values
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype))
    return float(values.median()), float(low), float(high)
