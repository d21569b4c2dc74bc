"""The MLP of one block: what it reads, its router and experts, and its neurons before and after the nonlinearity."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mechscope.models.experts import experts_of
from mechscope.models.explain import close
from mechscope.models.inside import Inside, same
from mechscope.models.places import Block, Place, is_norm, linear
from mechscope.models.probe import Call

if TYPE_CHECKING:
    from mechscope.models.writers import Additions

NEURONS = ("mlp_pre", "mlp_up", "mlp_post")
EXPERTS = ("expert_weight", "expert_post")


def read_mlp(block: Block, here: Inside, additions: Additions) -> None:
    """This finds the module that is the MLP, what it reads (ln2) and the norm that makes it, and what is inside."""
    writers = [term for term in additions.terms if here.kind(term.call) == "mlp_out"]
    block.normed_stream = tuple(
        (here.kind(term.call), norm.module) for term, norm in zip(additions.terms, additions.norms, strict=False)
    )
    if block.normed_stream:
        block.unreadable("the stream is normalised after each addition (post-norm), so writers do not add up")
    if not writers:
        block.lacks("this block has no MLP", "ln2", *NEURONS, "mlp_out", "router", "experts", *EXPERTS)
        return
    source = here.source(writers[0].call)
    whole = _whole(here, source, additions)
    if whole is None or whole.read is None:
        block.lacks(
            "the MLP does not read one tensor [batch, pos, d_model]", "ln2", *NEURONS, "router", "experts", *EXPERTS
        )
        block.unreadable(block.absent["ln2"])
        return
    block.mlp = whole.module
    block.places["ln2"] = Place(whole.module, "input")
    _read_norm(block, here, whole, additions)
    inside = [c for c in here.calls if c.begin >= whole.begin and c.end <= max(source.end, whole.end)]
    dense = len(writers) == 1 and _read_neurons(block, whole, source, inside)
    if not dense:
        routed = _read_router(block, inside)
        if routed:
            _read_experts(block, inside)
        why = (
            "the MLP is a mixture of experts: its neurons depend on the token"
            if routed
            else "the MLP does not end in one linear map"
        )
        block.lacks(why, *NEURONS)
    block.lacks("this MLP is not a mixture of experts", *EXPERTS)
    block.lacks("this MLP has no router whose logits mechscope can see", "router")
    block.lacks("no router of this block returns the experts it chose", "experts")


def _whole(here: Inside, source: Call, additions: Additions) -> Call | None:
    """This is the MLP's own module or, where its projections lie loose in the block, the first of them."""
    top = here.component(here.short(source))
    if any(here.component(here.path_of(core)) == top for core in here.cores):
        top = here.short(source)
    family = [c for c in here.calls if here.short(c) == top or here.short(c).startswith(f"{top}.")]
    for call in family:
        small = is_norm(call.module) or linear(call.module) or isinstance(call.module, nn.Dropout)
        if here.reads_stream(call) and same(call.wrote, source.wrote) and not small:
            return call
    mixed = max((t.call.end for t in additions.before(source) if here.kind(t.call) != "mlp_out"), default=-1)
    loose = (c for c in here.calls if linear(c.module) and here.reads_stream(c) and mixed < c.begin < source.begin)
    return next(loose, None)


def _read_norm(block: Block, here: Inside, whole: Call, additions: Additions) -> None:
    """This says whether the MLP reads the block's input (parallel) or what the mixers left, and through which norm."""
    assert whole.read is not None
    read, norm = whole.read, here.norm_before(whole.read, whole.begin)
    if norm is not None and norm.read is not None and norm.module not in (module for _, module in block.normed_stream):
        block.mlp_norm, read = norm.module, norm.read
    if block.normed_stream:
        return
    mixers = [term for term in additions.terms if here.kind(term.call) != "mlp_out"]
    middle = here.before
    for term in mixers:
        assert term.call.wrote is not None
        middle = middle + term.scale * term.call.wrote
    if same(read, here.before):
        block.parallel = bool(mixers)
    elif not close(read, middle):
        block.unreadable("what the MLP reads is not a norm of the stream")


def _read_neurons(block: Block, whole: Call, source: Call, inside: list[Call]) -> bool:
    """This finds the down projection, and the gate and the up projection before it; False where there is none."""
    down = [c for c in inside if linear(c.module) and same(c.wrote, source.wrote)]
    if not down or down[-1].read is None or down[-1].read.dim() != 3:
        return False
    block.places["mlp_post"] = Place(down[-1].module, "input")
    post = down[-1].read
    halves = [
        half
        for c in inside
        if linear(c.module) and c is not down[-1] and same(c.read, whole.read)
        for half in _halves(c, post.shape[-1])
    ]
    if len(halves) == 1:
        call, part, _ = halves[0]
        block.places["mlp_pre"] = Place(call.module, "output", part=part)
        block.lacks("this MLP is not gated", "mlp_up")
        return True
    for (gate, part, x), (up, up_part, y) in itertools.permutations(halves, 2):
        if _gated(post, x, y, inside):
            block.places["mlp_pre"] = Place(gate.module, "output", part=part)
            block.places["mlp_up"] = Place(up.module, "output", part=up_part)
            return True
    block.lacks("no projection was found whose nonlinearity gives what the down projection reads", "mlp_pre", "mlp_up")
    return True


def _halves(call: Call, width: int) -> list[tuple[Call, tuple[int, int] | None, Tensor]]:
    """This is the projections to d_mlp that one linear map holds: one, or gate and up side by side."""
    x = call.wrote
    if x is None or x.dim() != 3 or x.shape[-1] not in (width, 2 * width):
        return []
    if x.shape[-1] == width:
        return [(call, None, x)]
    return [(call, (0, width), x[..., :width]), (call, (width, 2 * width), x[..., width:])]


def _gated(post: Tensor, gate: Tensor, up: Tensor, inside: list[Call]) -> bool:
    """This says whether post = act(gate) * up for the nonlinearity that the forward used."""
    f = nn.functional
    known = (f.silu, f.gelu, lambda x: f.gelu(x, approximate="tanh"), f.relu, torch.sigmoid, lambda x: f.relu(x) ** 2)
    seen = [c.wrote for c in inside if c.wrote is not None and c.wrote.shape == gate.shape and same(c.read, gate)]
    acted = [*seen, *(act(gate) for act in known)]
    return any(close(x * up, post) or close(x * (up + 1), post) for x in acted)


# A router by its module's name, or the linear map inside it.
ROUTER = re.compile(r"(^|\.)(router|gate|gating)$", re.I)
INSIDE_ROUTER = re.compile(r"(^|\.)(router|gate|gating)\.[^.]+$", re.I)


def _read_router(block: Block, inside: list[Call]) -> bool:
    """This finds the router's logits, and the experts that it chose where it says so; False where nothing routes.

    A linear map's output is the logits, and can be edited. A router that returns logits, weights and choices together
    has made its choice when it returns: its logits, found as W @ what it read, can only be read.
    """
    routers = [c for c in inside if c.read is not None and ROUTER.search(c.name)]
    maps = [c for c in inside if linear(c.module) and (ROUTER.search(c.name) or INSIDE_ROUTER.search(c.name))]
    if maps:
        block.places["router"] = Place(maps[0].module, "output")
    for call in routers[:1]:
        assert call.read is not None
        for i, x in enumerate(call.items):
            if x.is_floating_point() and not maps and _is_logits(call, x):
                block.places["router"] = Place(call.module, "output", item=i, readonly=CHOSEN)
            elif not x.is_floating_point() and x.dim() == 2 and x.shape[0] == call.read.shape[:-1].numel():
                block.places["experts"] = Place(call.module, "output", item=i, readonly="expert numbers are a choice")
        if not call.tupled and not maps and call.wrote is not None and _is_logits(call, call.wrote):
            block.places["router"] = Place(call.module, "output")
    return bool(routers or maps)


def _read_experts(block: Block, inside: list[Call]) -> None:
    """This finds the module that holds the routed experts and proves what their neurons are, or says why it cannot."""
    why = "no module of this block is given tokens, the experts chosen and their weights"
    for call in inside:
        if not call.given:
            continue
        found = experts_of(call.module, call.given, call.wrote)
        if isinstance(found, str):
            why = found
            continue
        block.experts = found
        block.places["expert_weight"] = Place(call.module, "experts", readonly=WEIGHED)
        block.places["expert_post"] = Place(call.module, "experts")
        return
    block.lacks(why, *EXPERTS)


WEIGHED = "the experts have used these weights by the time they return; edit expert_post, or the router where it can be"
CHOSEN = "the router has chosen its experts by the time it returns these logits, so a change would not reach the model"


def _is_logits(call: Call, x: Tensor) -> bool:
    """This says whether a tensor is the router's matrix times what the router read."""
    weight, bias = getattr(call.module, "weight", None), getattr(call.module, "bias", None)
    if (
        call.read is None
        or not isinstance(weight, Tensor)
        or weight.dim() != 2
        or weight.shape[1] != call.read.shape[-1]
    ):
        return False
    logits = call.read.double() @ weight.double().T + (bias.double() if isinstance(bias, Tensor) else 0.0)
    return close(x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1]).to(x.dtype))
