"""Gemma Scope (Gemma 2): one params.npz a dictionary, JumpReLU, in folders like layer_12/width_16k/average_l0_82.

    W_enc [d_in, n], b_enc [n], threshold [n], W_dec [n, d_out], b_dec [d_out]
    features = relu(pre) * (pre > threshold), pre = x @ W_enc + b_enc;  x_hat = features @ W_dec + b_dec

The file holds no settings: model, site and layer are told from the names of the folders it lies in.

Sources: Lieberum et al. 2024, arXiv:2408.05147 (section 3; page 18 for where the transcoders read); the tutorial and
README of huggingface.co/google/gemma-scope and google/gemma-scope-2b-pt-transcoders.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.files.building import build, parts_of, thresholded, uncentred
from mechscope.dictionaries.files.description import Description
from mechscope.dictionaries.files.hooks import FLATTENED, GAIN_APART
from mechscope.dictionaries.files.raw import Tensors
from mechscope.errors import DictionaryError
from mechscope.models.token_mask import TokenMask

NAME = "gemma-scope"
WEIGHTS = "params.npz"

NO_BOS = "the BOS token was left out of training: leave the first position out when you measure"


def recognise(path: Path) -> bool:
    """This says whether a folder is of this layout, or a file is such a params.npz."""
    return path.suffix == ".npz" or (path / WEIGHTS).is_file()


def describe(path: Path) -> Description:
    """This is what the file holds, from the headers of its arrays and the names of its folders."""
    heads = Tensors(path if path.is_file() else path / WEIGHTS)
    names = _names(heads)
    d_in, n_latents = heads.shape(names["W_enc"])
    n, d_out = heads.shape(names["W_dec"])
    if n != n_latents:
        raise DictionaryError(
            f"'{heads.path}': W_enc is {[d_in, n_latents]} and W_dec {[n, d_out]}, where [d_in, n] and [n, d_out] were "
            "expected"
        )
    notes: list[str] = []
    reads, writes, model = _place(path.resolve(), notes)
    described = Description(
        NAME, path, "JumpReLU", d_in, n_latents, d_out, reads, writes,
        dtype=str(heads.dtype(names["W_dec"])).removeprefix("torch."), model=model, assumptions=notes,
    )  # fmt: skip
    described.assume(NO_BOS, "the normalisation of inputs in training is folded into the weights, as released")
    described.facts["mask"] = TokenMask(special=True).to_json()
    if (sparsity := re.search(r"average_l0_(\d+)", str(path.resolve()))) is not None:
        described.facts["l0"] = int(sparsity[1])
    return described


def _names(heads: Tensors) -> dict[str, str]:
    """This is our names to the file's; some files write w_enc for W_enc."""
    lower = {name.lower(): name for name in heads}
    return {name: lower.get(name.lower(), name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


def _place(path: Path, notes: list[str]) -> tuple[str | None, str | None, str | None]:
    """This is (reads, writes, model) as the folders' names tell them."""
    suite = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", str(path))
    layer = re.search(r"layer_(\d+)", str(path))
    model = None if suite is None else f"google/gemma-2-{suite[1]}" + ("-it" if suite[2] == "it" else "")
    if suite is None or (layer is None and "embedding" not in path.parts):
        notes.append(
            "the folders' names do not tell the site (google's are gemma-scope-2b-pt-res/layer_12/...): give "
            "site='blocks.12.resid_post' or the like"
        )
        return None, None, model
    if layer is None:
        notes.append("it reads token embeddings before the model multiplies them by sqrt(d_model)")
        return "embed", "embed", model
    block = f"blocks.{layer[1]}"
    if suite[3] == "transcoders":
        notes.append(GAIN_APART.format(site=f"{block}.ln2"))
        return f"{block}.ln2", f"{block}.mlp_out", model
    if suite[3] == "att":
        notes.append(FLATTENED)
    short = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}[suite[3]]
    return f"{block}.{short}", f"{block}.{short}", model


def read(path: Path, described: Description) -> Dictionary:
    """This is the dictionary."""
    held = Tensors(path if path.is_file() else path / WEIGHTS)
    parts = {name: held[stored].float() for name, stored in _names(held).items()}
    return build(described, {**parts, "W_enc": parts["W_enc"].T})


def write(dictionary: Dictionary, path: Path) -> Path:
    """This writes params.npz. What is centred has b_dec folded into b_enc; a plain ReLU gets the threshold 0."""
    parts, coder, per_vector = parts_of(dictionary, NAME, thresholded)
    if per_vector or coder.skip:
        raise DictionaryError(
            f"{NAME} files hold neither {'a normalisation of each vector' if per_vector else 'a skip connection'}; "
            "write it with layout='saelens'"
        )
    parts = uncentred(parts, coder)
    arrays = {name: parts[name].numpy() for name in ("b_enc", "threshold", "W_dec", "b_dec")}
    path.mkdir(parents=True, exist_ok=True)
    np.savez(path / WEIGHTS, W_enc=parts["W_enc"].T.contiguous().numpy(), **arrays)  # type: ignore[arg-type]
    return path
