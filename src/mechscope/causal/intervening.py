"""Running declared interventions: every run after those that it takes from, each row with its own, and differentiable.

    out = intervene(model, base, sources, [Intervention("blocks.1.resid_post[pos=3]", part=rotation)])
    loss = cross_entropy(out.logits[:, -1], wanted)             # loss.backward() reaches the rotation's parameters

Rows run in groups whose runs have the same lengths, so that padding never enters the model. Gradients are kept where an
intervention has something to train and gradients are enabled; the model's own parameters never get any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechscope.causal.interventions import BASE, SOURCE, Intervention, Interventions, order
from mechscope.causal.own_modules import AXES, PREFIX, OwnModule, find, watched
from mechscope.errors import CausalError
from mechscope.models.batches import Batches, batches
from mechscope.models.result import Receipt, Run
from mechscope.models.run import Pass, Plan, frozen
from mechscope.models.sites import Request, Selection

if TYPE_CHECKING:
    from mechscope.models.model import Inputs, Model


def intervene(
    model: Model,
    base: Inputs,
    sources: Mapping[str, Inputs] | Inputs = (),
    interventions: Intervention | Sequence[Intervention] | Interventions = (),
    positions: Mapping[str, Sequence[int] | Tensor] | None = None,
) -> Run:
    """This runs the base with every intervention made, after running the sources that they take from.

    base: text or ids, one row or several. sources: the inputs of each run by name, as many rows as the base or one for
    all; inputs alone are the run "source". positions: by the name of a run, one position for each row, for sites that
    select none (pyvene's unit locations). What is returned has the logits [rows pos d_vocab], under `out[site]` what is
    collected (`out["NAME: site"]` of a source's run), and in `out.receipt` how many values each intervention changed.

    Raises CausalError for a run that is not given or never taken from, runs that take from each other, a part that does
    not fit its site, and a base and a source of unlike shapes; SiteError for a site or a module that does not exist.

    >>> swap = Intervention("blocks.0.resid_post[pos=-1]")
    >>> intervene(model, "Ben and John", "Ben and Mary", swap).logits.shape  # doctest: +SKIP
    torch.Size([1, 4, 8192])
    """
    steps = (interventions,) if isinstance(interventions, Intervention) else Interventions(tuple(interventions)).steps
    named = dict(sources) if isinstance(sources, Mapping) else {} if _none(sources) else {SOURCE: sources}
    if BASE in named:
        raise CausalError(f"{BASE!r} is the run that is changed: give the source another name")
    names = order(steps, list(named))
    given = batches(model, base)
    ids = {BASE: given.ids, **{name: _rows(model, name, inputs, len(given.ids)) for name, inputs in named.items()}}
    at = {name: _positions(name, ids, values) for name, values in (positions or {}).items()}
    planned = [_Step.of(model, step, at) for step in steps]
    by_row = {spot.run for step in planned for spot in (step.into, step.source) if spot is not None and spot.by_row}
    if idle := sorted(set(at) - by_row):
        raise CausalError(
            f"positions are given for {idle[0]!r}, whose sites select their own: leave out one of the two"
        )
    groups = _groups([ids[name] for name in names])
    done = [_Group(model, planned, names, ids, at, rows).run() for rows in groups]
    together = Batches(given.ids, given.mask, [(rows, {}) for rows in groups])
    logits = [result.pop(BASE) for result in done]
    out = together.assemble(Request("logits", classes=logits[0].dim() == 2), logits)
    values = {
        step.key: together.assemble(step.shape, [result[step.key] for result in done])
        for step in planned
        if step.what.source is None
    }
    return Run(
        model, given.ids, values, [s.receipt for s in planned if s.what.source is not None], out, None, None, given.mask
    )


def _none(sources: Any) -> bool:
    return isinstance(sources, (tuple, list)) and not sources


def _rows(model: Model, name: str, inputs: Inputs, n: int) -> list[list[int]]:
    found = model.ids(inputs)
    if len(found) not in (1, n):
        raise CausalError(f"the source {name!r} has {len(found)} rows for {n} of the base: give one for each, or one")
    return found * n if len(found) == 1 else found


def _positions(name: str, ids: Mapping[str, list[list[int]]], given: Sequence[int] | Tensor) -> Tensor:
    """This is one position for each row of a run, counted from 0."""
    if name not in ids:
        raise CausalError(f"positions are given for the run {name!r}, which there is not: {', '.join(map(repr, ids))}")
    found, lengths = torch.as_tensor(given).flatten(), torch.tensor([len(row) for row in ids[name]])
    found = found.expand(len(lengths)) if len(found) == 1 else found
    if len(found) != len(lengths):
        raise CausalError(f"{len(found)} positions are given for {len(lengths)} rows of {name!r}: give one for each")
    if bool(((found < -lengths) | (found >= lengths)).any()):
        worst = int(((found < -lengths) | (found >= lengths)).int().argmax())
        raise CausalError(f"row {worst} of {name!r} has no position {int(found[worst])}: it has {int(lengths[worst])}")
    return found % lengths


def _groups(runs: Sequence[list[list[int]]]) -> list[list[int]]:
    """This is the rows of which every run has one length, together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(zip(*runs)):
        found.setdefault(tuple(map(len, row)), []).append(i)
    return list(found.values())


# ----------------------------------------------------------------------------------------- where an intervention is


@dataclass(frozen=True)
class _Spot:
    """This is a site of a run: a request, or a module of the model's own with its selection."""

    site: str
    run: str
    request: Request | None
    module: nn.Module | None
    selection: Selection

    @classmethod
    def of(cls, model: Model, site: str, run: str) -> _Spot:
        if site.startswith(PREFIX):
            module, selection = find(model.hf, site)
            return cls(site, run, None, module, selection)
        (request, *more) = model.resolve(site)
        if more:
            raise CausalError(f"an intervention is at one site; {site!r} names {len(more) + 1}: write one for each")
        return cls(site, run, request, None, request.selection)

    @property
    def by_row(self) -> bool:
        """This is whether each row's own position is meant, if positions are given for the run."""
        axes = AXES if self.request is None else self.request.axes
        return self.selection.pos is None and axes[:2] == ("batch", "pos")


@dataclass
class _Step:
    """This is an intervention on a model: where it writes (or collects), where it reads, and what it has changed."""

    what: Intervention
    into: _Spot
    source: _Spot | None
    by_row: bool
    receipt: Receipt
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.what.site if self.what.into == BASE else f"{self.what.into}: {self.what.site}"

    @classmethod
    def of(cls, model: Model, what: Intervention, at: Mapping[str, Tensor]) -> _Step:
        into = _Spot.of(model, what.site, what.into)
        source = _Spot.of(model, what.reads, what.from_run) if what.from_run else None
        why = "" if into.request is None else model.anatomy.place(into.request.site).readonly
        if why and what.source is not None:
            raise CausalError(f"'{into.site}' can be read but not edited: {why}")
        return cls(what, into, source, into.by_row and what.into in at, Receipt(what.site, "edit", quiet=True))

    @property
    def shape(self) -> Request:
        """This is what `Batches.assemble` needs to know of the axes of what is collected."""
        pos = 0 if self.by_row else self.into.selection.pos
        site = "embed" if self.into.request is None else self.into.request.site
        return Request(site, replace(self.into.selection, pos=pos))


# ------------------------------------------------------------------------------------------------------ running it


class _Group:
    """This is all the runs of some rows, each run's lengths being alike."""

    def __init__(
        self,
        model: Model,
        steps: Sequence[_Step],
        names: Sequence[str],
        ids: Mapping[str, list[list[int]]],
        at: Mapping[str, Tensor],
        rows: list[int],
    ):
        self.model, self.steps, self.names = model, steps, names
        self.ids = {name: torch.tensor([ids[name][i] for i in rows], device=model.device) for name in names}
        self.at = {name: found[torch.tensor(rows)].to(model.device) for name, found in at.items()}
        self.values: dict[tuple[str, str], Tensor] = {}  # by run and site

    def run(self) -> dict[str, Tensor]:
        """This is the base's logits under "base", and what was collected under each step's key."""
        trains = any(p.requires_grad for step in self.steps for p in _parameters(step.what))
        grad = torch.is_grad_enabled() and trains
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.hf.modules())
        # cuDNN's recurrent kernels have no backward pass in eval mode.
        kernels = torch.backends.cudnn.flags(enabled=False) if grad and recurrent else contextlib.nullcontext()
        with kernels, torch.set_grad_enabled(grad), frozen(self.model.hf, grad), self.model.alone():
            logits = [self.forward(name) for name in self.names][-1]
            out = {BASE: logits}
            for step in self.steps:
                if step.what.source is None:
                    value = self.values[step.into.run, step.into.site]
                    step.what.check(value.shape[-1])
                    out[step.key] = step.what.within(value)
        return out

    def forward(self, run: str) -> Tensor:
        """This makes one run, with what goes into it, and keeps what is read from it."""
        ids = self.ids[run]
        edits = [
            (step.into, self.put(step)) for step in self.steps if step.what.into == run and step.what.source is not None
        ]
        wanted = [s.source for s in self.steps if s.source is not None and s.source.run == run]
        wanted += [s.into for s in self.steps if s.what.source is None and s.what.into == run]
        reads = list({spot.site: spot for spot in wanted}.values())
        own = [(spot, OwnModule(spot.site, spot.selection, ids.shape[1], [put])) for spot, put in edits if spot.module]
        own += [(spot, OwnModule(spot.site, spot.selection, ids.shape[1])) for spot in reads if spot.module]
        plan = Plan(
            list({spot.request.key: spot.request for spot in reads if spot.request}.values()),
            [(replace(spot.request), put) for spot, put in edits if spot.request],
        )
        work = Pass(self.model.anatomy, plan, range(len(ids)), self.model.certificate.overwritten)
        with work.hooked(self.model.hf), watched([(spot.module, module) for spot, module in own if spot.module]):
            result = self.model.forward({"input_ids": ids})
        work.check(self.model.name, False)
        for spot in reads:
            value = work.saved[spot.request.key][0] if spot.request else None
            if value is None:
                value = next(module for other, module in own if other is spot and not module.edits).value()
            if spot.by_row and run in self.at:
                value = value[torch.arange(len(value), device=value.device), self.at[run]]
            self.values[run, spot.site] = value
        return result if isinstance(result, Tensor) else result["logits"]

    def put(self, step: _Step) -> _Put:
        source = step.what.source if step.source is None else self.values[step.source.run, step.source.site]
        assert isinstance(source, Tensor)
        at = self.at.get(step.what.into) if step.by_row else None
        return _Put(step.what, source, step.source is None, at, step.receipt)


@dataclass
class _Put:
    """This puts the source's value at a site; with positions [rows], at each row's own."""

    step: Intervention
    source: Tensor
    constant: bool
    at: Tensor | None
    receipt: Receipt
    quiet = True

    def __call__(self, x: Tensor, place: int | None = None) -> Tensor:
        """This is the new value of the selected part; `place` is which of its positions `x` [batch d] is, if one is."""
        source = self.source.to(x)
        if self.at is None or place is not None:
            several = place is not None and self.at is None and not self.constant
            new = self.mixed(x, source[:, place] if several else source)
            if self.at is not None:
                new = torch.where((self.at == place)[:, None], new, x)
        else:
            rows = torch.arange(len(x), device=x.device)
            new = x.clone()
            new[rows, self.at] = self.mixed(x[rows, self.at], source)
        moved = new.detach() != x.detach()
        self.receipt.fired += 1
        self.receipt.elements += moved.numel()
        self.receipt.changed += int(moved.sum())
        self.receipt.largest = max(self.receipt.largest, float((new - x).detach().abs().max()))
        return new

    def mixed(self, base: Tensor, source: Tensor) -> Tensor:
        if self.constant:
            try:
                source = source.expand_as(base)
            except RuntimeError:
                raise CausalError(
                    f"the constant at '{self.step.site}' has shape {list(source.shape)}, the site {list(base.shape)}: "
                    "give one that broadcasts to it"
                ) from None
        if source.shape != base.shape:
            raise CausalError(
                f"'{self.step.site}' has shape {list(base.shape)} in {self.step.into!r}, and '{self.step.reads}' "
                f"{list(source.shape)} in {self.step.source!r}: select a position, as in "
                f"'{self.step.site.split('[')[0]}[pos=-1]', or give `positions`"
            )
        self.step.check(base.shape[-1])
        return self.step.mix(base, source)


def _parameters(step: Intervention) -> list[nn.Parameter]:
    return list(step.part.parameters()) if isinstance(step.part, nn.Module) else []
