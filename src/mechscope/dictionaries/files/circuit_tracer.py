"""circuit-tracer: a folder with config.yaml and the transcoders of every layer of a model.

    model_kind: transcoder_set            layer_0.safetensors ...: W_enc [n, d], b_enc, W_dec [n, d], b_dec, and at
                                          times activation_function.threshold [n] (JumpReLU), W_skip [d_out, d_in]
    model_kind: cross_layer_transcoder    W_enc_0.safetensors ...: W_enc_0 [n, d], b_enc_0, b_dec_0, threshold_0 [n];
                                          W_dec_0.safetensors ...: W_dec_0 [n, layers - 0, d]
    features = relu or jumprelu (x @ W_enc.T + b_enc);  x_hat = features @ W_dec + b_dec (+ x @ W_skip.T)

Features of layer i of a cross-layer transcoder write layers i, i + 1 ...: x_hat[l] = sum over i of features[i] @
W_dec_i[:, l - i] + b_dec[l]. `config.yaml` names the hooks that every layer reads and writes.

Source: github.com/safety-research/circuit-tracer, circuit_tracer/transcoder/single_layer_transcoder.py,
cross_layer_transcoder.py and utils/hf_utils.py (0.5.0); configs of mntss/gemma-scope-transcoders and mwhanna's Qwen 3.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.files import gemma_scope, gemma_scope_2
from mechscope.dictionaries.files.building import build, parts_of, thresholded, uncentred
from mechscope.dictionaries.files.description import Description, Settings
from mechscope.dictionaries.files.hooks import from_hook, to_hook
from mechscope.dictionaries.files.layered import build_layered, layered_parts_of
from mechscope.dictionaries.files.raw import Tensors, names_in, yaml_of
from mechscope.errors import DictionaryError

NAME = "circuit-tracer"
CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"


def recognise(path: Path) -> bool:
    """This says whether a folder is of this layout, or a file is one layer's transcoder."""
    if path.is_file():
        return re.fullmatch(r"layer_\d+\.safetensors", path.name) is not None
    if (path / CONFIG).is_file():
        return "model_kind" in yaml_of(path / CONFIG)
    return (path / "layer_0.safetensors").is_file() or (path / "W_enc_0.safetensors").is_file()


def describe(path: Path) -> Description | dict[str, Description]:
    """This is what the folder holds: one description of a cross-layer transcoder, or one for each layer."""
    notes: list[str] = []
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG).is_file():
        values = yaml_of(folder / CONFIG)
    else:
        values = {}
        notes.append(
            "there is no config.yaml: taken to read hook_resid_mid and to write hook_mlp_out, the package's default"
        )
    settings = Settings(values, folder / CONFIG, notes)
    across = folder / "W_enc_0.safetensors"
    kind = settings.take("model_kind", "cross_layer_transcoder" if across.is_file() else "transcoder_set")
    hooks = (
        settings.take("feature_input_hook", "hook_resid_mid"),
        settings.take("feature_output_hook", "hook_mlp_out"),
    )
    model, listed = settings.take("model_name", None), settings.take("transcoders", None)
    activation = settings.take("activation", None)
    settings.unknown({"scan", "repo_id", "revision", "subfolder"})
    if activation not in (None, "relu", "jump_relu", "jumprelu"):
        raise DictionaryError(f"'{folder / CONFIG}' has the activation '{activation}'; relu and jump_relu are read")
    base = {"model": model, "config": values}
    if kind == "cross_layer_transcoder":
        return _across(folder, hooks, notes, base)
    if kind != "transcoder_set":
        raise DictionaryError(
            f"'{folder / CONFIG}' has model_kind '{kind}'; transcoder_set and cross_layer_transcoder are read"
        )
    if path.is_file():
        layer = int(path.stem.rsplit("_", 1)[1])
        return _layer(path, layer, hooks, list(notes), base)
    files = _listed(folder, listed) if listed else _numbered(folder)
    found = [_layer(file, layer, hooks, list(notes), base) for layer, file in enumerate(files)]
    return {str(described.writes or layer): described for layer, described in enumerate(found)}


def _numbered(folder: Path) -> list[Path]:
    count = len(list(folder.glob("layer_*.safetensors")))
    files = [folder / f"layer_{layer}.safetensors" for layer in range(count)]
    if not count or not all(file.is_file() for file in files):
        raise DictionaryError(
            f"'{folder}' lacks layer_0.safetensors, layer_1.safetensors ... in a row. {names_in(folder)}"
        )
    return files


def _listed(folder: Path, listed: list[str]) -> list[Path]:
    """This is the local files of the config's list; hub addresses are looked for by their path under the folder."""
    files = []
    for name in listed:
        tail = re.sub(r"^hf://[^/]+/[^/?]+/|\?.*$", "", name)
        whole = re.sub(r"^hf://|\?.*$", "", name)
        found = next((folder / part for part in (tail, whole) if (folder / part).is_file()), None)
        if found is None:
            raise DictionaryError(
                f"'{folder / CONFIG}' names '{name}', and nothing is downloaded: put the file at '{folder / tail}'"
            )
        files.append(found)
    return files


def _sites(layer: int, hooks: tuple[str, str], notes: list[str]) -> tuple[str | None, str | None]:
    (reads, first), (writes, second) = (from_hook(f"blocks.{layer}.{hook}") for hook in hooks)
    notes += [*first, *second]
    return reads, writes


def _layer(path: Path, layer: int, hooks: tuple[str, str], notes: list[str], base: dict[str, Any]) -> Description:
    reads, writes = _sites(layer, hooks, notes)
    if path.suffix == ".npz" or "w_enc" in Tensors(path):
        return _google(path, reads, writes, notes, base)
    heads = Tensors(path)
    n, d_in = heads.shape("W_enc")
    return Description(
        NAME, path, "JumpReLU" if THRESHOLD in heads else "ReLU", d_in, n, heads.shape("W_dec")[1], reads, writes,
        skip="W_skip" in heads, dtype=str(heads.dtype("W_dec")).removeprefix("torch."), assumptions=notes, **base,
    )  # fmt: skip


def _google(path: Path, reads: str | None, writes: str | None, notes: list[str], base: dict[str, Any]) -> Description:
    """This is a transcoder of Gemma Scope that the set's config points to."""
    old = path.suffix == ".npz"
    heads = Tensors(path)
    d_in, n = heads.shape("W_enc" if old else "w_enc")
    d_out = heads.shape("W_dec" if old else "w_dec")[1]
    notes.append(gemma_scope.NO_BOS)
    return Description(
        NAME, path, "JumpReLU", d_in, n, d_out, reads, writes, skip="affine_skip_connection" in heads,
        dtype="float32", assumptions=notes, **base,
    )  # fmt: skip


def _across(folder: Path, hooks: tuple[str, str], notes: list[str], base: dict[str, Any]) -> Description:
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    heads, decoder = Tensors(folder / "W_enc_0.safetensors"), Tensors(folder / "W_dec_0.safetensors")
    n, d_in = heads.shape("W_enc_0")
    _, spans, d_out = decoder.shape("W_dec_0")
    if spans != layers:
        raise DictionaryError(
            f"'{folder}': features of layer 0 write {spans} layers, and there are {layers} W_enc files"
        )
    options = {"n_layers": layers, "per_layer": n, "architecture": "JumpReLU" if "threshold_0" in heads else "ReLU"}
    sites = [_sites(layer, hooks, notes) for layer in range(layers)]
    reads, writes = ([pair[i] or "" for pair in sites] for i in (0, 1))
    described = Description(
        NAME, folder, "CrossLayerTranscoder", d_in, layers * n, d_out, reads, writes, options=options,
        dtype=str(heads.dtype("W_enc_0")).removeprefix("torch."), **base,
    )  # fmt: skip
    described.assume(*notes)
    return described


def read(path: Path, described: Description) -> Dictionary:
    """This is one dictionary: a layer's transcoder, or the cross-layer transcoder."""
    if described.architecture == "CrossLayerTranscoder":
        return build_layered(described, [_cross(described.path, i) for i in range(described.options["n_layers"])])
    if described.path.suffix == ".npz":
        held = {name: value.float() for name, value in Tensors(described.path).all().items()}
        return build(described, {**held, "W_enc": held["W_enc"].T})
    held = Tensors(described.path).all()
    if "w_enc" in held:
        return build(described, gemma_scope_2.parts_from(held))
    parts = {name: value.float() for name, value in held.items()}
    if THRESHOLD in parts:
        parts["threshold"] = parts.pop(THRESHOLD)
    return build(described, parts)


def _cross(folder: Path, layer: int) -> dict[str, Any]:
    held = Tensors(folder / f"W_enc_{layer}.safetensors").all() | Tensors(folder / f"W_dec_{layer}.safetensors").all()
    return {name.removesuffix(f"_{layer}"): value.float() for name, value in held.items()}


def write(dictionary: Dictionary | dict[str, Dictionary], path: Path) -> Path:
    """This writes transcoders, one for each layer from 0, or a cross-layer transcoder, with their config.yaml."""
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(dictionary, Dictionary) and type(dictionary).__name__ == "CrossLayerTranscoder":
        return _write_across(dictionary, path)
    whole = list(dictionary.values()) if isinstance(dictionary, dict) else [dictionary]
    for layer, one in enumerate(whole):
        parts, coder, per_vector = parts_of(one, NAME, thresholded)
        if per_vector:
            raise DictionaryError(f"{NAME} files hold no normalisation of each vector; write it with layout='saelens'")
        parts = uncentred(parts, coder)
        if type(coder).__name__ not in ("ReLU", "PAnnealing"):
            parts[THRESHOLD] = parts["threshold"]
        parts.pop("threshold", None)
        save_file({name: value.contiguous() for name, value in parts.items()}, path / f"layer_{layer}.safetensors")
    _write_config(path, "transcoder_set", whole[0])
    return path


def _write_across(dictionary: Dictionary, path: Path) -> Path:
    for layer, parts in enumerate(layered_parts_of(dictionary, NAME)):
        if "W_skip" in parts:
            raise DictionaryError(
                f"{NAME} reads no skip connection of a cross-layer transcoder; write it with layout='gemma-scope-2'"
            )
        decoder = {f"W_dec_{layer}": parts.pop("W_dec").contiguous()}
        save_file(
            {f"{name}_{layer}": value.contiguous() for name, value in parts.items()},
            path / f"W_enc_{layer}.safetensors",
        )
        save_file(decoder, path / f"W_dec_{layer}.safetensors")
    _write_config(path, "cross_layer_transcoder", dictionary)
    return path


def _write_config(path: Path, kind: str, one: Dictionary) -> None:
    first = [sites[0] if isinstance(sites, list) else sites for sites in (one.reads, one.writes)]
    hooks = [(to_hook(site) or "").split(".", 2)[-1] for site in first]
    settings = {"model_name": one.facts.get("model"), "model_kind": kind}
    settings |= {"feature_input_hook": hooks[0] or None, "feature_output_hook": hooks[1] or None}
    import yaml

    (path / CONFIG).write_text(
        yaml.safe_dump({k: v for k, v in settings.items() if v}, sort_keys=False), encoding="utf-8"
    )
