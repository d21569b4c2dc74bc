"""The lab of sparse features: that the generators are as stated, and that known methods recover what was planted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mechscope.dictionaries.evaluating.recovery import chance, cosines, matched_cosine, mean_max_cosine
from mechscope.labs.lab import Fact, Lab, Report
from mechscope.labs.sparse.generator import STRUCTURES, Sparse
from mechscope.labs.sparse.paired import PlantedMap, Sites
from mechscope.labs.sparse.reference import ica, online, shuffled

SAMPLES = 20_000


def example(structure: str, d: int = 64, n_atoms: int = 128, seed: int = 0) -> Sparse:
    """This is the lab's generator of a structure: four of 128 atoms active, or 16 atoms of which two are composed."""
    if structure == "composed":
        return Sparse(d=d, n_atoms=16, active=2, structure="composed", seed=seed)
    return Sparse(d=d, n_atoms=n_atoms, active=4, structure=structure, seed=seed)  # type: ignore[arg-type]


def correlation(codes: Tensor) -> Tensor:
    """This is how much atoms are active together, [atom atom]: the correlation of whether they are."""
    return torch.corrcoef((codes > 0).float().T)


def composed(found: Tensor, data: Sparse) -> float:
    """This is the share of found atoms, [atom d], that are nearer to a sum of two true atoms than to a true atom."""
    sums, single = (cosines(found, atoms).amax(0) for atoms in (data.composites, data.atoms))
    return float((sums > single).float().mean())


def check() -> Iterator[Fact]:
    """This measures the generators' statistics and what references recover, with shuffled controls."""
    yield from _structures()
    yield from _recovery()
    yield from _paired()


def _structures() -> Iterator[Fact]:
    for structure in STRUCTURES:
        data = example(structure)
        x, codes = data.batch(0, SAMPLES)
        mean = float((codes > 0).float().sum(1).mean())
        yield Fact(f"{structure}: mean number of active atoms", mean, data.active - 0.1, data.active + 0.1)
        again = float((replace(data).batch(0, SAMPLES).x - x).abs().max())
        yield Fact(f"{structure}: largest difference when made again", again, at_most=0.0)
    x, codes = replace(data, noise=0.1).batch(0, SAMPLES)
    yield Fact(
        "noise of 0.1: standard deviation of x - codes @ atoms", float((x - codes @ data.atoms).std()), 0.098, 0.102
    )
    data = example("correlated")
    within = correlation(data.batch(0, SAMPLES).codes)[0, 1].item()
    yield Fact("correlated: correlation within a group (together^2 = 0.25)", within, 0.2, 0.3)
    within = correlation(example("independent").batch(0, SAMPLES).codes)[0, 1].item()
    yield Fact("control: the same, independent", within, -0.05, 0.05)
    active = example("exclusive").batch(0, SAMPLES).codes > 0
    yield Fact(
        "exclusive: most atoms of a group active together", active.unflatten(1, (-1, 4)).sum(2).max().item(), 1, 1
    )
    data = example("hierarchical")
    active = data.batch(0, SAMPLES).codes > 0
    children = data.parents >= 0
    orphans = (active[:, children] & ~active[:, data.parents[children]]).sum().item()
    yield Fact("hierarchical: children active without their parent", orphans, at_most=0)
    alone = (active[:, ~children] & ~active[:, children].unflatten(1, (-1, 3)).any(2)).sum().item()
    yield Fact("hierarchical: parents active without a child", alone, at_least=1)


def _recovery() -> Iterator[Fact]:
    square = example("independent", n_atoms=64)
    x = square.batch(0, 8000).x
    yield Fact("64 atoms in 64 dimensions: ICA's mean largest cosine", mean_max_cosine(ica(x), square.atoms), 0.95)
    control = mean_max_cosine(ica(shuffled(x)), square.atoms)
    yield Fact("control: ICA on shuffled data", control, at_most=0.5)
    data = example("independent")
    found = online(data.batch(0, 3000).x, data.n_atoms)
    yield Fact(
        "128 atoms in 64 dimensions: online learning's mean largest cosine", mean_max_cosine(found, data.atoms), 0.9
    )
    yield Fact("the same, each found atom used once", matched_cosine(found, data.atoms).mean, 0.85)
    yield Fact("control: the found atoms with entries shuffled", chance(found, data.atoms), at_most=0.5)
    other = example("independent", seed=1).atoms
    yield Fact("control: another generator's atoms", mean_max_cosine(other, data.atoms), at_most=0.5)
    data = example("composed")
    for n_atoms, bounds in ((data.n_atoms, (None, 0.25)), (len(data.composites), (0.5, None))):
        share = composed(online(data.batch(1, 2000).x, n_atoms), data)
        yield Fact(f"composed: share of {n_atoms} found atoms that are sums rather than atoms", share, *bounds)


def _paired() -> Iterator[Fact]:
    planted = PlantedMap(Sparse(d=64, n_atoms=48, active=8), n_units=48, fan_in=2)
    x, y, codes, units = planted.batch(0, 4000)
    yield Fact(
        "planted map: largest difference of its MLP from y", (planted.mlp()(x) - y).abs().max().item(), at_most=1e-3
    )
    both = (codes > 0).float() @ planted.reads.T == 2
    yield Fact("planted AND: units active without both of their atoms", (units[~both] > 0).sum().item(), at_most=0)
    yield Fact("planted AND: share of units active where both atoms are", (units[both] > 0).float().mean().item(), 0.7)
    sites = Sites(Sparse(d=64, n_atoms=96, active=6), n_sites=2, shared=0.5)
    seen = sites.batch(0, 1000)
    each = [seen.codes * present @ atoms for present, atoms in zip(sites.present.float(), sites.atoms)]
    yield Fact(
        "sites: largest difference from codes in each space",
        (torch.stack(each, 1) - seen.x).abs().max().item(),
        at_most=1e-5,
    )


def run(out: Path, report: Report) -> Path:
    """This recovers dictionaries of every structure with the references and writes `out/sparse.html`."""
    from mechscope.labs.sparse.plot import picture

    return picture(out / "sparse.html", report)


LABS = (
    Lab(
        name="sparse-features",
        kind="planted",
        size="128 atoms in 64 dimensions, in five structures; planted maps and sites",
        known="the true dictionary and every code; which atoms go together; the map from one space to another",
        check=check,
        run=run,
    ),
)
