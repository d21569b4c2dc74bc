"""Names of places in a model, as other packages write them, translated into mechscope's sites.

TransformerLens's hook names (SAELens, circuit-tracer), the paths of Hugging Face's modules (sparsify, Gemma Scope 2)
and dictionary_learning's own words all say the same few places. What has no site is None, with a sentence why.
"""

from __future__ import annotations

import re

from mechscope.models.sites import TRANSFORMER_LENS

MLP_IN = {"mlp.hook_in": "ln2", "ln2": "ln2", "ln2.hook_normalized": "ln2", "hook_mlp_in": "resid_mid"}
"""Hook names of what an MLP reads, which a transcoder reads."""

MLP_OUT = {"mlp.hook_out": "mlp_out"}

GAIN_APART = (
    "the file reads the output of the norm before its gain is applied (ln2.hook_normalized), while '{site}' has the "
    "gain in it: fold the gain in with mechscope.dictionaries.fold_gain(dictionary, gain)"
)

FLATTENED = "heads are flattened before encoding: z [batch, pos, head, d_head] as [..., head * d_head]"


def from_hook(name: str | None) -> tuple[str | None, list[str]]:
    """This is the site of a TransformerLens hook name, or of a Hugging Face module's path, and the assumptions made.

    >>> from_hook("blocks.8.hook_resid_pre")
    ('blocks.8.resid_pre', [])
    >>> from_hook("blocks.3.attn.hook_z")[0], from_hook("model.layers.28")[0]
    ('blocks.3.z', 'blocks.28.resid_post')
    """
    if not name:
        return None, ["the file names no place in a model; give site='blocks.3.resid_post' or the like"]
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+)", name)
    block, short = (match[1] or "", match[2]) if match else ("", name)
    table = {**TRANSFORMER_LENS, **(MLP_IN | MLP_OUT if block else {})}
    if short in table:
        site = block + table[short]
        notes = []
        if short == "ln2.hook_normalized":
            notes.append(GAIN_APART.format(site=site))
        if short in ("attn.hook_q", "attn.hook_k"):
            notes.append(f"'{name}' is taken before rotary embeddings where a model has them, '{site}' after")
        return site, notes
    return from_module(name)


def from_module(path: str, part: str = "output") -> tuple[str | None, list[str]]:
    """This is the site that a Hugging Face module reads (`part="input"`) or makes ("output").

    A path may end in ".input" or ".output", which wins over `part`.

    >>> from_module("model.layers.5.post_feedforward_layernorm.output")
    ('blocks.5.mlp_out', [])
    >>> from_module("layers.5.mlp", "input")[0]
    'blocks.5.ln2'
    """
    asked = path
    if (match := re.fullmatch(r"(.+)\.(input|output)", path)) is not None:
        path, part = match[1], match[2]
    if re.search(r"(^|\.)(embed_tokens|embed_in|wte)$", path):
        return "embed", []
    match = re.search(r"(?:^|\.)(?:layers|h|layer|blocks)[._](\d+)(?:\.(.+))?$", path)
    if match is None:
        return None, [f"'{asked}' has no site that is known; give site='blocks.3.resid_post' or the like"]
    layer, inner = match[1], match[2] or ""
    short = _INNER.get((inner, part))
    if short is None:
        return None, [f"'{asked}' has no site that is known; give site='blocks.{layer}.resid_post' or the like"]
    notes = []
    if (inner, part) in (("mlp", "output"), ("self_attn", "output"), ("attention", "output"), ("attn", "output")):
        notes.append(
            f"'{asked}' is read as 'blocks.{layer}.{short}': the same tensor unless the model normalises or scales it "
            "before it adds it to the stream"
        )
    if inner == "post_attention_layernorm":
        notes.append(
            f"'{asked}' is read as 'blocks.{layer}.ln2', as in Llama; in Gemma 2 and 3 it is 'blocks.{layer}.attn_out'"
        )
    return f"blocks.{layer}.{short}", notes


_ATTENTION = ("self_attn", "attention", "attn")
_INNER = {
    ("", "output"): "resid_post",
    ("", "input"): "resid_pre",
    ("mlp", "output"): "mlp_out",
    ("mlp", "input"): "ln2",
    ("post_feedforward_layernorm", "output"): "mlp_out",
    ("pre_feedforward_layernorm", "output"): "ln2",
    ("post_attention_layernorm", "output"): "ln2",
    ("input_layernorm", "output"): "ln1",
    ("mlp.down_proj", "input"): "mlp_post",
    ("mlp.c_proj", "input"): "mlp_post",
    **{(name, "output"): "attn_out" for name in _ATTENTION},
    **{(name, "input"): "ln1" for name in _ATTENTION},
    **{(f"{name}.{o}", "input"): "z" for name in _ATTENTION for o in ("o_proj", "c_proj", "dense", "out_proj")},
}
"""(the module inside its block, input or output) -> site."""

_SAE_WORDS = {
    "resid_post": "resid_post",
    "resid_pre": "resid_pre",
    "resid": "resid_post",
    "mlp_out": "mlp_out",
    "mlp": "mlp_out",
    "attention_out": "attn_out",
    "attn_out": "attn_out",
    "attn": "attn_out",
}


def from_words(text: str | None, layer: int | None = None) -> str | None:
    """This is the site that words like dictionary_learning's "resid_post_layer_12" or "mlp_out" and a layer name.

    >>> from_words("resid_post_layer_12"), from_words("mlp_out", 3), from_words("pretraining", 3)
    ('blocks.12.resid_post', 'blocks.3.mlp_out', None)
    """
    if not text:
        return None
    match = re.search(r"layer[_.]?(\d+)", text)
    layer = int(match[1]) if match else layer
    word = next((w for w in _SAE_WORDS if re.search(rf"(^|[^a-z]){w}([^a-z]|$)", text)), None)
    return f"blocks.{layer}.{_SAE_WORDS[word]}" if word and layer is not None else None


_TO_HOOK = {site: hook for hook, site in reversed(TRANSFORMER_LENS.items())} | {"ln2": "mlp.hook_in"}


def to_hook(site: str | list[str] | None) -> str | None:
    """This is the TransformerLens hook name of a site, or the site's own name where TransformerLens has none.

    >>> to_hook("blocks.8.resid_pre"), to_hook("blocks.3.ln2"), to_hook(None)
    ('blocks.8.hook_resid_pre', 'blocks.3.mlp.hook_in', None)
    """
    if not isinstance(site, str):
        return None
    block, _, short = site.rpartition(".")
    return f"{block}.{_TO_HOOK[short]}" if block and short in _TO_HOOK else _TO_HOOK.get(short, site)


_TO_MODULE = {
    "resid_post": "output",
    "mlp_out": "post_feedforward_layernorm.output",
    "ln2": "pre_feedforward_layernorm.output",
    "z": "self_attn.o_proj.input",
}


def to_module(site: str | list[str] | None) -> str | None:
    """This is where Gemma 3's modules hold a site, as Gemma Scope 2 names it, or None for another site.

    >>> to_module("blocks.5.ln2")
    'model.layers.5.pre_feedforward_layernorm.output'
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", site) if isinstance(site, str) else None
    return f"model.layers.{match[1]}.{_TO_MODULE[match[2]]}" if match and match[2] in _TO_MODULE else None
