"""Gemma Scope 2 (Gemma 3): params.safetensors and config.json a dictionary; a file a layer for what spans layers.

    one layer      w_enc [d_in, n], b_enc [n], threshold [n], w_dec [n, d_out], b_dec [d_out],
                   affine_skip_connection [d_in, d_out] in some transcoders: x_hat gains x @ affine_skip_connection
    many layers    params_layer_0.safetensors ...: w_enc [d, n], w_dec [n, layers, d], b_dec [d], ...; features of layer
                   i read layer i and write every layer from i on: x_hat[l] = sum over i of features[i] @ w_dec[i][:, l]

All are JumpReLU, relu(pre) * (pre > threshold), and take nothing off their input. Cross-layer transcoders read what
each MLP reads and write what it writes; the "weakly causal" crosscoders read and write four layers of the stream.

Sources: McDougall et al. 2025, Gemma Scope 2; huggingface.co/google/gemma-scope-2-1b-pt (configs, tutorial's
JumpReLUSAE and JumpReLUMultiLayerSAE); github.com/safety-research/circuit-tracer, load_gemma_scope_2_transcoder and
load_gemma_scope_2_clt; github.com/decoderesearch/SAELens, gemma_3_sae_huggingface_loader.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mechscope.dictionaries.cross_layer import CrossLayerTranscoder
from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.files.building import build, parts_of, thresholded, uncentred
from mechscope.dictionaries.files.description import Description, Settings
from mechscope.dictionaries.files.gemma_scope import NO_BOS
from mechscope.dictionaries.files.hooks import FLATTENED, from_module, to_module
from mechscope.dictionaries.files.layered import build_layered, layered_parts_of
from mechscope.dictionaries.files.raw import Tensors, json_of
from mechscope.errors import DictionaryError
from mechscope.models.token_mask import TokenMask

NAME = "gemma-scope-2"
WEIGHTS, LAYERS, CONFIG = "params.safetensors", "params_layer_{}.safetensors", "config.json"


def recognise(path: Path) -> bool:
    """This says whether a folder is of this layout."""
    return (path / WEIGHTS).is_file() or (path / LAYERS.format(0)).is_file()


def describe(path: Path) -> Description:
    """This is what the folder holds, from its config, its name and the headers of its weights."""
    notes: list[str] = []
    if (path / CONFIG).is_file():
        values = json_of(path / CONFIG)
    else:
        values = {}
        notes.append(
            "there is no config.json: model, kind and site are told from the folders' names, as far as they go"
        )
    settings = Settings(values, path / CONFIG, notes)
    named = settings.take("architecture", "jump_relu")
    if named != "jump_relu":
        raise DictionaryError(f"'{path / CONFIG}' has the architecture '{named}'; {NAME} files are jump_relu")
    if (path / WEIGHTS).is_file():
        described = _one(path, settings)
    else:
        described = _many(path, settings)
    for name in ("width", "affine_connection"):
        settings.take(name, None)
    if (sparsity := settings.take("l0", None)) is not None:
        described.facts["l0"] = sparsity
    described.config = values
    described.assume(NO_BOS)
    described.facts["mask"] = TokenMask(special=True).to_json()
    settings.unknown({"hf_hook_point_in", "hf_hook_point_out", "layers", "layer"})
    return described


def _model(settings: Settings, path: Path) -> str | None:
    name = settings.take("model_name", None)
    if name is None and (suite := re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)", str(path.resolve()))) is not None:
        name = f"google/gemma-3-{suite[1]}-{suite[2]}"
    return name


def _one(path: Path, settings: Settings) -> Description:
    heads = Tensors(path / WEIGHTS)
    (d_in, n), (_, d_out) = heads.shape("w_enc"), heads.shape("w_dec")
    full = str(path.resolve())
    kind = settings.take("type", None) or next(
        (word for word in ("transcoder", "resid_post", "attn_out", "mlp_out") if word in full), None
    )
    layer = re.search(r"layer_(\d+)", path.resolve().name)
    guessed = {
        "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
        "attn_out": ("self_attn.o_proj.input", None),
        "mlp_out": ("post_feedforward_layernorm.output", None),
        "resid_post": ("output", None),
    }.get(str(kind), (None, None))
    stem = f"model.layers.{layer[1]}." if layer else None
    read_at = settings.take("hf_hook_point_in", stem + guessed[0] if stem and guessed[0] else None)
    written = settings.take("hf_hook_point_out", stem + guessed[1] if stem and guessed[1] else None)
    reads, about = from_module(read_at) if read_at else (None, ["the file does not name its site: give site=..."])
    settings.notes.extend(about)
    writes = from_module(written)[0] if written and written != read_at else reads
    if str(reads).endswith(".z"):
        settings.notes.append(FLATTENED)
    return Description(
        NAME, path, "JumpReLU", d_in, n, d_out, reads, writes, skip="affine_skip_connection" in heads,
        dtype=str(heads.dtype("w_dec")).removeprefix("torch."), model=_model(settings, path),
        assumptions=settings.notes,
    )  # fmt: skip


def _many(path: Path, settings: Settings) -> Description:
    files = sorted(path.glob(LAYERS.format("*")), key=lambda file: int(file.stem.rsplit("_", 1)[1]))
    heads = Tensors(files[0])
    (d_in, n), (_, layers, d_out) = heads.shape("w_enc"), heads.shape("w_dec")
    if [file.name for file in files] != [LAYERS.format(i) for i in range(layers)]:
        raise DictionaryError(
            f"'{path}' is a dictionary of {layers} layers and lacks some of {LAYERS.format(0)} ... "
            f"{LAYERS.format(layers - 1)}; it has {len(files)}. Copy the missing ones"
        )
    full = str(path.resolve())
    kind = settings.take("type", None) or ("crosscoder" if "crosscoder" in full else "clt")
    of = re.search(r"layer_(\d+(?:_\d+)*)", path.resolve().name)
    numbers = [int(number) for number in of[1].split("_")] if of else list(range(layers))
    if len(numbers) != layers:
        settings.notes.append(f"the folder's name does not list {layers} layers: taken as 0 to {layers - 1}")
        numbers = list(range(layers))
    if kind == "crosscoder":
        reads = writes = [f"blocks.{number}.resid_post" for number in numbers]
    else:
        reads = [f"blocks.{number}.ln2" for number in numbers]
        writes = [f"blocks.{number}.mlp_out" for number in numbers]
    return Description(
        NAME, path, "CrossLayerTranscoder", d_in, layers * n, d_out, reads, writes,
        skip="affine_skip_connection" in heads,
        options={"n_layers": layers, "per_layer": n, "architecture": "JumpReLU"},
        dtype=str(heads.dtype("w_dec")).removeprefix("torch."),
        model=_model(settings, path), assumptions=settings.notes,
    )  # fmt: skip


def read(path: Path, described: Description) -> Dictionary:
    """This is the dictionary."""
    if (path / WEIGHTS).is_file():
        return build(described, parts_from(Tensors(path / WEIGHTS).all()))
    parts: list[dict[str, Any]] = []
    for layer in range(described.options["n_layers"]):
        held = Tensors(path / LAYERS.format(layer)).all()
        earlier = held["w_dec"][:, :layer]
        if earlier.numel() and earlier.any():
            described.assume(f"features of layer {layer} write earlier layers too; what they write there was left out")
        parts.append(parts_from({**held, "w_dec": held["w_dec"][:, layer:]}))
    return build_layered(described, parts)


def parts_from(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This is a file's tensors under our names and the way round that ours lie."""
    held = {name: value.float() for name, value in held.items()}
    parts = {"W_enc": held["w_enc"].T, "W_dec": held["w_dec"]}
    parts |= {name: held[name] for name in ("b_enc", "threshold", "b_dec")}
    skip = held.get("affine_skip_connection")
    return parts if skip is None else {**parts, "W_skip": skip.T}


def write(dictionary: Dictionary, path: Path) -> Path:
    """This writes a dictionary's folder: one file, or one for each layer of a cross-layer transcoder.

    What is centred has b_dec folded into b_enc; a plain ReLU gets the threshold 0.
    """
    path.mkdir(parents=True, exist_ok=True)
    about = {"architecture": "jump_relu", "model_name": dictionary.facts.get("model"), "width": dictionary.n_latents}
    if isinstance(dictionary, CrossLayerTranscoder):
        layers = layered_parts_of(dictionary, NAME)
        for at, parts in enumerate(layers):
            parts.setdefault("threshold", torch.zeros_like(parts["b_enc"]))
            earlier = parts["W_dec"].new_zeros(len(parts["W_dec"]), at, dictionary.d_out)
            tensors = _tensors({**parts, "W_dec": torch.cat([earlier, parts["W_dec"]], 1)})
            save_file(tensors, path / LAYERS.format(at))
        about["type"] = "crosscoder" if dictionary.reads == dictionary.writes else "clt"
        about["affine_connection"] = dictionary.W_skip is not None
    else:
        parts, coder, per_vector = parts_of(dictionary, NAME, thresholded)
        if per_vector:
            raise DictionaryError(f"{NAME} files hold no normalisation of each vector; write it with layout='saelens'")
        save_file(_tensors(uncentred(parts, coder)), path / WEIGHTS)
        about["affine_connection"] = coder.skip
        about |= {"hf_hook_point_in": to_module(coder.reads), "hf_hook_point_out": to_module(coder.writes)}
        if coder.reads == coder.writes:
            del about["hf_hook_point_out"]
    told = {name: value for name, value in about.items() if value is not None}
    (path / CONFIG).write_text(json.dumps(told, indent=1), encoding="utf-8")
    return path


def _tensors(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This is the inverse of `parts_from`."""
    tensors = {"w_enc": parts["W_enc"].T, "w_dec": parts["W_dec"]}
    tensors |= {name: parts[name] for name in ("b_enc", "threshold", "b_dec")}
    if "W_skip" in parts:
        tensors["affine_skip_connection"] = parts["W_skip"].T
    return {name: value.contiguous() for name, value in tensors.items()}
