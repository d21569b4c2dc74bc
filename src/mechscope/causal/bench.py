"""Interchanges made ready on a model at a site, to be run with one subspace after another, and to train with.

Sources are run once, for their values at the site; base runs begin at the site's block, with the stream that the base
has there, so that a step of training costs the blocks above alone. That a resumed run is the whole run is tried out on
two pairs first; where it is not, base runs are whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.causal.interchange import Interchanges, Mix, nothing
from mechscope.errors import CausalError
from mechscope.models.edit import Edit, Set, Where
from mechscope.models.run import Pass, Plan, frozen
from mechscope.models.sites import Request

if TYPE_CHECKING:
    from mechscope.models.model import Model


@dataclass
class Group:
    """This is pairs whose base prompts have one length: their places, base ids, and the sources' values at the site."""

    rows: Tensor
    ids: Tensor
    source: Tensor
    at: Tensor | None
    stream: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Mixed(Edit):
    """This puts mix(base, source) at a site; with positions [rows], at each row's own."""

    mix: Mix
    source: Tensor
    at_rows: Tensor | None = None

    quiet = True

    def apply(self, x: Tensor, where: Where) -> Tensor:
        rows, source = torch.arange(len(x), device=x.device), self.source.to(x)
        here = x if self.at_rows is None else x[rows, self.at_rows]
        if here.shape != source.shape:
            raise CausalError(
                f"'{where.request}' has shape {list(here.shape)} in bases and {list(source.shape)} in sources: "
                f"select a position, as in '{where.request.site}[pos=-1]'"
            )
        new = self.mix(here, source)
        if self.at_rows is None:
            return new
        out = x.clone()
        out[rows, self.at_rows] = new
        return out


class Bench:
    """This is interchanges made ready on a model at a site: sources are run once, bases begin at the site's block.

    site: one site, such as `blocks.1.resid_post[pos=-1]`. rows: how many pairs run together. Raises CausalError for a
    site that cannot be edited, or that has other sizes in base and source.
    """

    def __init__(self, model: Model, data: Interchanges, site: str, rows: int = 256):
        (self.request, *more) = model.resolve(site)
        if more:
            raise CausalError(f"an interchange is at one site; {site!r} names {len(more) + 1}")
        if why := model.anatomy.place(self.request.site).readonly:
            raise CausalError(f"'{self.request}' can be read but not edited: {why}")
        self.model, self.data, self.site, self.rows = model, data, self.request.key, rows
        if data.base_at is not None and self.request.axes[:2] != ("batch", "pos"):
            raise CausalError(f"these interchanges say at which position each row's site is; give '{site}' without one")
        self.choices = torch.tensor(data.choices or range(model.d_vocab), device=model.device)
        self.targets, self.before = (self._places(ids.to(model.device)) for ids in (data.expected, data.unchanged))
        base, source = (
            model.ids([list(p) if isinstance(p, tuple) else p for p in x]) for x in (data.base, data.source)
        )
        values = self._values(source, data.source_at)
        self.groups = [
            Group(rows, ids, _stacked(values, rows, self.site), _part(data.base_at, rows, model))
            for rows, ids in _by_length(base, model)
        ]
        self.layer = self._resumes()

    @property
    def width(self) -> int:
        """This is the number of dimensions of the site's last axis."""
        return self.groups[0].source.shape[-1]

    def _places(self, ids: Tensor) -> Tensor:
        found = (ids[:, None] == self.choices).int()
        if not bool(found.any(1).all()):
            raise CausalError("an expected answer is none of the choices: add it to `choices`, or leave them out")
        return found.argmax(1)

    @torch.no_grad()
    def _values(self, prompts: list[list[int]], at: Tensor | None) -> list[Tensor]:
        """This is the site's value on each prompt, [...d] each."""
        out: list[Tensor] = [torch.empty(0)] * len(prompts)
        for rows, ids in _by_length(prompts, self.model):
            for some, part in zip(rows.split(self.rows), ids.split(self.rows)):
                found = self.model.run(part, save=self.site, stop_at=self.request.site)[self.site]
                if at is not None:
                    found = found[torch.arange(len(some), device=found.device), _part(at, some, self.model)]
                for row, value in zip(some.tolist(), found):
                    out[row] = value
        return out

    def base_values(self) -> Tensor:
        """This is the site's value on every base, [pairs ... d]."""
        prompts = [group.ids[i].tolist() for group in self.groups for i in range(len(group.ids))]
        order = torch.cat([group.rows for group in self.groups])
        at = None if self.data.base_at is None else self.data.base_at[order]
        return _stacked(self._values(prompts, at), order.argsort(), self.site)

    def source_values(self) -> Tensor:
        """This is the site's value on every source, [pairs ... d]."""
        order = torch.cat([group.rows for group in self.groups])
        return torch.cat([group.source for group in self.groups])[order.argsort()]

    # ---------------------------------------------------------------- forwards

    def _resumes(self) -> int:
        """This is the block that base runs can begin at, or 0: it is tried, and held against the whole forward."""
        blocks = self.model.anatomy.layers()
        last = len(blocks) - 1 if self.request.site in ("final", "logits") else 0
        layer = next((i for i, b in enumerate(blocks) if self.request.site.startswith(f"{b.prefix}.")), last)
        if layer < 1:
            return 0
        site = f"{blocks[layer].prefix}.resid_pre"
        with torch.no_grad():
            for group in self.groups:
                parts = group.ids.split(self.rows)
                group.stream = torch.cat([self.model.run(p, save=site, stop_at=site)[site] for p in parts])
        group, few = self.groups[0], slice(0, 2)
        with torch.no_grad():
            try:
                resumed = self.forward(group, few, nothing, layer)
            except (RuntimeError, TypeError, KeyError, AttributeError, IndexError):
                return 0  # the module needs more than the stream to begin there
            plain = self.forward(group, few, nothing, 0)
        return layer if bool((resumed - plain).abs().max() <= 1e-5 * plain.abs().max().clamp_min(1.0)) else 0

    def forward(self, group: Group, rows: slice | Tensor, mix: Mix, layer: int) -> Tensor:
        """This is the logits [rows choices] of base runs with the interchange; differentiable where `mix` is."""
        ids, source = group.ids[rows], group.source[rows]
        at = None if group.at is None else group.at[rows]
        edits: list[tuple[Request, Any]] = [(self.request, _Mixed(mix, source, at))]
        if layer:
            assert group.stream is not None
            prefix = self.model.anatomy.layers()[layer].prefix
            edits.insert(0, (Request(f"{prefix}.resid_pre"), Set(group.stream[rows])))
        work = Pass(self.model.anatomy, Plan([], edits), range(len(ids)), self.model.certificate.overwritten)
        with (
            frozen(self.model.hf, torch.is_grad_enabled()),
            self.model.alone(),
            passed_by(self.model, layer),
            work.hooked(self.model.hf),
        ):
            result = self.model.forward({"input_ids": ids})
        logits = result if isinstance(result, Tensor) else result["logits"]
        logits = logits if logits.dim() == 2 else logits[:, self.data.at]
        return logits[:, self.choices].float()

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Group, Tensor]]:
        """This is places in groups, endlessly: every pair once in random order, then again."""
        while True:
            drawn = [
                (group, part)
                for group in self.groups
                for part in torch.randperm(len(group.rows), generator=generator).split(size)
            ]
            for i in torch.randperm(len(drawn), generator=generator).tolist():
                yield drawn[i]

    def loss(self, batch: tuple[Group, Tensor], mix: Mix) -> Tensor:
        """This is the cross-entropy of the expected answers on a batch, to be made small by what `mix` is made of."""
        group, pick = batch
        logits = self.forward(group, pick.to(group.ids.device), mix, self.layer)
        return torch.nn.functional.cross_entropy(logits, self.targets[group.rows[pick]])

    @torch.no_grad()
    def logits(self, mix: Mix) -> Tensor:
        """This is the logits [pairs choices] of all base runs with the interchange."""
        out = torch.empty(len(self.data), len(self.choices), device=self.model.device)
        for group in self.groups:
            for pick in torch.arange(len(group.rows), device=group.ids.device).split(self.rows):
                out[group.rows[pick]] = self.forward(group, pick, mix, self.layer)
        return out

    def hits(self, mix: Mix) -> Tensor:
        """This says for each pair whether the expected answer came out, [pairs] bool."""
        return (self.logits(mix).argmax(-1) == self.targets).cpu()

    def odds(self, mix: Mix) -> Tensor:
        """This is the log odds of the expected answer against the unchanged one, [pairs]; 0 where they are the same."""
        logits = self.logits(mix)
        rows = torch.arange(len(logits), device=logits.device)
        return (logits[rows, self.targets] - logits[rows, self.before]).cpu()


@contextlib.contextmanager
def passed_by(model: Model, layer: int) -> Iterator[None]:
    """This makes the blocks below `layer` hand on what they read, so that a forward costs those above alone."""
    kept = []
    try:
        for block in model.anatomy.layers()[:layer]:
            kept.append((block.module, block.module.__dict__.get("forward")))
            block.module.forward = _handing_on(block.tupled)
        yield
    finally:
        for module, before in kept:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def _handing_on(tupled: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x,) if tupled else x

    return forward


def _by_length(prompts: Sequence[Sequence[int]], model: Model) -> list[tuple[Tensor, Tensor]]:
    """This is (places [n], ids [n pos]) of the prompts of each length."""
    lengths: dict[int, list[int]] = {}
    for row, ids in enumerate(prompts):
        lengths.setdefault(len(ids), []).append(row)
    device = model.device
    return [
        (torch.tensor(rows, device=device), torch.tensor([prompts[row] for row in rows], device=device))
        for rows in lengths.values()
    ]


def _stacked(values: list[Tensor], rows: Tensor, site: str) -> Tensor:
    some = [values[row] for row in rows.tolist()]
    if len({value.shape for value in some}) > 1:
        raise CausalError(
            f"sources of several lengths have no common '{site}': select a position, as in '{site}[pos=-1]'"
        )
    return torch.stack(some)


def _part(at: Tensor | None, rows: Tensor, model: Model) -> Tensor | None:
    return None if at is None else at.to(model.device)[rows]
