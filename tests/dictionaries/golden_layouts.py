"""Writes a small dictionary in every layout that is read, with what it must compute, worked out here in NumPy.

Names, shapes, settings and formulas are those of the packages' sources, which each reader's head gives; nothing of
mechscope is used. Run it to look at the folders: python golden_layouts.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

D, N, ROWS, LAYERS = 12, 24, 32, 3
Arrays = dict[str, np.ndarray]


@dataclass
class Golden:
    """This is one folder, and what must come of it: x [rows, d_in] gives features [rows, n], output [rows, d_out]."""

    name: str
    folder: Path
    layout: str
    architecture: str
    reads: Any
    writes: Any
    x: np.ndarray
    features: np.ndarray
    output: np.ndarray


def relu(pre: np.ndarray) -> np.ndarray:
    return np.maximum(pre, 0)


def jump(pre: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    return relu(pre) * (pre > threshold)


def top(pre: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(pre)
    best = np.argsort(-pre, axis=-1)[..., :k]
    np.put_along_axis(out, best, relu(np.take_along_axis(pre, best, -1)), -1)
    return out


def gated(inner: np.ndarray, W: np.ndarray, gate: np.ndarray, mag: np.ndarray, r: np.ndarray) -> np.ndarray:
    return (inner @ W + gate > 0) * relu(inner @ (W * np.exp(r)) + mag)


def numbers(seed: int, d_out: int = D, scale: float = 1.0) -> tuple[Arrays, np.ndarray]:
    """This is the parts of a dictionary (W_enc [d, n], W_dec [n, d_out]) and vectors to try it on."""
    draw = np.random.default_rng(seed)
    parts = {
        "W_enc": draw.normal(size=(D, N)) / D**0.5,
        "W_dec": draw.normal(size=(N, d_out)) / d_out**0.5,
        "b_enc": draw.normal(size=N) * 0.1,
        "b_dec": draw.normal(size=d_out) * 0.3,
        "threshold": draw.uniform(0.05, 0.6, size=N),
        "W_skip": draw.normal(size=(d_out, D)) * 0.2,
        "r_mag": draw.normal(size=N) * 0.2,
        "b_mag": draw.normal(size=N) * 0.1,
        "b_gate": draw.normal(size=N) * 0.1,
    }
    x = draw.normal(size=(ROWS, D)) * scale
    return {name: rounded(value) for name, value in parts.items()}, rounded(x)


def rounded(value: np.ndarray) -> np.ndarray:
    """This is numbers that float32 holds, in float64: what is worked out with them is as good as exact."""
    return value.astype(np.float32).astype(np.float64)


def save(folder: Path, file: str, arrays: Arrays) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: stored(value) for name, value in arrays.items()}, folder / file)


def stored(value: np.ndarray) -> np.ndarray:
    return np.array(value if value.dtype.kind == "i" else value.astype(np.float32), order="C")


def write_json(folder: Path, file: str, values: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(values), encoding="utf-8")


# SAELens


def saelens(root: Path) -> Iterator[Golden]:
    six = {
        "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    about = {
        "sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12", "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_pre", "hook_head_index": None, "prepend_bos": True, "context_size": 128,
        "dataset_path": "Skylion007/openwebtext", "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }  # fmt: skip

    def put(name: str, arrays: Arrays, ours: str, x: np.ndarray, f: np.ndarray, out: np.ndarray, **more: Any) -> Golden:
        hooks = {key: more.pop(key) for key in ("hook_name", "hook_name_out") if key in more}
        folder = root / name
        save(folder, "sae_weights.safetensors", arrays)
        write_json(folder, "cfg.json", {**six, **more, "metadata": {**about, **hooks}})
        reads = {"blocks.3.attn.hook_z": "blocks.3.z", "blocks.3.mlp.hook_in": "blocks.3.ln2"}.get(
            hooks.get("hook_name", ""), "blocks.8.resid_pre"
        )
        writes = "blocks.3.mlp_out" if "hook_name_out" in hooks else reads
        return Golden(name, folder, "saelens", ours, reads, writes, x, f, out)

    p, x = numbers(0)
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    f = relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    yield put("standard", plain, "ReLU", x, f, f @ p["W_dec"] + p["b_dec"], architecture="standard")

    p, x = numbers(1)
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    f = relu(x @ p["W_enc"] + p["b_enc"])
    yield put(
        "uncentred", plain, "ReLU", x, f, f @ p["W_dec"] + p["b_dec"],
        architecture="standard", apply_b_dec_to_input=False,
    )  # fmt: skip

    p, x = numbers(2)
    parts = {name: p[name] for name in ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")}
    f = gated(x - p["b_dec"], p["W_enc"], p["b_gate"], p["b_mag"], p["r_mag"])
    yield put("gated", parts, "Gated", x, f, f @ p["W_dec"] + p["b_dec"], architecture="gated")

    p, x = numbers(3)
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    norms = np.linalg.norm(p["W_dec"], axis=-1)
    f = top(((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norms, 5)
    yield put(
        "topk", plain, "TopK", x, f, (f / norms) @ p["W_dec"] + p["b_dec"],
        architecture="topk", k=5, rescale_acts_by_decoder_norm=True,
    )  # fmt: skip

    p, x = numbers(4)
    parts = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    f = jump((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], p["threshold"])
    yield put(
        "jumprelu", parts, "JumpReLU", x, f, f @ p["W_dec"] + p["b_dec"], architecture="jumprelu",
        hook_name="blocks.3.attn.hook_z", reshape_activations="hook_z",
    )  # fmt: skip

    p, x = numbers(5)
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    pre = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * np.linalg.norm(p["W_dec"], axis=-1)
    f = jump(pre, 0.25)
    out = (f / np.linalg.norm(p["W_dec"], axis=-1)) @ p["W_dec"] + p["b_dec"]
    yield put(
        "checkpoint-matryoshka", {**plain, "topk_threshold": np.array(0.25)}, "JumpReLU", x, f, out,
        architecture="matryoshka_batchtopk", k=4.0, matryoshka_widths=[6, 24], rescale_acts_by_decoder_norm=True,
    )  # fmt: skip

    sites = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    for skip in (False, True):
        for jumps in (False, True):
            p, x = numbers(6 + skip * 2 + jumps, d_out=8)
            kept = ["W_enc", "b_enc", "W_dec", "b_dec", *["threshold"] * jumps, *["W_skip"] * skip]
            pre = x @ p["W_enc"] + p["b_enc"]
            f = jump(pre, p["threshold"]) if jumps else relu(pre)
            out = f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if skip else 0)
            name = "jumprelu_" * jumps + "skip_" * skip + "transcoder"
            yield put(
                name, {n: p[n] for n in kept}, "JumpReLU" if jumps else "ReLU", x, f, out,
                architecture=name, d_out=8, apply_b_dec_to_input=False, **sites,
            )  # fmt: skip

    p, x = numbers(10, scale=30)
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    factor = D**0.5 / np.linalg.norm(x, axis=-1, keepdims=True)
    f = relu((x * factor - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    yield put(
        "constant_norm", plain, "Normed", x, f, (f @ p["W_dec"] + p["b_dec"]) / factor,
        architecture="standard", normalize_activations="constant_norm_rescale",
    )  # fmt: skip

    p, x = numbers(11, scale=5)
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    mean = x.mean(-1, keepdims=True)
    std = (x - mean).std(-1, ddof=1, keepdims=True)
    f = top(((x - mean) / (std + 1e-5) - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 6)
    yield put(
        "layer_norm", plain, "Normed", x, f, (f @ p["W_dec"] + p["b_dec"]) * std + mean,
        architecture="topk", k=6, rescale_acts_by_decoder_norm=False, normalize_activations="layer_norm",
    )  # fmt: skip

    p, x = numbers(12, scale=20)
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    f = relu((x * 0.05 - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    golden = put(
        "checkpoint-scaled", plain, "ReLU", x, f, (f @ p["W_dec"] + p["b_dec"]) / 0.05,
        architecture="standard", normalize_activations="expected_average_only_in",
    )  # fmt: skip
    write_json(golden.folder, "activation_scaler.json", {"scaling_factor": 0.05, "has_whitening": False})
    yield golden


def saelens_earlier(root: Path) -> Iterator[Golden]:
    three = {
        "d_in": D, "d_sae": N, "dtype": "float32", "device": "cuda", "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_pre", "hook_layer": 8, "hook_head_index": None, "activation_fn_str": "relu",
        "activation_fn_kwargs": {}, "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "sae_lens_training_version": "3.20.3", "prepend_bos": True, "dataset_path": "Skylion007/openwebtext",
        "dataset_trust_remote_code": True, "context_size": 128, "normalize_activations": "none",
        "neuronpedia_id": None, "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }  # fmt: skip

    def put(name: str, arrays: Arrays, ours: str, x: np.ndarray, f: np.ndarray, out: np.ndarray, **more: Any) -> Golden:
        folder = root / name
        save(folder, "sae_weights.safetensors", arrays)
        write_json(folder, "cfg.json", {**{k: v for k, v in three.items() if more.get(k) != "left out"}, **{
            k: v for k, v in more.items() if v != "left out"}})  # fmt: skip
        return Golden(name, folder, "saelens", ours, "blocks.8.resid_pre", "blocks.8.resid_pre", x, f, out)

    p, x = numbers(20)
    tuned = rounded(np.random.default_rng(0).uniform(0.5, 2, N))
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    f = relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    yield put(
        "v3-finetuned", {**plain, "scaling_factor": tuned}, "ReLU", x, f, (f * tuned) @ p["W_dec"] + p["b_dec"],
        architecture="standard", finetuning_scaling_factor=True,
    )  # fmt: skip
    yield put(
        "v1", {**plain, "scaling_factor": np.ones(N)}, "ReLU", x, f, f @ p["W_dec"] + p["b_dec"],
        hook_name="left out", hook_point="blocks.8.hook_resid_pre", hook_point_layer=8, hook_point_head_index=None,
        activation_fn_str="left out", apply_b_dec_to_input="left out", normalize_activations=False,
    )  # fmt: skip

    p, x = numbers(21)
    plain = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    f = top((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 4)
    yield put(
        "v4-topk", plain, "TopK", x, f, f @ p["W_dec"] + p["b_dec"],
        architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": 4},
    )  # fmt: skip

    p, x = numbers(22)
    parts = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    log = rounded(np.log(p["threshold"]))
    f = jump(x @ p["W_enc"] + p["b_enc"], np.exp(log))
    yield put(
        "v4-jumprelu-checkpoint", {**parts, "log_threshold": log}, "JumpReLU", x, f, f @ p["W_dec"] + p["b_dec"],
        architecture="jumprelu", apply_b_dec_to_input=False,
    )  # fmt: skip


# Gemma Scope


def gemma_scope(root: Path) -> Iterator[Golden]:
    for seed, (suite, reads, writes) in enumerate((
        ("res", "resid_post", "resid_post"), ("att", "z", "z"), ("mlp", "mlp_out", "mlp_out"),
        ("transcoders", "ln2", "mlp_out"),
    )):  # fmt: skip
        p, x = numbers(30 + seed)
        f = jump(x @ p["W_enc"] + p["b_enc"], p["threshold"])
        folder = root / f"gemma-scope-2b-pt-{suite}" / "layer_12" / "width_16k" / "average_l0_8"
        folder.mkdir(parents=True)
        kept = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        np.savez(folder / "params.npz", **{name: stored(p[name]) for name in kept})  # type: ignore[arg-type]
        sites = (f"blocks.12.{reads}", f"blocks.12.{writes}")
        yield Golden(f"gemma-{suite}", folder, "gemma-scope", "JumpReLU", *sites, x, f, f @ p["W_dec"] + p["b_dec"])


def gemma_scope_2(root: Path) -> Iterator[Golden]:
    root = root / "gemma-scope-2-1b-pt"
    base = {"width": N, "model_name": "google/gemma-3-1b-pt", "architecture": "jump_relu", "l0": 8}
    for seed, affine in enumerate((None, False, True)):
        p, x = numbers(40 + seed)
        f = jump(x @ p["W_enc"] + p["b_enc"], p["threshold"])
        arrays = {"w_enc": p["W_enc"], "w_dec": p["W_dec"], **{n: p[n] for n in ("b_enc", "b_dec", "threshold")}}
        out = f @ p["W_dec"] + p["b_dec"]
        if affine:
            arrays["affine_skip_connection"] = p["W_skip"].T
            out = out + x @ p["W_skip"].T
        if affine is None:
            folder, hooks = (
                root / "resid_post" / "layer_13_width_16k_l0_small",
                {"hf_hook_point_in": "model.layers.13.output"},
            )
            sites = ("blocks.13.resid_post", "blocks.13.resid_post")
        else:
            folder = root / "transcoder" / f"layer_13_width_16k_l0_small{'_affine' * affine}"
            hooks = {
                "hf_hook_point_in": "model.layers.13.pre_feedforward_layernorm.output",
                "hf_hook_point_out": "model.layers.13.post_feedforward_layernorm.output",
                "affine_connection": affine, "type": "transcoder",
            }  # fmt: skip
            sites = ("blocks.13.ln2", "blocks.13.mlp_out")
        save(folder, "params.safetensors", arrays)
        write_json(folder, "config.json", {**base, **hooks})
        yield Golden(f"gemma2-{folder.parent.name}-{affine}", folder, "gemma-scope-2", "JumpReLU", *sites, x, f, out)


def across(seed: int) -> tuple[list[Arrays], np.ndarray, np.ndarray, np.ndarray]:
    """This is each layer's parts, x [rows, layers, d], features [rows, layers, n] and output, to this layer and on."""
    layers = [numbers(seed + layer)[0] for layer in range(LAYERS)]
    draw = np.random.default_rng(seed)
    x = rounded(draw.normal(size=(ROWS, LAYERS, D)))
    for layer, p in enumerate(layers):
        p["W_dec"] = rounded(draw.normal(size=(N, LAYERS - layer, D)) / D**0.5)
    f = np.stack([jump(x[:, i] @ p["W_enc"] + p["b_enc"], p["threshold"]) for i, p in enumerate(layers)], 1)
    out = np.stack([
        sum(f[:, i] @ layers[i]["W_dec"][:, layer - i] for i in range(layer + 1)) + layers[layer]["b_dec"]
        for layer in range(LAYERS)
    ], 1)  # fmt: skip
    return layers, x, f, out


def gemma_scope_2_layered(root: Path) -> Iterator[Golden]:
    root = root / "gemma-scope-2-1b-pt"
    for seed, (name, affine) in enumerate((
        ("clt/width_262k_l0_big_affine", True), ("crosscoder/layer_7_13_22_width_65k_l0_medium", False),
    )):  # fmt: skip
        layers, x, f, out = across(50 + 5 * seed)
        for layer, p in enumerate(layers):
            whole = np.concatenate([np.zeros((N, layer, D)), p["W_dec"]], 1)
            arrays = {"w_enc": p["W_enc"], "w_dec": whole, **{n: p[n] for n in ("b_enc", "b_dec", "threshold")}}
            if affine:
                arrays["affine_skip_connection"] = p["W_skip"].T
                out[:, layer] += x[:, layer] @ p["W_skip"].T
            save(root / name, f"params_layer_{layer}.safetensors", arrays)
        about = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "l0": 20}
        write_json(root / name, "config.json", about)
        if affine:
            reads, writes = [f"blocks.{i}.ln2" for i in range(LAYERS)], [f"blocks.{i}.mlp_out" for i in range(LAYERS)]
        else:
            reads = writes = [f"blocks.{i}.resid_post" for i in (7, 13, 22)]
        whole = f.reshape(ROWS, -1)
        yield Golden(name, root / name, "gemma-scope-2", "CrossLayerTranscoder", reads, writes, x, whole, out)


# dictionary_learning


def dictionary_learning(root: Path) -> Iterator[Golden]:
    def put(named: str, ours: str, state: Arrays, x: np.ndarray, f: np.ndarray, out: np.ndarray, **more: Any) -> Golden:
        folder = root / named
        folder.mkdir(parents=True)
        torch.save({name: torch.tensor(stored(value)) for name, value in state.items()}, folder / "ae.pt")
        trainer = {
            "trainer_class": "Trainer", "dict_class": named, "lr": 1e-4, "steps": 1000, "seed": 0, "activation_dim": D,
            "dict_size": N, "device": "cuda:0", "layer": 12, "lm_name": "google/gemma-2-2b",
            "wandb_name": "run", "submodule_name": "resid_post_layer_12", **more,
        }  # fmt: skip
        buffer = {"d_submodule": D, "io": "out", "n_ctxs": 2048, "ctx_len": 128, "device": "cuda:0"}
        write_json(folder, "config.json", {"trainer": trainer, "buffer": buffer})
        site = "blocks.12.resid_post"
        return Golden(named, folder, "dictionary_learning", ours, site, site, x, f, out)

    p, x = numbers(60)
    norms = np.linalg.norm(p["W_dec"], axis=-1)  # from_pretrained(normalize_decoder=True), the package's default
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    linear = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "decoder.weight": p["W_dec"].T}
    out = relu(pre) @ p["W_dec"] + p["b_dec"]
    yield put("AutoEncoder", "ReLU", {**linear, "bias": p["b_dec"]}, x, relu(pre) * norms, out)

    f = relu(x @ p["W_enc"] + p["b_enc"])
    yield put("AutoEncoderNew", "ReLU", {**linear, "decoder.bias": p["b_dec"]}, x, f, f @ p["W_dec"] + p["b_dec"])

    p, x = numbers(61)
    f = gated(x - p["b_dec"], p["W_enc"], p["b_gate"], p["b_mag"], p["r_mag"])
    state = {
        "encoder.weight": p["W_enc"].T, "decoder.weight": p["W_dec"].T, "decoder_bias": p["b_dec"],
        "gate_bias": p["b_gate"], "mag_bias": p["b_mag"], "r_mag": p["r_mag"],
    }  # fmt: skip
    yield put("GatedAutoEncoder", "Gated", state, x, f, f @ p["W_dec"] + p["b_dec"])

    p, x = numbers(62)
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    linear = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "decoder.weight": p["W_dec"].T}
    buffers = {"b_dec": p["b_dec"], "k": np.array(5, np.int32)}
    f, kept = top(pre, 5), {**linear, **buffers, "threshold": np.array(0.3)}
    yield put("AutoEncoderTopK", "TopK", kept, x, f, f @ p["W_dec"] + p["b_dec"], k=5)
    f = jump(pre, rounded(np.array(0.3)))
    yield put("BatchTopKSAE", "BatchTopK", kept, x, f, f @ p["W_dec"] + p["b_dec"], k=5)
    state = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    state |= {"k": buffers["k"], "threshold": kept["threshold"], "group_sizes": np.array([6, 18])}
    yield put(
        "MatryoshkaBatchTopKSAE", "Matryoshka", state, x, f, f @ p["W_dec"] + p["b_dec"],
        k=5, group_fractions=[0.25, 0.75], group_weights=[0.5, 0.5], group_sizes=[6, 18],
    )  # fmt: skip

    p, x = numbers(63)
    f = jump(x @ p["W_enc"] + p["b_enc"], p["threshold"])
    state = {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    yield put("JumpReluAutoEncoder", "JumpReLU", state, x, f, f @ p["W_dec"] + p["b_dec"])


# sparsify


def sparsify(root: Path) -> Iterator[Golden]:
    new = {
        "activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": N, "k": 4,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    }  # fmt: skip
    old = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": 4, "signed": False, "d_in": D}
    kinds = (
        ("layers.5", new, "blocks.5.resid_post", "blocks.5.resid_post"),
        ("gpt_neox.layers.9.mlp", old, "blocks.9.mlp_out", "blocks.9.mlp_out"),
        ("layers.3.mlp", new | {"transcode": True}, "blocks.3.ln2", "blocks.3.mlp_out"),
        ("layers.4.mlp", new | {"transcode": True, "skip_connection": True}, "blocks.4.ln2", "blocks.4.mlp_out"),
    )
    for seed, (name, config, reads, writes) in enumerate(kinds):
        p, x = numbers(70 + seed)
        transcodes = config.get("transcode", False)
        f = top((x if transcodes else x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 4)
        out = f @ p["W_dec"] + p["b_dec"]
        arrays = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
        if config.get("skip_connection"):
            arrays["W_skip"] = p["W_skip"]
            out = out + x @ p["W_skip"].T
        save(root / name, "sae.safetensors", arrays)
        write_json(root / name, "cfg.json", config)
        yield Golden(f"sparsify-{name}", root / name, "sparsify", "TopK", reads, writes, x, f, out)


# circuit-tracer


def circuit_tracer(root: Path) -> Iterator[Golden]:
    config = (
        '# a comment\nmodel_name: "google/gemma-2-2b"\nmodel_kind: "transcoder_set"\n'
        "feature_input_hook: \"mlp.hook_in\"\nfeature_output_hook: 'hook_mlp_out'\nscan: gemma\n"
    )
    folder = root / "set"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    for layer in range(LAYERS):
        p, x = numbers(80 + layer)
        pre = x @ p["W_enc"] + p["b_enc"]
        arrays = {"W_enc": p["W_enc"].T, **{name: p[name] for name in ("b_enc", "W_dec", "b_dec")}}
        f = relu(pre)
        if layer == 1:
            arrays["activation_function.threshold"] = p["threshold"]
            f = jump(pre, p["threshold"])
        out = f @ p["W_dec"] + p["b_dec"]
        if layer == 2:
            arrays["W_skip"] = p["W_skip"]
            out = out + x @ p["W_skip"].T
        save(folder, f"layer_{layer}.safetensors", arrays)
        ours = "JumpReLU" if layer == 1 else "ReLU"
        sites = (f"blocks.{layer}.ln2", f"blocks.{layer}.mlp_out")
        yield Golden(f"plt-{layer}", folder / f"layer_{layer}.safetensors", "circuit-tracer", ours, *sites, x, f, out)


def circuit_tracer_layered(root: Path) -> Iterator[Golden]:
    folder = root / "clt"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "model_name: google/gemma-2-2b\nmodel_kind: cross_layer_transcoder\n"
        "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )
    layers, x, f, out = across(90)
    for i, p in enumerate(layers):
        encoder = {"W_enc": p["W_enc"].T, **{name: p[name] for name in ("b_enc", "b_dec", "threshold")}}
        save(folder, f"W_enc_{i}.safetensors", {f"{name}_{i}": value for name, value in encoder.items()})
        save(folder, f"W_dec_{i}.safetensors", {f"W_dec_{i}": p["W_dec"]})
    sites = [f"blocks.{i}.resid_mid" for i in range(LAYERS)], [f"blocks.{i}.mlp_out" for i in range(LAYERS)]
    yield Golden("clt", folder, "circuit-tracer", "CrossLayerTranscoder", *sites, x, f.reshape(ROWS, -1), out)


SINGLE: tuple[Callable[[Path], Iterator[Golden]], ...] = (
    saelens, saelens_earlier, gemma_scope, gemma_scope_2, dictionary_learning, sparsify, circuit_tracer,
)  # fmt: skip
LAYERED = (gemma_scope_2_layered, circuit_tracer_layered)


def write_all(root: Path) -> list[Golden]:
    """This writes every folder under `root`."""
    return [golden for make in (*SINGLE, *LAYERED) for golden in make(root / make.__name__)]


if __name__ == "__main__":
    for golden in write_all(Path(sys.argv[1])):
        print(golden.layout, golden.folder)
