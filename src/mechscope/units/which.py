"""Which tensor a detector calls a neuron: of a gated MLP the gate, the linear factor or their product; of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechscope.errors import UnitsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mechscope.models.model import Model

GATED = {
    "mlp_pre": "the gate, before its nonlinearity",
    "mlp_up": "the linear factor, without the gate",
    "mlp_post": "the product act(gate) * up, which the down projection reads",
}
PLAIN = {
    "mlp_pre": "the only projection, before its nonlinearity",
    "mlp_post": "the activation, which the down projection reads; the MLP is not gated",
}
EXPERT = "{} of every expert, 0 where the router did not send the token; the experts stand side by side"


def which_unit(model: Model, at: str | Sequence[str]) -> str:
    """This says in words which tensor the units of `at` are; of sites of several kinds, of the first of each.

    >>> which_unit(model, "blocks.*.mlp_post")  # doctest: +SKIP
    'mlp_post: the product act(gate) * up, which the down projection reads'
    """
    said: dict[str, str] = {}
    blocks = {block.prefix: block for block in model.anatomy.blocks}
    asked = [at] if isinstance(at, str) else at
    for request in (request for name in asked for request in model.resolve(name)):
        prefix, _, short = request.site.rpartition(".")
        block = blocks.get(prefix)
        if short == "expert_post" and block is not None and block.experts is not None:
            product = "the product act(gate) * up" if block.experts.gated else "the activation"
            said.setdefault(short, EXPERT.format(product))
        elif block is not None:
            said.setdefault(short, (GATED if "mlp_up" in block.places else PLAIN).get(short, "the site's own axis"))
        else:
            said.setdefault(short, "the site's own axis")
    return "; ".join(f"{short}: {words}" for short, words in said.items())


def neuron_site(model: Model, layer: int) -> str:
    """This is the site of a layer's neurons: its MLP's, or its experts' where it is a mixture."""
    block = model.anatomy.layers()[layer]
    return f"{block.prefix}.{'mlp_post' if block.experts is None else 'expert_post'}"


def neuron_sites(model: Model) -> list[str]:
    """This is the sites of all layers' neurons."""
    return [neuron_site(model, layer) for layer in range(model.n_layers)]


def expert_neuron(model: Model, layer: int, expert: int, neuron: int) -> str:
    """This is the name of an expert's neuron as every detector and the harvest write it: a site and a unit.

    Raises UnitsError for an expert or a neuron that is not there, and for a layer without experts that can be read.

    >>> expert_neuron(model, 1, expert=2, neuron=17)  # doctest: +SKIP
    'blocks.1.expert_post[65]'
    """
    blocks = model.anatomy.layers()
    if not 0 <= layer < len(blocks):
        raise UnitsError(f"{model.name} has no layer {layer}; it has {len(blocks)}.")
    block = blocks[layer]
    if block.experts is None:
        raise UnitsError(f"layer {layer} of {model.name} has no neurons of experts: {block.absent['expert_post']}.")
    number, size = block.experts.number, block.experts.size
    if not (0 <= expert < number and 0 <= neuron < size):
        raise UnitsError(
            f"layer {layer} of {model.name} has {number} experts of {size} neurons (0 to {size - 1}); there is no "
            f"neuron {neuron} of expert {expert}"
        )
    return f"{block.prefix}.expert_post[{expert * size + neuron}]"


__all__ = ["expert_neuron", "neuron_site", "neuron_sites", "which_unit"]
