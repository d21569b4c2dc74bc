"""The experts of a mixture as keys and values: their neurons, read from parameters that hold all experts together.

    post_ei = act(gate_ei . x) * (up_ei . x)      on the tokens that the router sent to expert e; 0 elsewhere
    wrote   = sum over experts e of  weight_e (sum over neurons of post_ei V_ei + b_e)

No module reads or returns an expert's neurons: transformers keeps `gate_up_proj` (or `up_proj`) and `down_proj` of all
experts in one parameter each, [expert out in] or transposed, with gate and up in halves or in turns. The neurons are
therefore computed beside the forward, from what the experts' module was given (the tokens, the experts chosen, their
weights), with the same matrices and the module's own nonlinearity. That this is what the module does is proved on a
run when the model is loaded. Unit e * d_mlp + i is neuron i of expert e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechscope.errors import WeightsError
from mechscope.models.explain import close

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mechscope.models.model import Model

INTO = ("gate_up_proj", "up_proj")


@dataclass(frozen=True, eq=False)
class Given:
    """This is what an experts' module was given: `x` [tokens d_model], `chosen` and `by` (weights) [tokens k]."""

    x: Tensor
    chosen: Tensor
    by: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Given | None:
        """This finds the three among the tensors that a module was given; None where they are not there."""
        chosen = next(
            (t for t in tensors if t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool), None
        )
        floats = [t for t in tensors if t.is_floating_point()]
        if chosen is None or not floats:
            return None
        x = floats[0].flatten(0, -2)
        by = next((t for t in floats[1:] if t.shape == chosen.shape), None)
        return cls(x, chosen, by) if by is not None and len(x) == len(chosen) else None


class Experts:
    """This is the experts of one block: `number` of them, `size` neurons each, `gated` or not."""

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.into = next(name for name in INTO if isinstance(getattr(module, name, None), nn.Parameter))
        self.gated = self.into == "gate_up_proj"
        self.transposed = bool(getattr(module, "is_transposed", False))
        self.halves = bool(getattr(module, "is_concatenated", True))
        down = self.module.down_proj
        self.number, self.size = len(down), down.shape[1 if self.transposed else 2]

    def post(self, given: Given) -> Tensor:
        """This is the neurons [tokens expert d_mlp], 0 where the router did not send the token."""
        post = given.x.new_zeros(len(given.x), self.number, self.size)
        for expert in given.chosen.unique().tolist():
            if 0 <= expert < self.number:
                sent = (given.chosen == expert).any(1).nonzero().flatten()
                found = self._acted(self._projected(given.x[sent], expert))
                post = post.index_put((sent, torch.tensor(expert, device=sent.device)), found)
        return post

    def weights(self, given: Given) -> Tensor:
        """This is what the model multiplies each expert's output by [tokens expert], 0 where it is not asked."""
        there = (given.chosen >= 0) & (given.chosen < self.number)
        by = given.by.new_zeros(len(given.x), self.number)
        return by.scatter_add(1, given.chosen.long().clamp(0, self.number - 1), given.by * there)

    def wrote(self, post: Tensor, weights: Tensor) -> Tensor:
        """This is what neurons [tokens expert d_mlp] add to the module's output [tokens d_model], biases left out."""
        pattern = "tei,eio,te->to" if self.transposed else "tei,eoi,te->to"
        return torch.einsum(pattern, post, self.module.down_proj.to(post.dtype), weights.to(post.dtype))

    def constant(self, weights: Tensor) -> Tensor | float:
        """This is what the biases after the neurons add [tokens d_model]."""
        bias = getattr(self.module, "down_proj_bias", None)
        return 0.0 if bias is None else weights.to(bias.dtype) @ bias

    def value(self, expert: int) -> Tensor:
        """This is what each neuron of an expert writes [d_mlp d_model] for an activation of 1 and a weight of 1."""
        down = self.module.down_proj[expert].detach().float()
        return down.clone() if self.transposed else down.T.clone()

    def key(self, expert: int, what: str = "gate") -> Tensor:
        """This is the rows [d_mlp d_model] of an expert's "gate" (or only projection) or of its linear factor, "up"."""
        rows = getattr(self.module, self.into)[expert].detach().float()
        rows = rows.T if self.transposed else rows
        if not self.gated:
            return rows.clone()
        if self.halves:
            return rows[: self.size].clone() if what == "gate" else rows[self.size :].clone()
        return rows[0 if what == "gate" else 1 :: 2].clone()

    def _projected(self, x: Tensor, expert: int) -> Tensor:
        into = getattr(self.module, self.into)[expert]
        bias = getattr(self.module, f"{self.into}_bias", None)
        return nn.functional.linear(x, into.T if self.transposed else into, None if bias is None else bias[expert])

    def _acted(self, pre: Tensor) -> Tensor:
        if not self.gated:
            return self.module.act_fn(pre)
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(pre)
        gate, up = pre.chunk(2, dim=-1) if self.halves else (pre[..., ::2], pre[..., 1::2])
        return self.module.act_fn(gate) * up


def experts_of(module: nn.Module, tensors: Sequence[Tensor], wrote: Tensor | None) -> Experts | str:
    """This is the experts that a module holds, proved on what it was given and returned; or why they cannot be read."""
    down, given = getattr(module, "down_proj", None), Given.of(tensors)
    if not isinstance(down, nn.Parameter) or down.dim() != 3 or not any(hasattr(module, name) for name in INTO):
        return "its experts are not held as gate_up_proj (or up_proj) and down_proj of all experts together"
    if given is None or wrote is None:
        return "its experts' module is not given the experts chosen and their weights"
    if not down.is_floating_point():
        return "its experts are quantised"
    try:
        experts = Experts(module)
        weights = experts.weights(given)
        mine = experts.wrote(experts.post(given), weights) + experts.constant(weights)
    except (RuntimeError, AttributeError, StopIteration, IndexError) as error:
        return f"what its experts do could not be repeated from their parameters ({type(error).__name__})"
    if not close(mine, wrote.reshape(mine.shape).to(mine.dtype)):
        return "what its experts write is not the sum of their neurons' contributions times the router's weights"
    return experts


@dataclass(frozen=True, eq=False)
class Neurons:
    """This is what a layer's neurons write: `rows` [neuron d_model], `names` ("17", or "2.17" for expert 2)."""

    rows: Tensor
    names: list[str]


@torch.no_grad()
def neurons_written(model: Model, layer: int) -> Neurons:
    """This is what every neuron of a layer adds to the stream for an activation of 1, experts' neurons included.

    An expert's neuron is multiplied by the router's weight besides, which is taken as 1. Raises WeightsError where the
    neurons of the MLP are not known, and where a norm stands between experts and stream.

    >>> neurons_written(model, 2).rows.shape  # doctest: +SKIP
    torch.Size([512, 192])
    """
    from mechscope.models.mlps import mlp

    blocks = model.anatomy.layers()
    experts = blocks[layer].experts if 0 <= layer < len(blocks) else None
    if experts is None:
        rows = mlp(model, layer).written
        return Neurons(rows, [str(n) for n in range(len(rows))])
    scale = _scale(model, layer, experts)
    rows = torch.cat([scale * experts.value(expert) for expert in range(experts.number)])
    return Neurons(rows, [f"{expert}.{n}" for expert in range(experts.number) for n in range(experts.size)])


def _scale(model: Model, layer: int, experts: Experts) -> float:
    """This is what the experts' output is multiplied by on its way to the stream, proved by a change of neurons."""
    prefix = model.anatomy.layers()[layer].prefix
    sites = [f"{prefix}.{site}" for site in ("expert_post", "expert_weight", "mlp_out")]
    ids = torch.arange(min(4, model.n_embeddings), device=model.device)[:, None]
    before = model.run(ids, save=sites, stop_at=sites[2])
    moved = torch.randn(before[sites[0]].shape, generator=torch.Generator().manual_seed(0)).to(before[sites[0]])
    after = model.run(ids, save=sites[2], edits={sites[0]: lambda post: post + moved}, stop_at=sites[2])
    wanted = experts.wrote(moved.transpose(1, 2).flatten(0, 1), before[sites[1]].flatten(0, 1)).double()
    found = (after[sites[2]] - before[sites[2]]).flatten(0, 1).double()
    scale = float((wanted * found).sum() / wanted.square().sum().clamp_min(1e-30))
    if float((found - scale * wanted).norm()) > 1e-2 * float(found.norm()):
        raise WeightsError(
            f"what the experts of layer {layer} of {model.name} write does not reach the stream as it is: a norm or "
            "another map stands between, so a neuron's direction in the stream depends on the token"
        )
    return 1.0 if abs(scale - 1) < 1e-3 else scale


__all__ = ["Experts", "Given", "Neurons", "experts_of", "neurons_written"]
