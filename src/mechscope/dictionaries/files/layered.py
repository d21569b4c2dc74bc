"""Cross-layer transcoders from files that hold a layer's parts each, and back.

A layer's parts: W_enc [n, d_in], b_enc [n], threshold [n] or none (ReLU), W_dec [n, layers - i, d_out], what its
features write to layer i and the later ones, b_dec [d_out], and W_skip [d_out, d_in] or none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechscope.dictionaries.cross_layer import CrossLayerTranscoder
from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.files.building import facts_of, own_parts, set_part, thresholded
from mechscope.dictionaries.files.description import Description
from mechscope.errors import DictionaryError


@torch.no_grad()
def build_layered(described: Description, parts: list[dict[str, Tensor]]) -> Dictionary:
    """This is the cross-layer transcoder of a description and the parts of each layer.

    Raises DictionaryError where a part has another shape than the description says, or holds no numbers.
    """
    layers, n = described.options["n_layers"], described.options["per_layer"]
    made = CrossLayerTranscoder(
        layers,
        described.d_in,
        n,
        described.d_out,
        architecture=described.options["architecture"],
        skip=described.skip,
        reads=described.reads,  # type: ignore[arg-type]
        writes=described.writes,  # type: ignore[arg-type]
    )
    wanted = {"W_enc": (n, described.d_in), "b_enc": (n,), "threshold": (n,), "b_dec": (described.d_out,)}
    wanted["W_skip"] = (described.d_out, described.d_in)
    for at, (layer, held) in enumerate(zip(made.parts_of(), parts)):
        for name, shape in {**wanted, "W_dec": (n, layers - at, described.d_out)}.items():
            if name in held and (tuple(held[name].shape) != shape or not held[name].isfinite().all()):
                raise DictionaryError(
                    f"'{described.path}' ({described.layout}): '{name}' of layer {at} is {list(held[name].shape)}, and "
                    f"{list(shape)} was expected, of finite numbers"
                )
        for name in ("W_enc", "b_enc", *(["threshold"] if described.options["architecture"] == "JumpReLU" else [])):
            set_part(layer, name, held[name] * described.scale if name == "W_enc" else held[name])
        layer.W_dec.copy_(held["W_dec"].flatten(1))
        made.b_dec[at] = held["b_dec"]
        if made.W_skip is not None:
            made.W_skip[at] = held["W_skip"] * described.scale
    made.facts = facts_of(described)
    return made.eval()


@torch.no_grad()
def layered_parts_of(dictionary: Dictionary, layout: str) -> list[dict[str, Tensor]]:
    """This is the parts of each layer of a cross-layer transcoder, with its scales folded in."""
    if not isinstance(dictionary, CrossLayerTranscoder) or dictionary.architecture not in thresholded:
        held = getattr(dictionary, "architecture", type(dictionary).__name__)
        raise DictionaryError(
            f"{layout} files hold cross-layer transcoders of {', '.join(thresholded)}, not {held}; "
            "dictionary.save('dictionary.safetensors') keeps every kind"
        )
    scales = dictionary.scale_out.detach().cpu().squeeze(1)
    out = []
    for at, layer in enumerate(dictionary.parts_of()):
        held = {name: value.detach().cpu().float() for name, value in own_parts(layer).items()}
        s_in = layer.scale_in.cpu()
        W_dec = held["W_dec"].unflatten(1, (-1, dictionary.d_out)) / scales[at:, None]
        parts = {"W_enc": held["W_enc"] * s_in, "b_enc": held["b_enc"], "W_dec": W_dec}
        if dictionary.architecture not in ("ReLU", "PAnnealing"):
            parts["threshold"] = held["threshold"]
        parts["b_dec"] = dictionary.b_dec.detach()[at].cpu().float() / scales[at]
        if dictionary.W_skip is not None:
            parts["W_skip"] = dictionary.W_skip.detach()[at].cpu().float() * s_in / scales[at]
        out.append(parts)
    return out
