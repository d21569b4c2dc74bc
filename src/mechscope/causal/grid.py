"""The grid of a sweep: which axes it runs over, what they are called in the table, and the cells for a batch.

An axis that is not swept is patched whole: every head, every position, every layer that the site names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.causal.patch import HEADS, Along, Cell, Dictionary, Feature, Patch, Units, Within
from mechscope.errors import CausalError, SiteError, did_you_mean
from mechscope.models.run import POSITIONS
from mechscope.models.sites import Request

if TYPE_CHECKING:
    from mechscope.models.model import Model
    from mechscope.tasks.task import Batch

AXES = ("layer", "head", "pos", "unit", "feature", "direction")
INSIDE = ("unit", "feature", "direction")
"""The axes of which a sweep has one at most: each is a way to patch a part of the last axis."""


@dataclass
class Grid:
    """This is the sites that are patched and the labels along each axis; `cells` makes the cells for one batch.

    sites: one list of full names for each label of the layer axis; a single one where layers are not swept.
    """

    over: tuple[str, ...]
    sites: list[list[Request]]
    labels: dict[str, tuple[str, ...]]
    within: list[dict[str, Within | None]] = field(default_factory=lambda: [{}])

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(request.site for group in self.sites for request in group))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.labels[axis]) for axis in self.over)

    def cells(self, values: Mapping[str, Tensor]) -> Iterator[Cell]:
        """This is the cells that there are for the values [prompts, *site axes] of one batch."""
        ranges = [range(len(self.labels[axis])) for axis in self.over]
        for place in product(*ranges):
            at = dict(zip(self.over, place))
            patches = []
            for request in self.sites[at.get("layer", 0)]:
                inside = next((at[axis] for axis in INSIDE if axis in at), 0)
                head, pos = at.get("head", request.selection.head), at.get("pos", request.selection.pos)
                patch = _patch(request, values[request.site], head, pos, self.within[inside].get(request.site))
                if patch is not None:
                    patches.append(patch)
            if patches:
                yield Cell(place, tuple(patches))


def _patch(request: Request, value: Tensor, head: Any, pos: Any, within: Within | None) -> Patch | None:
    """This is the patch of a head and a position (None: all of them), or None where the site has no such."""
    sizes = dict(zip(request.row.axes, value.shape))
    heads = next((n for axis, n in sizes.items() if axis in HEADS), 0)
    length = next((n for axis, n in sizes.items() if axis in POSITIONS), 0)
    for name, index, n in (("head", head, heads), ("position", pos, length)):
        if index is not None and not -n <= index < n:
            if getattr(request.selection, name[:4] if name == "head" else "pos") is not None:
                raise CausalError(f"'{request}' selects {name} {index}, but there are {name}s 0 to {n - 1}")
            return None
    return Patch(request.site, value, head, pos + length if pos is not None and pos < 0 else pos, within)


def grid(
    model: Model,
    site: str,
    over: str | Sequence[str],
    batches: Sequence[Batch],
    units: int | Sequence[Sequence[int]] | Mapping[str, Sequence[int]] | None = None,
    directions: Tensor | Mapping[str, Tensor] | None = None,
    dictionary: Dictionary | Mapping[str, Dictionary] | None = None,
    features: Sequence[int] | None = None,
) -> Grid:
    """This reads what a user asked to sweep; raises CausalError or SiteError with what to type instead."""
    axes = tuple(part.strip() for part in over.split(",")) if isinstance(over, str) else tuple(over)
    requests = sites_meant(model, site)
    _check(axes, requests, site)
    layered = [_layer(request) for request in requests]
    sites = [[r] for r in requests] if "layer" in axes else [requests]
    labels: dict[str, tuple[str, ...]] = {}
    within: list[dict[str, Within | None]] = [{}]
    for axis in axes:
        if axis == "layer":
            labels[axis] = tuple(layered)
        elif axis == "head":
            labels[axis] = tuple(str(h) for h in range(max(heads_of(model, r.site) for r in requests)))
        elif axis == "pos":
            labels[axis] = positions(model, batches)
        elif axis == "unit":
            labels[axis], within = _units(model, requests, units)
        elif axis == "direction":
            labels[axis], within = _directions(model, requests, directions)
        else:
            labels[axis], within = _features(requests, dictionary, features)
    return Grid(axes, sites, labels, within)


def heads_of(model: Model, site: str) -> int:
    """This is how many heads a site has; 0 where it has none."""
    axes = model.sites()[site].axes
    return next((n for axis, n in zip(axes, model.certificate.sites[site]) if axis in HEADS), 0)


def sites_meant(model: Model, site: str) -> list[Request]:
    """This is the sites meant: a short name means that site of every block that has it."""
    short = site.split("[")[0]
    if "/" in short:
        raise CausalError(
            f"{site!r} is the features of a dictionary; sweep them at their own site, {short.split('/')[0]!r}, with "
            "over='feature', dictionary=..., features=[...]"
        )
    blocked = [name for name in model.certificate.sites if name.startswith("blocks.") and name.endswith(f".{short}")]
    asked = f"blocks.*.{site}" if blocked else site
    shorts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in model.certificate.sites)
    if any(name.endswith(f".{short}") for name in model.absent) and not blocked:
        model.resolve(f"blocks.*.{short}")  # refuses, with the reason why it is absent
    if short not in shorts and not set(short) & set(".*{"):
        near, there = did_you_mean(short, shorts), ", ".join(shorts)
        raise SiteError(f"no site {short!r} in {type(model.hf).__name__}{near}; there are {there}")
    requests = model.resolve(asked)
    for request in requests:
        if why := model.anatomy.places[request.site].readonly:
            raise CausalError(f"'{request.site}' can be read but not patched: {why}.")
        for name in ("head", "pos"):
            index = getattr(request.selection, name)
            if index is not None and not isinstance(index, int):
                raise CausalError(
                    f"{site!r} selects several of its {name} axis; sweep it, over=({name!r}, ...), or select one of it"
                )
    return requests


def _check(axes: tuple[str, ...], requests: Sequence[Request], site: str) -> None:
    there = requests[0].row.axes
    has = {"layer": len(requests) > 1 or requests[0].site.startswith("blocks.")}
    has |= {"head": bool(set(HEADS) & set(there)), "pos": bool(set(POSITIONS) & set(there))}
    has |= dict.fromkeys(INSIDE, there[-1] not in ("key", "source"))
    for axis in axes:
        if axis not in AXES:
            near = did_you_mean(axis, AXES)
            raise CausalError(f"cannot sweep over {axis!r}{near}; there are {', '.join(AXES)}")
        if not has[axis]:
            could = ", ".join(a for a in AXES if has[a])
            raise CausalError(f"{site!r} has no {axis} to sweep: its axes are {' '.join(there)}; sweep any of {could}")
    if not axes or len(set(axes)) < len(axes):
        raise CausalError(f"over={axes!r}; name at least one axis, each once, as in over=('layer', 'pos')")
    if len(inside := [axis for axis in axes if axis in INSIDE]) > 1:
        raise CausalError(f"over={axes!r} names {' and '.join(inside)}, which are one axis; sweep one at a time")
    for name in ("head", "pos"):
        if name in axes and getattr(requests[0].selection, name) is not None:
            raise CausalError(f"{site!r} selects a {name} and over={axes!r} sweeps it; do one of the two")


def _layer(request: Request) -> str:
    parts = request.site.split(".")
    return parts[-2] if len(parts) > 1 else request.site


def length_of(model: Model, batch: Batch) -> int:
    """This is how many positions the stream has on a batch."""
    ids = batch.clean.dim() == 2
    return batch.clean.shape[1] if ids else model.certificate.sites["blocks.0.resid_pre"][1]


def positions(model: Model, batches: Sequence[Batch]) -> tuple[str, ...]:
    """This is what positions are called: their number and the clean token, or "token …" where prompts differ there."""
    if batches[0].clean.dim() > 2:
        return tuple(map(str, range(length_of(model, batches[0]))))
    rows = [row for batch in batches for row in batch.clean.tolist()]
    longest = max(map(len, rows))
    alike = [len({row[i] for row in rows if len(row) > i}) == 1 for i in range(longest)]
    whole = next(row for row in rows if len(row) == longest)
    tokens = model.strings(whole) if model.tokenizer is not None else [""] * longest
    return tuple(
        f"{i} {token.strip()}{'' if same else ' …'}" if token else str(i)
        for i, (token, same) in enumerate(zip(tokens, alike))
    )


def _width(model: Model, requests: Sequence[Request]) -> int:
    return max(model.certificate.sites[request.site][-1] for request in requests)


def _units(model: Model, requests: Sequence[Request], units: Any) -> tuple[tuple[str, ...], list]:
    width = _width(model, requests)
    if units is None or isinstance(units, int):
        step = units or 1
        if step < 1:
            raise CausalError(f"units={units}: a group needs at least one unit")
        groups = {_span(i, min(i + step, width)): range(i, min(i + step, width)) for i in range(0, width, step)}
    else:
        groups = dict(units) if isinstance(units, Mapping) else {",".join(map(str, g)): g for g in units}
    within = []
    for name, group in groups.items():
        if not len(group) or min(group) < 0 or max(group) >= width:
            raise CausalError(
                f"the units {name!r} are not among 0 to {width - 1}; give lists, or how many make a group"
            )
        picked = Units(torch.tensor(list(group), device=model.device))
        within.append({request.site: picked for request in requests})
    return tuple(groups), within


def _span(first: int, stop: int) -> str:
    return str(first) if stop == first + 1 else f"{first}-{stop - 1}"


def _directions(model: Model, requests: Sequence[Request], directions: Any) -> tuple[tuple[str, ...], list]:
    if directions is None:
        raise CausalError("a sweep over directions needs directions=, a tensor [directions, width] or {name: vector}")
    if not isinstance(directions, Mapping):
        directions = {str(i): vector for i, vector in enumerate(torch.as_tensor(directions))}
    width, within = _width(model, requests), []
    for name, vector in directions.items():
        if tuple(vector.shape) != (width,) or not float(vector.norm()) > 0:
            raise CausalError(f"direction {name!r} has shape {list(vector.shape)}; give vectors [{width}] other than 0")
        unit = Along((vector / vector.norm()).to(model.device, model.dtype))
        within.append({request.site: unit for request in requests})
    return tuple(directions), within


def _features(requests: Sequence[Request], dictionary: Any, features: Any) -> tuple[tuple[str, ...], list]:
    if dictionary is None or features is None:
        raise CausalError("a sweep over features needs dictionary= (with encode and decode) and features=[12, 345]")
    of = dictionary if isinstance(dictionary, Mapping) else {request.site: dictionary for request in requests}
    if missing := [request.site for request in requests if request.site not in of]:
        raise CausalError(f"no dictionary for '{missing[0]}'; give {{site: dictionary}} for every site that is swept")
    within = [{request.site: Feature(of[request.site], i) for request in requests} for i in features]
    return tuple(map(str, features)), within
