"""EleutherAI's sparsify: a folder a hookpoint with cfg.json and sae.safetensors, TopK, autoencoders and transcoders.

    encoder.weight [n, d], encoder.bias [n], W_dec [n, d], b_dec [d], W_skip [d, d]
    features = TopK(relu(encoder(x - b_dec)))      transcoders do not take b_dec off
    x_hat = features @ W_dec + b_dec (+ x @ W_skip.T)

The folder is named after the module of the Hugging Face model: layers.5.mlp, gpt_neox.layers.9, embed_tokens.

Source: github.com/EleutherAI/sparsify, sparsify/sparse_coder.py, config.py and fused_encoder.py (eai-sparsify 1.3.3);
configs of EleutherAI/sae-pythia-160m-32k and sae-llama-3.1-8b-32x for the earlier keys.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.files.building import build, parts_of
from mechscope.dictionaries.files.description import Description, Settings
from mechscope.dictionaries.files.hooks import from_module
from mechscope.dictionaries.files.raw import Tensors, json_of
from mechscope.errors import DictionaryError

NAME = "sparsify"
WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"


def recognise(path: Path) -> bool:
    """This says whether a folder is of this layout."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def describe(path: Path) -> Description:
    """This is what the folder holds, from its config, its name and the header of its weights."""
    values, notes = json_of(path / CONFIG), []
    settings, heads = Settings(values, path / CONFIG, notes), Tensors(path / WEIGHTS)
    d_in, k = settings.take("d_in"), settings.take("k")
    n_latents, width = heads.shape("encoder.weight")
    told = settings.take("num_latents", 0) or d_in * settings.take("expansion_factor", 0)
    if width != d_in or (told and told != n_latents):
        raise DictionaryError(
            f"'{path / CONFIG}' says {told} latents of width {d_in}, while encoder.weight is {[n_latents, width]}"
        )
    if (activation := settings.take("activation", "topk")) != "topk":
        raise DictionaryError(f"'{path / CONFIG}' has the activation '{activation}'; mechscope reads topk alone")
    if settings.take("signed", False):
        raise DictionaryError(
            f"'{path}' selects by size and keeps signs (signed TopK), which mechscope has no class for"
        )
    transcodes = settings.take("transcode", "W_skip" in heads)
    if "transcode" not in values:
        notes.append(f"the config does not say whether it transcodes: {'it does' if transcodes else 'it does not'}")
    settings.take("skip_connection", False)
    settings.unknown({"expansion_factor", "normalize_decoder", "multi_topk"})

    name = path.resolve().name
    writes, about = from_module(name)
    notes += about
    reads = from_module(name, "input")[0] if transcodes else writes
    about_model = path.resolve().parent / "config.json"
    run = json_of(about_model) if about_model.is_file() else {}
    if "encoder.bias" not in heads:
        notes.append("the file holds no encoder bias: taken as 0")
    described = Description(
        NAME, path, "TopK", d_in, n_latents, heads.shape("W_dec")[1], reads, writes, centred=not transcodes,
        skip="W_skip" in heads, options={"k": int(k)}, dtype=str(heads.dtype("W_dec")).removeprefix("torch."),
        model=run.get("model"), config=values, assumptions=notes,
    )  # fmt: skip
    if run.get("exclude_tokens"):
        described.assume("the tokens of exclude_tokens were left out of training: leave them out when you measure")
    else:
        described.assume(
            "every token was trained on, special ones too, where the run's config.json does not exclude any"
        )
    if run.get("dataset"):
        described.facts["dataset"] = run["dataset"]
    return described


def read(path: Path, described: Description) -> Dictionary:
    """This is the dictionary."""
    held = {name: value.float() for name, value in Tensors(path / WEIGHTS).all().items()}
    parts = {
        "W_enc": held["encoder.weight"],
        "b_enc": held.get("encoder.bias", torch.zeros(described.n_latents)),
        "W_dec": held["W_dec"],
        "b_dec": held["b_dec"],
    }
    return build(described, parts | ({"W_skip": held["W_skip"]} if described.skip else {}))


def write(dictionary: Dictionary, path: Path) -> Path:
    """This writes a hookpoint's folder, which sparsify reads with `SparseCoder.load_from_disk(path)`.

    Name it after the module: layers.5.mlp. The package writes vectors as wide as it reads.
    """
    parts, coder, per_vector = parts_of(dictionary, NAME, ("TopK",))
    plain_sae = not coder.centred and coder.reads == coder.writes and coder.reads is not None
    if coder.d_in != coder.d_out or per_vector or plain_sae:
        why = "an autoencoder takes b_dec off its input" if plain_sae else "vectors are read and written as they are"
        raise DictionaryError(f"sparsify's files do not hold this dictionary ({why}); write it with layout='saelens'")
    config = {
        "activation": "topk",
        "expansion_factor": max(1, coder.n_latents // coder.d_in),
        "normalize_decoder": True,
        "num_latents": coder.n_latents,
        "k": coder.options()["k"],
        "multi_topk": False,
        "skip_connection": coder.skip,
        "transcode": not coder.centred,
        "d_in": coder.d_in,
    }
    tensors = {"encoder.weight": parts["W_enc"], "encoder.bias": parts["b_enc"]}
    tensors |= {name: parts[name] for name in ("W_dec", "b_dec", "W_skip") if name in parts}
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path
