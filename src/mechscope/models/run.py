"""One forward of the user's own modules, with sites read and edited on the way; nothing is left behind.

`Plan` says what to do at which site; `Pass` does it during one forward (or one generation) over rows of one length.
Edits at a site happen before saves, so what is saved is what the rest of the network saw. Sites are read where they
live: a module's input or output, inside attention (see `attention.py`), or computed on demand (`resid_mid`,
`head_out`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mechscope.errors import EditError, SiteError
from mechscope.models import attention
from mechscope.models.attached import Features
from mechscope.models.edit import Where
from mechscope.models.experts import Given
from mechscope.models.hooks import Act, _after, _before, frozen, head_outputs
from mechscope.models.places import Anatomy, Place
from mechscope.models.probe import tensors
from mechscope.models.result import Receipt
from mechscope.models.sites import ORDER, Request, row_of

POSITIONS = ("pos", "query")


@dataclass
class Plan:
    """This is everything asked of a run: which sites to save, which edits to make where, and where to stop."""

    saves: list[Request]
    edits: list[tuple[Request, Callable[..., Tensor]]]
    stop_at: str | None = None
    gradients: bool = False

    @property
    def sites(self) -> list[str]:
        names = (
            [r.site for r in self.saves] + [r.site for r, _ in self.edits] + ([self.stop_at] if self.stop_at else [])
        )
        return list(dict.fromkeys(names))


class Stop(Exception):
    """This ends a forward early; it never reaches the user."""


class Pass:
    """This is one forward over rows of one length: the hooks, what they saved, and their receipts."""

    def __init__(
        self,
        anatomy: Anatomy,
        plan: Plan,
        rows: Sequence[int],
        clone: frozenset[str] = frozenset(),
        batch: int | None = None,
    ):
        self.anatomy, self.plan, self.rows, self.clone = anatomy, plan, tuple(rows), clone
        self.batch = len(self.rows) if batch is None else batch
        self.receipts = {id(r): Receipt(r.key, "save") for r in plan.saves}
        self.receipts |= {id(r): Receipt(r.key, "edit", quiet=getattr(e, "quiet", False)) for r, e in plan.edits}
        self.saved: dict[str, list[Tensor]] = {r.key: [] for r in plan.saves}
        self.ends: dict[str, list[int]] = {r.key: [] for r in plan.saves}  # the last position of each saved piece
        self.nodes: dict[str, Tensor] = {}  # where gradients are taken
        self.versions: list[tuple[str, Tensor, int]] = []
        self.changes: list[tuple[Receipt, Tensor, Tensor]] = []
        self.inputs: dict[tuple[int, str], Tensor] = {}
        self.given: dict[nn.Module, Given] = {}  # what experts were given
        self.by_site: dict[str, tuple[list, list]] = {}
        for r, e in plan.edits:
            self.by_site.setdefault(r.site, ([], []))[0].append((r, e))
        for r in plan.saves:
            self.by_site.setdefault(r.site, ([], []))[1].append(r)
        asked = {site.removesuffix("/error") for site in self.by_site if "/" in site}
        self.features = [Features(self, what) for site, what in anatomy.attached.items() if site in asked]
        for base in (base for features in self.features for base in features.bases):
            self.by_site.setdefault(base, ([], []))
        self.end = self.seen = 0  # absolute positions: where this call ends, and what earlier calls covered
        self.prompt_length = 0
        self.generating = False

    # ---------------------------------------------------------------- what happens at a site

    def touch(self, site: str, x: Tensor) -> Tensor:
        """This makes the edits of a site, saves what was asked for, and returns what goes on.

        Features of the site follow its own edits: they are of the value that was put there, and have the last word.
        """
        edits, saves = self.by_site.get(site, ((), ()))
        for request, edit in edits:
            x = self.edit(request, edit, x)
        for features in self.features:
            x = features.touch(site, x)
        if saves and self.plan.gradients:
            x = self.node(site, x)
        for request in saves:
            self.save(request, x)
        return x

    def node(self, name: str, x: Tensor) -> Tensor:
        """This marks where a gradient is taken; the first such tensor on a path is where the graph begins.

        Each site gets a tensor of its own, even where the model hands one tensor to two of them, so that what flows
        back through one site is not counted at the other.
        """
        self.nodes[name] = x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return x.clone() if name in self.clone else x

    def save(self, request: Request, x: Tensor) -> None:
        index = self.local(request, x)
        if index is None:
            return
        kept = x[index]
        if self.generating:
            kept = self.fresh(request, x, kept)
        receipt = self.receipts[id(request)]
        receipt.fired += 1
        receipt.elements += kept.numel()
        if kept.numel() < x.numel() or request.site in self.clone:
            kept = kept.clone()
        else:
            self.versions.append((request.key, kept, kept._version))
        self.saved[request.key].append(kept)
        self.ends[request.key].append(self.stop_of(request, x.shape[-1]))

    def edit(self, request: Request, edit: Callable[..., Tensor], x: Tensor) -> Tensor:
        index = self.local(request, x)
        if index is None:
            return x
        axes = request.row.axes
        old = x[index]
        if old.numel() == 0:
            return x
        axis = _position_axis(axes)
        length = 0 if axis is None else x.shape[axis]
        stop = self.stop_of(request, length)
        window = range(stop - length, stop)
        where = Where(request, self.rows, window, self.prompt_length, self.batch)
        new = edit.apply(old, where) if hasattr(edit, "apply") else edit(old)  # type: ignore[attr-defined]
        if not isinstance(new, Tensor):
            raise EditError(
                f"the edit at '{request}' returned {type(new).__name__}; return a tensor of shape {tuple(old.shape)}."
            )
        if new.shape != old.shape:
            raise EditError(
                f"the edit at '{request}' returned shape {tuple(new.shape)}, but the site has shape {tuple(old.shape)} "
                f"({' '.join(request.axes)}); return a tensor of that shape."
            )
        new = self.only_at(getattr(edit, "at", None), request, old, new.to(old), window)
        receipt = self.receipts[id(request)]
        receipt.fired += 1
        receipt.elements += old.numel()
        with torch.no_grad():
            moved = new != old
            self.changes.append((receipt, moved.sum(), torch.where(moved, (new - old).abs(), 0.0).amax()))
        if not str(request.selection):
            return new
        out = x.clone()
        out[index] = new
        return out

    def only_at(self, at: object, request: Request, old: Tensor, new: Tensor, window: range) -> Tensor:
        """This keeps an edit to the prompt, to the new tokens, or to a slice of absolute positions."""
        axis = _position_axis(request.row.axes)
        if at is None or axis is None:
            return new
        if isinstance(request.selection.pos, int):
            raise EditError(f"'{request}' selects a position and the edit has at={at!r}; give one of the two.")
        if at == "prompt":
            wanted = set(range(self.prompt_length or window.stop))
        elif at == "new":
            wanted = set(range(self.prompt_length or window.stop, window.stop))
        elif isinstance(at, slice):
            wanted = set(_absolute(at, self.prompt_length or window.stop, window.stop))
        else:
            raise EditError(f"at={at!r} at '{request}'; type at='prompt', at='new' or at=slice(start, stop).")
        index = self.local(request, old, len(window))
        assert index is not None
        here = index[axis]
        chosen = (
            list(window)[here] if isinstance(here, slice) else [window[int(i)] for i in torch.as_tensor(here).flatten()]
        )
        mask = torch.tensor([position in wanted for position in chosen], device=old.device)
        shape = [1] * old.dim()
        shape[request.axes.index(request.row.axes[axis])] = len(mask)
        return torch.where(mask.view(shape), new, old)

    # ---------------------------------------------------------------- which part of a site

    def stop_of(self, request: Request, length: int) -> int:
        """This is the absolute position after the last of this call: encoders see all of theirs at once."""
        whole = not self.generating or request.site.startswith("encoder.")
        return length if whole else self.end

    def local(self, request: Request, x: Tensor, length: int | None = None) -> tuple[Any, ...] | None:
        """This is the index of a selection in the tensor of this call, or None where the call does not reach it."""
        axes, (head, pos) = request.row.axes, (request.selection.head, request.selection.pos)
        axis = _position_axis(axes)
        if length is None:
            _check_range(request, "head", head, x.shape[1])
            length = 0 if axis is None else x.shape[axis]
            if not self.generating and axis is not None:
                _check_range(request, "pos", pos, length)
        if axis is None or pos is None or not self.generating:
            return request.selection.index(axes)
        start = self.stop_of(request, length) - length
        if isinstance(pos, slice):
            wanted = _absolute(pos, self.prompt_length, start + length)
        else:
            listed = (pos,) if isinstance(pos, int) else pos
            wanted = [p + self.prompt_length if p < 0 else p for p in listed]
        here = tuple(p - start for p in wanted if start <= p < start + length)
        if not here:
            return None
        return replace(request.selection, pos=here[0] if isinstance(pos, int) else here).index(axes)

    def fresh(self, request: Request, x: Tensor, kept: Tensor) -> Tensor:
        """This drops the positions that an earlier call of the same generation has saved already."""
        axis = _position_axis(request.row.axes)
        if axis is None or isinstance(request.selection.pos, int):
            return kept
        name = request.row.axes[axis]
        start = self.stop_of(request, x.shape[axis]) - x.shape[axis]
        here = self.local(request, x)
        assert here is not None
        positions = torch.arange(start, start + x.shape[axis])[_flat(here[axis])]
        return kept.index_select(request.axes.index(name), (positions >= self.seen).nonzero().flatten().to(kept.device))

    # ---------------------------------------------------------------- hooks

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """This puts the hooks that the plan needs on the modules, and takes them off whatever happens."""
        before: dict[nn.Module, list[Act]] = {}
        after: dict[tuple[nn.Module, int], list[Act]] = {}
        interface: dict[nn.Module, attention.Touch] = {}
        formula: dict[nn.Module, attention.Touch] = {}
        routed: set[nn.Module] = set()
        bases = [base for features in self.features for base in features.bases]
        asked = dict.fromkeys([*(site for site in self.plan.sites if "/" not in site), *bases])
        for site in sorted(asked, key=lambda s: ORDER[s.rsplit(".", 1)[-1]]):
            place = self.anatomy.places[site]
            if place.side == "attention":
                self.watch(site, place.module, interface, formula)
            elif place.side == "heads":
                before.setdefault(place.module, []).append(self.remember(place))
                after.setdefault((place.module, 0), []).append(self.stopping(site, self.at_heads(site, place)))
            elif place.side == "experts":
                routed.add(place.module)
                after.setdefault((place.module, 0), []).append(self.stopping(site, self.at_experts(site, place)))
            else:
                for term in place.plus:
                    acts = before if term.side == "input" else after
                    key = term.module if term.side == "input" else (term.module, term.item)
                    acts.setdefault(key, []).append(self.remember(term))  # type: ignore[arg-type]
                act = self.stopping(site, self.at_sum(site, place) if place.plus else self.at(site, place))
                if place.side == "input":
                    before.setdefault(place.module, []).append(act)
                else:
                    after.setdefault((place.module, place.item), []).append(act)
        handles = [m.register_forward_pre_hook(_before(acts), with_kwargs=True) for m, acts in before.items()]
        handles += [m.register_forward_hook(_after(acts, item)) for (m, item), acts in after.items()]
        handles += [m.register_forward_pre_hook(self.told, with_kwargs=True) for m in routed]
        try:
            with attention.watched(interface, formula):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.inputs.clear()
            self.given.clear()

    def stopping(self, site: str, act: Act) -> Act:
        if site != self.plan.stop_at:
            return act

        def act_and_stop(x: Tensor) -> Tensor:
            act(x)
            raise Stop

        return act_and_stop

    def at(self, site: str, place: Place) -> Act:
        scale, part, axes = place.scale, place.part, row_of(site).axes

        def act(x: Tensor) -> Tensor:
            if part is not None:
                old = x[..., part[0] : part[1]]
                new = self.touch(site, old)
                return x if new is old else torch.cat([x[..., : part[0]], new, x[..., part[1] :]], dim=-1)
            if site == "pos_embed":  # one row of learned positions serves all rows: an edit may tell them apart
                rows = x if x.dim() == 3 else x[None]
                shared = rows.expand(len(self.rows), -1, -1) if rows.shape[0] == 1 else rows
                new = self.touch(site, shared)
                return x if new is shared else new
            if x.dim() == 2 and len(axes) == 3 and site != "logits":  # all tokens of the batch side by side
                rows = x.reshape(len(self.rows), -1, x.shape[-1])
                new = self.touch(site, rows)
                return x if new is rows else new.reshape(x.shape)
            if scale == 1.0:
                return self.touch(site, x)
            old = scale * x
            new = self.touch(site, old)
            return x if new is old else new / scale

        return act

    def remember(self, place: Place) -> Act:
        """This keeps what a module read or wrote until the sum that it is a term of is complete."""

        def act(x: Tensor) -> Tensor:
            self.inputs[id(place.module), "input" if place.side == "heads" else place.side] = x
            return x

        return act

    def at_sum(self, site: str, place: Place) -> Act:
        """This reads a sum (resid_mid = resid_pre + attn_out) at its last term, which takes what an edit changed."""

        def act(x: Tensor) -> Tensor:
            total = place.scale * x if place.scale != 1.0 else x
            for term in place.plus:
                other = self.inputs.pop((id(term.module), term.side))
                total = (other if term.scale == 1.0 else term.scale * other).reshape(total.shape) + total
            new = self.touch(site, total)
            if site in self.nodes:
                # The rest of the network reads the last term, not this sum: a zero added to it carries the gradient.
                self.nodes[site] = probe = torch.zeros_like(total).requires_grad_()
                return x + (new - total + probe) / place.scale
            return x if new is total else x + (new - total) / place.scale

        return act

    def at_heads(self, site: str, place: Place) -> Act:
        """This splits the output projection by head, on demand; an edit changes the projection's output by its sum."""
        block = next(b for b in self.anatomy.blocks if b.prefix == site.rsplit(".", 1)[0])

        def act(x: Tensor) -> Tensor:
            old = head_outputs(place.module, self.inputs.pop((id(place.module), "input")), block.heads)
            new = self.touch(site, old)
            out = x if new is old else x + (new - old).sum(1)
            if site in self.nodes:
                self.nodes[site] = probe = torch.zeros_like(old).requires_grad_()
                return out + probe.sum(1)
            return out

        return act

    def told(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """This keeps what a module of experts was given: the tokens, the experts chosen and their weights."""
        given = Given.of(tuple(tensors((args, kwargs))))
        assert given is not None  # it was when the model was loaded
        self.given[module] = given

    def at_experts(self, site: str, place: Place) -> Act:
        """This computes the experts' neurons beside the model; an edit changes what the experts write by its sum."""
        experts = next(b for b in self.anatomy.blocks if b.prefix == site.rsplit(".", 1)[0]).experts
        assert experts is not None

        def by_row(x: Tensor) -> Tensor:
            return x.unflatten(0, (len(self.rows), -1))

        def act(x: Tensor) -> Tensor:
            given = self.given[place.module]
            weights = experts.weights(given)
            if place.readonly:
                self.touch(site, by_row(weights))
                return x
            old = by_row(experts.post(given)).transpose(1, 2)
            new = self.touch(site, old)

            def wrote(post: Tensor) -> Tensor:
                return experts.wrote(post.transpose(1, 2).flatten(0, 1), weights).reshape(x.shape).to(x.dtype)

            out = x if new is old else x + wrote(new - old)
            if site in self.nodes:
                self.nodes[site] = probe = torch.zeros_like(old).requires_grad_()
                return out + wrote(probe)
            return out

        return act

    def watch(self, site: str, core: nn.Module, interface: dict, formula: dict) -> None:
        prefix, short = site.rsplit(".", 1)
        block = next(b for b in self.anatomy.blocks if b.prefix == prefix)
        own = core is block.attention
        by = interface if (block.by_interface or not own) else formula
        if core not in by:
            by[core] = _Touch(self, prefix, "cross_" if short.startswith("cross_") else "")

    # ---------------------------------------------------------------- after the forward

    def check(self, model: str, ended_early: bool) -> None:
        """This raises for a save that was never reached, an edit that changed nothing, a value overwritten later."""
        for receipt, changed, largest in self.changes:
            receipt.changed += int(changed)
            receipt.largest = max(receipt.largest, float(largest))
        for receipt in self.receipts.values():
            if receipt.fired == 0:
                early = f", because the run stopped at '{self.plan.stop_at}'" if ended_early else ""
                raise SiteError(
                    f"'{receipt.site}' was never reached in this run of {model}{early}; nothing was "
                    f"{'saved' if receipt.what == 'save' else 'edited'} there."
                )
        for key, kept, version in self.versions:
            if kept._version != version:
                raise SiteError(
                    f"the model overwrote the value of '{key}' in place; this is a defect of mechscope's anatomy of "
                    f"{model}."
                )


class _Touch:
    """This is `Pass.touch` for the sites of one attention module."""

    def __init__(self, owner: Pass, prefix: str, kind: str):
        self.owner, self.prefix, self.kind = owner, prefix, kind

    def name(self, short: str) -> str:
        return f"{self.prefix}.{self.kind}{short}"

    def __call__(self, short: str, x: Tensor) -> Tensor:
        if short in ("k_heads", "v_heads"):
            return x
        site = self.name(short)
        if site not in self.owner.by_site and site != self.owner.plan.stop_at:
            return x
        x = self.owner.touch(site, x)
        if site == self.owner.plan.stop_at:
            raise Stop
        return x

    def reads(self, *names: str) -> bool:
        return any(self.name(n) in self.owner.by_site or self.name(n) == self.owner.plan.stop_at for n in names)

    def changes(self, *names: str) -> bool:
        if self.owner.plan.gradients and self.reads(*names):
            return True
        return any(self.owner.by_site.get(self.name(n), ((), ()))[0] for n in names)


def _position_axis(axes: tuple[str, ...]) -> int | None:
    return next((i for i, axis in enumerate(axes) if axis in POSITIONS), None)


def _absolute(index: slice, prompt: int, stop: int) -> list[int]:
    start = index.start or 0
    end = stop if index.stop is None else index.stop
    start, end = (start + prompt if start < 0 else start), (end + prompt if end < 0 else end)
    return list(range(max(0, start), min(end, stop), index.step or 1))


def _flat(index: Any) -> Any:
    return torch.as_tensor(index).flatten() if isinstance(index, list) else index


def _check_range(request: Request, axis: str, index: object, size: int) -> None:
    """This refuses a head or a position that the tensor does not have."""
    if index is None:
        return
    if isinstance(index, slice):
        if not range(size)[index]:
            raise SiteError(f"'{request}' selects nothing: '{request.site}' has {axis} 0 to {size - 1} here.")
        return
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, int) and not -size <= i < size:
            raise SiteError(f"'{request}' selects {axis} {i}, but '{request.site}' has {axis} 0 to {size - 1} here.")


__all__ = ["Pass", "Plan", "Receipt", "Stop", "Where", "_after", "_before", "frozen", "head_outputs"]
