"""dictionary_learning: a folder a trainer with config.json and ae.pt, a pickled state dict.

    AutoEncoder              bias, encoder.weight [n, d], encoder.bias, decoder.weight [d, n]; relu; takes `bias` off
    AutoEncoderNew           encoder.weight, encoder.bias, decoder.weight, decoder.bias; relu; takes nothing off
    GatedAutoEncoder         decoder_bias, encoder.weight, decoder.weight, gate_bias, mag_bias, r_mag; takes it off
    AutoEncoderTopK          b_dec, encoder.weight, encoder.bias, decoder.weight, k, threshold; takes b_dec off
    BatchTopKSAE             the same; used with one threshold for all latents
    MatryoshkaBatchTopKSAE   W_enc [d, n], b_enc, W_dec [n, d], b_dec, k, threshold, group_sizes; takes b_dec off
    JumpReluAutoEncoder      W_enc [d, n], b_enc, W_dec [n, d], b_dec, threshold [n]; takes nothing off

A pickle can run code when it is opened, so `read` wants ae.safetensors: `convert(folder)` writes it beside ae.pt,
through torch's loader of plain tensors (weights_only). `write` makes both, for the package reads ae.pt alone.

Source: github.com/saprmarks/dictionary_learning, dictionary_learning/dictionary.py, trainers/*.py, training.py
(biases are scaled back to the site's units before saving) and utils.py (`load_dictionary`), 0.1.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.files.building import build, parts_of, uncentred
from mechscope.dictionaries.files.description import Description, Settings
from mechscope.dictionaries.files.hooks import from_words
from mechscope.dictionaries.files.raw import Tensors, json_of
from mechscope.errors import DictionaryError, UnsafeFileError

NAME = "dictionary_learning"
WEIGHTS, PICKLE, CONFIG = "ae.safetensors", "ae.pt", "config.json"

_CLASSES = {
    "AutoEncoder": "ReLU",
    "AutoEncoderNew": "ReLU",
    "GatedAutoEncoder": "Gated",
    "AutoEncoderTopK": "TopK",
    "BatchTopKSAE": "BatchTopK",
    "MatryoshkaBatchTopKSAE": "Matryoshka",
    "JumpReluAutoEncoder": "JumpReLU",
}
_UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")

# What trainers write down that changes nothing about how a dictionary is used.
_HARMLESS = set(
    """
    trainer_class lr steps seed device wandb_name l1_penalty l1_warmup_steps warmup_steps resample_steps
    sparsity_warmup_steps sparsity_penalty decay_start auxk_alpha threshold_beta threshold_start_step top_k_aux
    bandwidth target_l0 norm_factor sparsity_function p_start p_end anneal_start anneal_end sparsity_queue_length
    n_sparsity_updates initial_sparsity_penalty initial_p l1_penalty_end group_weights dataset ctx_len
    """.split()  # noqa: SIM905
)


def recognise(path: Path) -> bool:
    """This says whether a folder is of this layout."""
    if not (path / CONFIG).is_file() or not ((path / WEIGHTS).is_file() or (path / PICKLE).is_file()):
        return False
    return "trainer" in json_of(path / CONFIG)


def describe(path: Path) -> Description:
    """This is what the folder holds, from its config (an ae.pt is not opened)."""
    values, notes = json_of(path / CONFIG), []
    trainer = Settings(values.get("trainer") or {}, path / CONFIG, notes)
    buffer = values.get("buffer") or {}
    named = trainer.take("dict_class")
    if named not in _CLASSES:
        raise DictionaryError(f"'{path / CONFIG}' has dict_class '{named}'; those read are {', '.join(_CLASSES)}")
    d, n = trainer.take("activation_dim"), trainer.take("dict_size")
    layer, words = trainer.take("layer", None), trainer.take("submodule_name", None)
    site = from_words(words, layer)
    if site is None and isinstance(layer, int):
        site = f"blocks.{layer}.resid_post"
        notes.append(f"the config names layer {layer} and no submodule: taken as {site}")
    if site is None:
        notes.append("the config names no place in a model: give site='blocks.3.resid_post' or the like")
    if site is not None and buffer.get("io") == "in":
        site = {"resid_post": "resid_pre", "mlp_out": "ln2"}.get(site.rsplit(".", 1)[1], "")
        site = f"blocks.{layer}.{site}" if site else None
    options: dict[str, Any] = {}
    if named in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        options["k"] = int(trainer.take("k"))
    if named == "MatryoshkaBatchTopKSAE":
        fractions = trainer.take("group_fractions", None)
        options["sizes"] = trainer.take("group_sizes", None) or (
            Tensors(path / WEIGHTS)["group_sizes"].tolist() if (path / WEIGHTS).is_file() else None
        )
        if options["sizes"] is None:
            notes.append(f"group sizes lie in the weights (group_fractions = {fractions})")
            del options["sizes"]
        else:
            options["sizes"] = _ends(options["sizes"])
    dtype = str(Tensors(path / WEIGHTS).dtype(_encoder(named))) if (path / WEIGHTS).is_file() else "float32"
    described = Description(
        NAME, path, _CLASSES[named], d, n, d, site, site, centred=named not in _UNCENTRED, options=options,
        dtype=dtype.removeprefix("torch."), model=trainer.take("lm_name", None), config=values, assumptions=notes,
    )  # fmt: skip
    if buffer.get("ctx_len") is not None:
        described.facts["context"] = buffer["ctx_len"]
    described.assume("the scale of inputs in training (norm_factor) is folded into the biases, as the trainer saves it")
    if buffer.get("rescale_acts"):
        described.assume(
            "the buffer rescaled activations (rescale_acts), and the file does not say by how much: taken as 1"
        )
    described.assume(
        "the config does not say which tokens were left out of training; the package's buffer drops BOS on request"
    )
    return described


def _encoder(named: str) -> str:
    return "W_enc" if named in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE") else "encoder.weight"


def _ends(groups: list[int]) -> list[int]:
    """This is the widths of the nested dictionaries that groups of latents add up to."""
    return torch.tensor(groups).cumsum(0).tolist()


def read(path: Path, described: Description) -> Dictionary:
    """This is the dictionary. Raises UnsafeFileError where there is only a pickle."""
    if not (path / WEIGHTS).is_file():
        raise UnsafeFileError(
            f"'{path / PICKLE}' is a pickle, and opening one can run code. If you trust it: "
            f"mechscope.dictionaries.convert({str(path)!r}) writes {WEIGHTS} beside it, and this reads that"
        )
    held = Tensors(path / WEIGHTS).all()
    parts = _parts(held)
    if described.config["trainer"]["dict_class"] == "AutoEncoder":
        norms = parts["W_dec"].norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):
            described.assume("the decoder's norms were folded into the encoder, as the package does on loading")
            parts["W_dec"] = parts["W_dec"] / norms[:, None]
            parts |= {"W_enc": parts["W_enc"] * norms[:, None], "b_enc": parts["b_enc"] * norms}
    if described.architecture in ("BatchTopK", "Matryoshka"):
        if float(held["threshold"]) < 0:
            described.assume("the threshold was never set in training (-1): every positive pre-activation counts")
        parts["threshold"] = held["threshold"].float().clamp_min(0).flatten().expand(described.n_latents)
    if described.architecture == "Matryoshka" and "sizes" not in described.options:
        described.options["sizes"] = _ends(held["group_sizes"].tolist())
    if "k" in described.options and "k" in held and int(held["k"]) != described.options["k"]:
        raise DictionaryError(f"'{path}': the config says k = {described.options['k']}, the weights {int(held['k'])}")
    return build(described, parts)


_RENAMED = {
    "W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "bias": "b_dec", "decoder_bias": "b_dec",
    "decoder.bias": "b_dec", "encoder.bias": "b_enc", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag",
}  # fmt: skip


def _parts(held: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {_RENAMED[name]: value.float() for name, value in held.items() if name in _RENAMED}
    if "encoder.weight" in held:
        parts |= {"W_enc": held["encoder.weight"].float(), "W_dec": held["decoder.weight"].float().T}
    else:
        parts["W_enc"] = parts["W_enc"].T
    if "threshold" in held and held["threshold"].numel() > 1:
        parts["threshold"] = held["threshold"].float()
    return parts


def convert(path: str | Path) -> Path:
    """This writes ae.safetensors beside a folder's ae.pt, for you to read it, and returns the folder.

    A pickle is opened by torch's restricted loader, which makes tensors and plain values and nothing else. A folder
    with other state dicts (*.pt) has each converted to safetensors of the same name.

    Raises UnsafeFileError where a file holds more than tensors.
    """
    folder = Path(path)
    pickles = sorted(folder.glob("*.pt")) if folder.is_dir() else [folder]
    if not pickles or not pickles[0].is_file():
        raise DictionaryError(f"'{folder}' holds no .pt file to convert")
    for pickled in pickles:
        try:
            held = torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises UnpicklingError, RuntimeError or EOFError, by what it meets
            raise UnsafeFileError(f"'{pickled}' holds more than tensors, and is not opened ({error!s:.200})") from error
        tensors = (
            {name: value for name, value in held.items() if isinstance(value, Tensor)} if isinstance(held, dict) else {}
        )
        if not tensors:
            raise DictionaryError(f"'{pickled}' is no state dict: a dict of tensors was expected")
        save_file(
            {name: value.contiguous().clone() for name, value in tensors.items()}, pickled.with_suffix(".safetensors")
        )
    return folder if folder.is_dir() else folder.parent


def write(dictionary: Dictionary, path: Path) -> Path:
    """This writes config.json, ae.safetensors and ae.pt, which the package reads: `load_dictionary(path, device)`."""
    classes = {ours: theirs for theirs, ours in _CLASSES.items() if theirs != "AutoEncoderNew"}
    classes["PAnnealing"] = "AutoEncoder"
    parts, coder, per_vector = parts_of(dictionary, NAME, classes)
    named = classes[type(coder).__name__]
    if named == "AutoEncoder" and not coder.centred:
        named = "AutoEncoderNew"
    if named == "JumpReluAutoEncoder" and coder.centred:
        parts = uncentred(parts, coder)
    elif coder.centred is (named in _UNCENTRED) or coder.skip or per_vector or coder.d_in != coder.d_out:
        raise DictionaryError(
            f"{NAME} has no {type(coder).__name__} that "
            f"{'skips' if coder.skip else 'transcodes, or leaves b_dec on its input'}; write it with layout='saelens'"
        )
    tensors = _state(named, parts, coder)
    options = {"k": coder.options()["k"]} if "k" in coder.options() else {}
    old = dictionary.facts.get("config") if dictionary.facts.get("layout") == NAME else None
    trainer = {**((old or {}).get("trainer") or {}), "dict_class": named, "activation_dim": coder.d_in}
    trainer |= {"dict_size": coder.n_latents, "lm_name": dictionary.facts.get("model"), **options}
    if isinstance(coder.reads, str) and coder.reads.startswith("blocks."):
        _, layer, short = coder.reads.split(".")
        trainer |= {"layer": int(layer), "submodule_name": f"{short}_layer_{layer}"}
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / WEIGHTS)
    torch.save({name: value.clone() for name, value in tensors.items()}, path / PICKLE)
    (path / CONFIG).write_text(json.dumps({**(old or {"buffer": {}}), "trainer": trainer}, indent=1), encoding="utf-8")
    return path


def _state(named: str, parts: dict[str, Tensor], coder: Any) -> dict[str, Tensor]:
    """This is the parts under the names of a class of the package."""
    if named in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        state = {"W_enc": parts["W_enc"].T, **{name: parts[name] for name in ("b_enc", "W_dec", "b_dec")}}
    else:
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
        state = {"encoder.weight": parts["W_enc"], "decoder.weight": parts["W_dec"].T}
        state[bias.get(named, "b_dec")] = parts["b_dec"]
        if named == "GatedAutoEncoder":
            return state | {"gate_bias": parts["b_gate"], "mag_bias": parts["b_mag"], "r_mag": parts["r_mag"]}
        state["encoder.bias"] = parts["b_enc"]
    if named == "JumpReluAutoEncoder":
        state["threshold"] = parts["threshold"]
    elif named not in ("AutoEncoder", "AutoEncoderNew"):
        state["k"] = torch.tensor(coder.options()["k"], dtype=torch.int)
        state["threshold"] = torch.tensor(-1.0) if named == "AutoEncoderTopK" else parts["threshold"][0].clone()
    if named == "MatryoshkaBatchTopKSAE":
        ends = coder.options()["sizes"]
        state["group_sizes"] = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)])
    return state
