"""SAELens: a folder with cfg.json and sae_weights.safetensors, as version 6 writes it and as versions 3 to 5 did.

    W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_dec, and b_enc | b_gate, b_mag, r_mag (gated) | threshold (jumprelu)
    features = act((norm(x) - apply_b_dec_to_input * b_dec) @ W_enc + b_enc);  x_hat = unnorm(features @ W_dec + b_dec)

BatchTopK and Matryoshka dictionaries are saved for use as "jumprelu", with one threshold for all latents; checkpoints
of their training hold `topk_threshold`. With `rescale_acts_by_decoder_norm` the pre-activations are multiplied by the
decoder's norms before the selection, and divided by them after; both are folded into the weights here.

Sources: github.com/decoderesearch/SAELens, sae_lens/saes/*.py and sae_lens/loading/pretrained_sae_loaders.py of 6.54.12
(`handle_pre_6_0_config`, `read_sae_components_from_disk`), sae_lens/sae.py of 3.x for the earlier ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.files.building import build, parts_of
from mechscope.dictionaries.files.description import Description, Settings
from mechscope.dictionaries.files.hooks import FLATTENED, from_hook, to_hook
from mechscope.dictionaries.files.raw import Tensors, json_of
from mechscope.errors import DictionaryError
from mechscope.models.token_mask import TokenMask

NAME = "saelens"
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
VERSION = "6.54.12"
"""The version whose layout is written."""

_ARCHITECTURES = {
    "standard": "ReLU",
    "gated": "Gated",
    "topk": "TopK",
    "jumprelu": "JumpReLU",
    "batchtopk": "JumpReLU",
    "matryoshka_batchtopk": "JumpReLU",
    "transcoder": "ReLU",
    "skip_transcoder": "ReLU",
    "jumprelu_transcoder": "JumpReLU",
    "jumprelu_skip_transcoder": "JumpReLU",
}

_REFUSED = {
    "abstopk": "its features have either sign, and it selects them by their size",
    "matching_pursuit": "it encodes by an iteration, one latent after another",
    "temporal": "it encodes a position with the help of earlier ones, through attention",
}

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn": "activation_fn_str",
}

# What SAELens's configs hold that changes nothing about how a dictionary is used.
_HARMLESS = set(
    """
    device hook_layer hook_eval l1_coefficient lp_norm l1_warm_up_steps use_ghost_grads normalize_sae_decoder
    noise_scale decoder_orthogonal_init init_encoder_as_decoder_transpose mse_loss_normalization
    decoder_heuristic_init decoder_heuristic_init_norm scale_sparsity_penalty_by_decoder_norm
    dataset_trust_remote_code streaming is_dataset_tokenized use_cached_activations cached_activations_path
    expansion_factor b_dec_init_method from_pretrained_path n_batches_in_buffer training_tokens finetuning_tokens
    store_batch_size_prompts train_batch_size_tokens act_store_device seed autocast autocast_lm compile_llm
    llm_compilation_mode compile_sae sae_compilation_mode adam_beta1 adam_beta2 lr lr_scheduler_name
    lr_warm_up_steps lr_end lr_decay_steps n_restart_cycles finetuning_method feature_sampling_window
    dead_feature_window dead_feature_threshold n_eval_batches eval_batch_size_prompts log_to_wandb
    log_activations_store_to_wandb log_optimizer_state_to_wandb wandb_project wandb_id run_name wandb_entity
    wandb_log_frequency eval_every_n_wandb_logs resume n_checkpoints checkpoint_path verbose model_kwargs
    sae_lens_version sae_lens_training_version tokens_per_buffer d_head layer dtype hf_hook_name hf_hook_name_out
    aux_loss_coefficient use_sparse_activations decoder_init_norm topk_threshold_lr l0_coefficient l0_warm_up_steps
    jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode pre_act_loss_coefficient
    jumprelu_tanh_scale jumprelu_ste_to_input target_l0 use_matryoshka_aux_loss matryoshka_widths multi_topk signed
    neuronpedia_id model_class_name hook_head_index_out seqpos_slice sequence_separator_token
    disable_concat_sequences exclude_special_tokens prepend_bos context_size dataset_path
    model_from_pretrained_kwargs
    """.split()  # noqa: SIM905
)


def recognise(path: Path) -> bool:
    """This says whether a folder is of this layout."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def describe(path: Path) -> Description:
    """This is what the folder holds, from its config and the header of its weights."""
    values = json_of(path / CONFIG)
    metadata = values.get("metadata") or {}
    flat = {str(_RENAMED.get(key, key)): value for key, value in {**values, **metadata}.items() if key != "metadata"}
    notes: list[str] = []
    settings, heads = Settings(flat, path / CONFIG, notes), Tensors(path / WEIGHTS)

    named = settings.take("architecture", "standard", why="the config names no architecture: the standard one, ReLU")
    kind, options = _kind(named, settings, heads, path)
    transcodes = "transcoder" in named
    d_in, n_latents = heads.shape("W_enc") if "W_enc" in heads else (0, 0)
    d_in, n_latents = settings.take("d_in", d_in), settings.take("d_sae", n_latents)
    d_out = settings.take("d_out", heads.shape("W_dec")[1])
    reads, about = from_hook(settings.take("hook_name", None))
    notes += about
    writes = reads
    if transcodes:
        writes, about = from_hook(settings.take("hook_name_out", None))
        notes += [*about, *([] if writes else ["the file does not say what the transcoder writes"])]
    else:
        settings.take("hook_name_out", None)
    unsaid = "the config does not say whether b_dec is taken off the input: it is"
    taken_off = settings.take("apply_b_dec_to_input", True, why=None if transcodes else unsaid)
    centred = bool(taken_off) and not transcodes
    head = settings.take("hook_head_index", None)
    if head is not None and reads:
        notes.append(f"it was trained on head {head} alone: give it '{reads}' of that head")
    reshaped = settings.take("reshape_activations", "hook_z" if (reads or "").endswith(".z") else "none")
    if reshaped == "hook_z":
        notes.append(FLATTENED)
    described = Description(
        NAME, path, kind, d_in, n_latents, d_out, reads, writes, centred,
        skip="skip" in named, options=options, dtype=str(heads.dtype("W_dec")).removeprefix("torch."),
        model=settings.take("model_name", None), config=values, assumptions=notes,
    )  # fmt: skip
    _normalisation(described, settings)
    _training(described, flat)
    settings.unknown(_HARMLESS)
    return described


def _kind(named: str, settings: Settings, heads: Tensors, path: Path) -> tuple[str, dict[str, Any]]:
    """This is the class and options of an architecture's name; earlier versions say TopK in the activation function."""
    activation = settings.take("activation_fn_str", "relu")
    details = settings.take("activation_fn_kwargs", {})
    rescaled = settings.take("rescale_acts_by_decoder_norm", False)
    settings.take("finetuning_scaling_factor", False)
    if named in _REFUSED:
        raise DictionaryError(
            f"'{path}' holds a '{named}' dictionary, which mechscope has no class for: {_REFUSED[named]}"
        )
    if named not in _ARCHITECTURES:
        raise DictionaryError(
            f"'{path / CONFIG}' names the architecture '{named}'; SAELens's that are read: {', '.join(_ARCHITECTURES)}"
        )
    if named == "standard" and activation == "topk":
        named = "topk"
    if activation not in ("relu", "topk"):
        raise DictionaryError(
            f"'{path / CONFIG}' has the activation function '{activation}'; only relu and topk are read"
        )
    if details.get("signed") or settings.values.get("signed"):
        raise DictionaryError(
            f"'{path}' selects by size and keeps signs (signed TopK), which mechscope has no class for"
        )
    options: dict[str, Any] = {}
    k = settings.take("k", details.get("k"))
    if named == "topk":
        if k is None:
            raise DictionaryError(f"'{path / CONFIG}' lacks 'k', the number of active latents of a TopK dictionary")
        options["k"] = int(k)
    if rescaled:
        settings.notes.append("rescale_acts_by_decoder_norm: the decoder's norms were folded into the encoder")
    if named in ("batchtopk", "matryoshka_batchtopk"):
        heads.shape("topk_threshold")
        settings.notes.append(
            f"a checkpoint of training of a {named} dictionary (k = {k}): read as JumpReLU with its threshold, as "
            "SAELens saves it for use"
        )
    if "log_threshold" in heads:
        settings.notes.append("thresholds are stored as logarithms (log_threshold)")
    return _ARCHITECTURES[named], options


def _normalisation(described: Description, settings: Settings) -> None:
    """This reads what is done to inputs, and finds the scale that only the trainer's own files hold."""
    how = settings.take("normalize_activations", "none")
    how = {True: "expected_average_only_in", False: "none"}.get(how, how)
    folder = described.path
    if how in ("layer_norm", "constant_norm_rescale"):
        described.per_vector = how
        described.assume(f"each vector is normalised by itself before encoding ({how}), and back after decoding")
    elif how == "expected_average_only_in":
        scaler, state = folder / "activation_scaler.json", folder / "activations_store_state.safetensors"
        found = json_of(scaler).get("scaling_factor") if scaler.is_file() else None
        if found is None and state.is_file():
            kept = Tensors(state)
            found = float(kept["estimated_norm_scaling_factor"]) if "estimated_norm_scaling_factor" in kept else None
        if found is not None:
            described.scale = float(found)
            described.assume(f"the input scale {found:.6g} was read from beside the weights and folded into them")
        else:
            described.assume(
                "inputs were scaled in training to a mean norm of sqrt(d_in) (expected_average_only_in) and the scale "
                "is not in the file: taken as 1; check(dictionary, x) measures whether that is right, and "
                "read(path, scale=...) sets it"
            )
    elif how != "none":
        raise DictionaryError(
            f"'{folder / CONFIG}' normalises inputs by '{how}', which is not read; SAELens folds it into the weights "
            "when it saves for use (sae.save_inference_model)"
        )


def _training(described: Description, flat: dict[str, Any]) -> None:
    """This keeps what the config says about how the dictionary was trained, and about tokens."""
    for ours, theirs in (("dataset", "dataset_path"), ("context", "context_size"), ("bos", "prepend_bos")):
        if flat.get(theirs) is not None:
            described.facts[ours] = flat[theirs]
    if flat.get("prepend_bos") is None:
        described.assume("the config does not say whether a BOS token was prepended in training: it was")
    left_out = flat.get("exclude_special_tokens")
    ids = tuple(left_out) if isinstance(left_out, list) else ()
    described.facts["mask"] = TokenMask(special=left_out is True, ids=ids).to_json()
    if left_out:
        described.assume("special tokens were left out of training: leave them out when you measure")
    short = str(described.reads).rsplit(".", 1)[-1]
    on_stream = short in ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    if on_stream and not flat.get("model_from_pretrained_kwargs") and not flat.get("hf_hook_name"):
        described.assume(
            "the config does not say how the model was loaded: if by TransformerLens with its default processing "
            "(GPT-2 and other models with LayerNorm), what is written to the stream was centred, and x - x.mean(-1) is "
            "what fits"
        )


def read(path: Path, described: Description) -> Dictionary:
    """This is the dictionary, its weights folded so that it takes and gives the site's own units."""
    held = {name: value.float() for name, value in Tensors(path / WEIGHTS).all().items()}
    W_enc = held["W_enc"].T if "W_enc" in held else held["W_dec"]
    parts: dict[str, Tensor] = {"W_enc": W_enc, "W_dec": held["W_dec"], "b_dec": held["b_dec"]}
    parts |= {name: held[name] for name in ("b_enc", "b_gate", "b_mag", "r_mag", "threshold", "W_skip") if name in held}
    if "log_threshold" in held:
        parts["threshold"] = held["log_threshold"].exp()
    if "topk_threshold" in held:
        parts["threshold"] = torch.full((described.n_latents,), float(held["topk_threshold"]))
    if described.config.get("rescale_acts_by_decoder_norm"):
        norms = parts["W_dec"].norm(dim=1).clamp_min(1e-8)
        parts |= {"W_enc": parts["W_enc"] * norms[:, None], "b_enc": parts["b_enc"] * norms}
        parts["W_dec"] = parts["W_dec"] / norms[:, None]
    tuned = held.get("finetuning_scaling_factor", held.get("scaling_factor"))
    if tuned is not None and not torch.equal(tuned, torch.ones_like(tuned)):
        described.assume("the finetuned scale of each latent was folded into the decoder")
        parts["W_dec"] = parts["W_dec"] * tuned[:, None]
    return build(described, parts)


_NAMES = {"ReLU": "standard", "PAnnealing": "standard", "Gated": "gated", "TopK": "topk", "JumpReLU": "jumprelu"}
_NAMES |= {"BatchTopK": "jumprelu", "Matryoshka": "jumprelu"}
_TRANSCODERS = {"standard": ("transcoder", "skip_transcoder")}
_TRANSCODERS |= {"jumprelu": ("jumprelu_transcoder", "jumprelu_skip_transcoder")}


def write(dictionary: Dictionary, path: Path) -> Path:
    """This writes the folder that SAELens 6 reads with `SAE.load_from_disk(path)`.

    Scales are folded into the weights. BatchTopK and Matryoshka become "jumprelu", as SAELens itself saves them.
    """
    parts, coder, per_vector = parts_of(dictionary, NAME, _NAMES)
    named = _NAMES[type(coder).__name__]
    transcodes = not coder.centred and (coder.reads != coder.writes or coder.d_in != coder.d_out or coder.skip)
    if transcodes:
        if named not in _TRANSCODERS:
            raise DictionaryError(
                f"SAELens has no {named} transcoder; write it with layout='sparsify', or save our own file"
            )
        named = _TRANSCODERS[named][coder.skip]
    old = dictionary.facts.get("config") if dictionary.facts.get("layout") == NAME else None
    metadata = {**((old or {}).get("metadata") or {}), "sae_lens_version": VERSION, "sae_lens_training_version": None}
    metadata |= {"model_name": dictionary.facts.get("model"), "hook_name": to_hook(coder.reads)}
    config: dict[str, Any] = {
        "architecture": named,
        "d_in": coder.d_in,
        "d_sae": coder.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": coder.centred,
        "normalize_activations": per_vector or "none",
        "reshape_activations": "hook_z" if str(coder.reads).endswith(".z") else "none",
    }
    if named == "topk":
        config |= {"k": coder.options()["k"], "rescale_acts_by_decoder_norm": False}
    if transcodes:
        config["d_out"] = coder.d_out
        metadata["hook_name_out"] = to_hook(coder.writes)
    kept = ["b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "W_skip", *(["threshold"] if "jumprelu" in named else [])]
    tensors = {"W_enc": parts["W_enc"].T, "W_dec": parts["W_dec"], **{n: parts[n] for n in kept if n in parts}}
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps({**config, "metadata": metadata}, indent=1), encoding="utf-8")
    return path
