"""Where sites live in the user's modules: `Place` for each site, `Block` for each block, `Anatomy` for the model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from mechscope.models.attached import Attached
    from mechscope.models.experts import Experts

Side = Literal["input", "output", "attention", "heads", "experts"]


@dataclass(frozen=True)
class Place:
    """This is where a site's tensor is read and replaced: a module's input or output, or inside its attention.

    `scale` is what the model multiplies the tensor by before it reaches the stream. `part` (start, stop) is the slice
    of the last axis, where one projection holds two sites. `plus` are the terms of a sum that this module completes:
    what an edit changes about the sum is changed here, at its last term. `item` is which of the tensors that the
    module returns. `readonly` says why the site can be read but neither edited nor differentiated; it is empty where
    it can.
    """

    module: nn.Module
    side: Side  # "heads" and "experts" are computed on demand, at the output projection and beside the experts
    scale: float = 1.0
    part: tuple[int, int] | None = None
    plus: tuple[Place, ...] = ()
    item: int = 0
    readonly: str = ""


@dataclass
class Block:
    """This is one block: its places, what it lacks and why, and what circuits need to know of its wiring."""

    prefix: str
    module: nn.Module
    places: dict[str, Place] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    attention: nn.Module | None = None
    by_interface: bool = True
    attention_norm: nn.Module | None = None  # what turns resid_pre into ln1; None where attention reads the stream
    mlp: nn.Module | None = None
    mlp_norm: nn.Module | None = None
    projection: nn.Module | None = None  # W_O
    experts: Experts | None = None  # of a mixture, where their neurons can be read
    post_norm: nn.Module | None = None  # between attention's output and the stream: a norm or a layer scale
    parallel: bool = False
    normed_stream: tuple[tuple[str, nn.Module], ...] = ()  # post-norm blocks: each writer's site, the norm after it
    readable: str = ""  # why a circuit cannot recompute what the readers read; empty where it can
    unexplained: str = ""  # what is wrong with 'resid_post = resid_pre + everything written by the block'
    tupled: bool = False  # whether the block returns a tuple or a list
    heads: int = 0
    kv_heads: int = 0
    d_head: int = 0

    def lacks(self, why: str, *names: str) -> None:
        """This says why sites are absent; a reason that was given before stays."""
        for name in names:
            self.absent.setdefault(name, why)

    def unreadable(self, why: str) -> None:
        """This says why a circuit cannot recompute what this block's readers read; the first reason stays."""
        self.readable = self.readable or why


@dataclass
class Anatomy:
    """This is every block and every place of a model, in forward order, and why the rest is absent."""

    blocks: list[Block]
    places: dict[str, Place] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rotary: bool = False
    embed_scale: float = 1.0
    classifies: bool = False  # whether the logits are one row per input
    attached: dict[str, Attached] = field(default_factory=dict)  # dictionaries, by the site of their features

    def dictionary(self, site: str) -> Attached:
        """This is the attached dictionary whose features, or whose error, a site is."""
        return self.attached[site.removesuffix("/error")]

    def place(self, site: str) -> Place:
        """This is where an edit of a site acts: for features, the site that their dictionary writes."""
        return self.places[self.dictionary(site).writes if "/" in site else site]

    def layers(self, prefix: str = "blocks") -> list[Block]:
        return [block for block in self.blocks if re.fullmatch(rf"{re.escape(prefix)}\.\d+", block.prefix)]


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def linear(module: nn.Module) -> bool:
    """This says whether a module is a linear map, however it stores its matrix (Linear, Conv1D, quantised)."""
    named = re.search(r"linear|conv1d$", type(module).__name__, re.I) is not None
    return named and hasattr(module, "weight") and not is_norm(module)


def matrix(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """This is a linear module's weight as [d_out, d_in], and its bias."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return (weight.T if type(module).__name__ == "Conv1D" else weight), bias
