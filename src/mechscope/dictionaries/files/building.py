"""From a description and tensors to a dictionary, and back: the same few parts for every layout.

    W_enc [n, d_in], W_dec [n, d_out], b_dec [d_out], and b_enc [n] | b_gate, b_mag, r_mag [n] (Gated); threshold [n];
    W_skip [d_out, d_in]

A layout's reader turns its own orientation and names into these. Scales are folded into the weights both ways, with
b_dec, which a fold that forgets it leaves wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mechscope import dictionaries
from mechscope.dictionaries.batch_topk import MEMORY, BatchTopK
from mechscope.dictionaries.dictionary import Coder, Dictionary
from mechscope.dictionaries.files.description import Description
from mechscope.dictionaries.files.normed import Normed
from mechscope.dictionaries.gated import Gated
from mechscope.dictionaries.jump_relu import JumpReLU
from mechscope.errors import DictionaryError

thresholded = ("JumpReLU", "BatchTopK", "Matryoshka", "ReLU", "PAnnealing")
"""The architectures whose features are relu(pre) where pre is above a threshold."""


def build(described: Description, parts: dict[str, Tensor]) -> Dictionary:
    """This is the dictionary that a description and its parts make, held as float32 and ready for use.

    Raises DictionaryError where a part has another shape than the description says, or holds no numbers.
    """
    _check(described, parts)
    parts = _scaled(described, parts)
    made: Coder = getattr(dictionaries, described.architecture)(
        described.d_in,
        described.n_latents,
        None if described.centred else described.d_out,
        skip=described.skip,
        reads=described.reads,
        writes=described.writes,
        **described.options,
    )
    if described.architecture == "JumpReLU":
        below = int((parts["threshold"] < 0).sum())
        if below:
            described.assume(f"{below} thresholds are below 0: features are never negative, so they count as 0")
        if below > described.n_latents / 2:
            warnings.warn(
                f"'{described.path}': {below} of {described.n_latents} thresholds are below 0; if they are logarithms, "
                "rename the tensor to 'log_threshold'",
                stacklevel=5,
            )
    with torch.no_grad():
        for name, value in parts.items():
            set_part(made, name, value)
    whole = Normed(made, described.per_vector) if described.per_vector else made
    whole.facts = facts_of(described)
    return whole.eval()


def facts_of(described: Description) -> dict[str, Any]:
    """This is what a dictionary that was read carries on: where it comes from, and what was assumed."""
    kept: dict[str, Any] = {"layout": described.layout, "stored as": described.dtype, **described.facts}
    if described.model is not None:
        kept["model"] = described.model
    return {**kept, "config": described.config, "assumptions": described.assumptions}


def _check(described: Description, parts: dict[str, Tensor]) -> None:
    n, d_in, d_out = described.n_latents, described.d_in, described.d_out
    wanted = {"W_enc": (n, d_in), "W_dec": (n, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    wanted |= dict.fromkeys(("b_enc", "b_gate", "b_mag", "r_mag", "threshold"), (n,))
    gates = ("b_gate", "b_mag", "r_mag")
    needed = ["W_enc", "W_dec", "b_dec", *(gates if described.architecture == "Gated" else ("b_enc",))]
    needed += ["threshold"] * (described.architecture == "JumpReLU") + ["W_skip"] * described.skip
    for name in needed:
        if name not in parts:
            raise DictionaryError(
                f"'{described.path}' ({described.layout}) lacks '{name}' {list(wanted[name])}, which a "
                f"{described.architecture} dictionary needs; it gave {', '.join(parts)}"
            )
    for name, value in parts.items():
        if tuple(value.shape) != wanted[name]:
            raise DictionaryError(
                f"'{described.path}' ({described.layout}): '{name}' is {list(value.shape)}, and {list(wanted[name])} "
                f"was expected of {n} latents that read {d_in} and write {d_out}"
            )
        if not value.isfinite().all():
            raise DictionaryError(f"'{described.path}' ({described.layout}): '{name}' holds NaN or infinity")


def _scaled(described: Description, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """This is the parts with the scale s of the inputs in them: an autoencoder's outputs were scaled as well.

    act(W (s x - b)) = act(s W (x - b / s)), and (D f + b) / s = (D / s) f + b / s.
    """
    if (s := described.scale) == 1.0:
        return parts
    parts = {**parts, "W_enc": parts["W_enc"] * s}
    if described.is_transcoder:
        return parts | ({"W_skip": parts["W_skip"] * s} if "W_skip" in parts else {})
    return {**parts, "W_dec": parts["W_dec"] / s, "b_dec": parts["b_dec"] / s}


def parts_of(dictionary: Dictionary, layout: str, takes: Iterable[str]) -> tuple[dict[str, Tensor], Coder, str | None]:
    """This is a dictionary's parts with its scales folded in, itself, and the normalisation of each vector.

    takes: the architectures that the layout can hold; raises DictionaryError for another.
    """
    per_vector = dictionary.how if isinstance(dictionary, Normed) else None
    coder = dictionary.coder if isinstance(dictionary, Normed) else dictionary
    if not isinstance(coder, Coder) or type(coder).__name__ not in takes:
        raise DictionaryError(
            f"{layout} files hold {', '.join(takes)}, not {type(coder).__name__}; "
            f"dictionary.save('dictionary.safetensors') keeps every kind"
        )
    s_in, s_out = coder.scale_in.cpu(), coder.scale_out.cpu()
    if coder.centred and s_in != s_out:
        raise DictionaryError(
            f"this {type(coder).__name__} scales inputs by {float(s_in):.6g} and outputs by {float(s_out):.6g}; "
            f"{layout} files hold autoencoders with one scale. dictionary.save(...) keeps both"
        )
    parts = {name: value.detach().cpu().float() for name, value in own_parts(coder).items()}
    for name in ("W_enc", "W_skip"):
        if name in parts:
            parts[name] = parts[name] * s_in
    for name in ("W_dec", "b_dec", "W_skip"):
        if name in parts:
            parts[name] = parts[name] / s_out
    return parts, coder, per_vector


def uncentred(parts: dict[str, Tensor], coder: Coder) -> dict[str, Tensor]:
    """This is the parts of a dictionary that takes nothing off its input: W (x - b_dec) + b_enc, multiplied out."""
    if not coder.centred or not parts["b_dec"].any():
        return parts
    return {**parts, "b_enc": parts["b_enc"] - parts["W_enc"] @ parts["b_dec"]}


# The parts of each architecture


def set_part(made: Coder, name: str, value: Tensor) -> None:
    """This puts a part in its place: a gate's biases are b_enc, and JumpReLU trains the logarithm of its threshold."""
    if name == "b_gate":
        made.b_enc.copy_(value)
    elif name != "threshold":
        getattr(made, name).copy_(value)
    elif isinstance(made, JumpReLU):
        made.log_threshold.copy_(value.clamp_min(0).double().log())
    elif isinstance(made, BatchTopK):
        made.threshold.copy_(value[0])
        made.batches.fill_(MEMORY)  # training on goes from this threshold


def own_parts(coder: Coder) -> dict[str, Tensor]:
    """This is an architecture's parameters under the names of parts."""
    parts: dict[str, Tensor] = {"W_enc": coder.W_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    if coder.W_skip is not None:
        parts["W_skip"] = coder.W_skip
    if isinstance(coder, Gated):
        return parts | {"b_gate": coder.b_enc, "r_mag": coder.r_mag, "b_mag": coder.b_mag}
    parts["b_enc"] = coder.b_enc
    if isinstance(coder, JumpReLU):
        # In float64, so that what is read again has the same logarithm, to the last bit.
        parts["threshold"] = coder.log_threshold.double().exp()
    elif isinstance(coder, BatchTopK):
        parts["threshold"] = coder.threshold.expand(coder.n_latents)
    elif type(coder).__name__ in thresholded:
        parts["threshold"] = torch.zeros(coder.n_latents)
    return parts


@torch.no_grad()
def fold_gain(dictionary: Dictionary, gain: Tensor) -> Dictionary:
    """This makes a dictionary that was trained before a norm's gain read what comes after it, and returns it.

    gain: [d_in], what the norm multiplies by (for Gemma, 1 + weight). Gemma Scope's transcoders read the norm's output
    before the gain, as TransformerLens's ln2.hook_normalized gives it; the site `blocks.L.ln2` has the gain in it.

    Raises DictionaryError where the gain is of another width, or 0 somewhere, or where b_dec is taken off the input.
    """
    coder = dictionary.coder if isinstance(dictionary, Normed) else dictionary
    if not isinstance(coder, Coder) or coder.centred:
        raise DictionaryError("a gain is folded into a transcoder's encoder; this dictionary takes b_dec off its input")
    if gain.shape != (coder.d_in,) or not gain.all():
        raise DictionaryError(f"the gain is {list(gain.shape)}, and [{coder.d_in}] with no 0 in it was expected")
    for weight in (coder.W_enc, coder.W_skip):
        if weight is not None:
            weight.div_(gain.to(weight))
    kept = [what for what in dictionary.facts.get("assumptions", []) if "fold_gain" not in what]
    dictionary.facts["assumptions"] = [*kept, "the gain of the norm that it reads was folded into the encoder"]
    return dictionary
