"""Dictionaries: a site's vectors as sparse sums of features. Architectures, one training loop, files, evaluation.

    sae = ms.dictionaries.train(ms.dictionaries.TopK(768, 24_576, k=32), model.stream(texts, at="blocks.8.resid_post"))
    sae.save("sae.safetensors")
    model.run("I think", edits={"blocks.8.resid_post": ms.unchanged(sae.splice(error=True))})

Names are fetched when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechscope.dictionaries.activations import Activations, store_activations
    from mechscope.dictionaries.attention_output import below, by_head, by_source, weights_by_head
    from mechscope.dictionaries.batch_topk import BatchTopK
    from mechscope.dictionaries.codebook import Codebook
    from mechscope.dictionaries.cross_layer import CrossLayerTranscoder
    from mechscope.dictionaries.crosscoder import Crosscoder
    from mechscope.dictionaries.dictionary import Coder, Dictionary, Reconstruction
    from mechscope.dictionaries.end_to_end import EndToEnd
    from mechscope.dictionaries.evaluating import (
        DictionaryReport,
        asked,
        atom_recovery,
        composed_features,
        concept_recovery,
        disentanglement,
        evaluate,
        feature_absorption,
        feature_splitting,
        loss_recovered,
        manifold_features,
        sparse_control,
        sparse_probing,
        spurious_correlation_removal,
        supervised,
        targeted_probe_perturbation,
    )
    from mechscope.dictionaries.files import Normed, check, convert, fold_gain, inspect, read, write
    from mechscope.dictionaries.gated import Gated
    from mechscope.dictionaries.jacobian import JacobianPair
    from mechscope.dictionaries.jump_relu import JumpReLU
    from mechscope.dictionaries.latent_scaling import Scaling, latent_scaling
    from mechscope.dictionaries.matryoshka import Matryoshka
    from mechscope.dictionaries.p_annealing import PAnnealing
    from mechscope.dictionaries.relu import ReLU
    from mechscope.dictionaries.sparse import Sparse
    from mechscope.dictionaries.steering_vectors import Decomposition, decompose, feature_change, steering_vector
    from mechscope.dictionaries.topk import TopK
    from mechscope.dictionaries.training import train
    from mechscope.dictionaries.transcoders import transcoder

ARCHITECTURES: tuple[str, ...] = (
    "ReLU",
    "Gated",
    "TopK",
    "BatchTopK",
    "JumpReLU",
    "PAnnealing",
    "Matryoshka",
    "Crosscoder",
    "CrossLayerTranscoder",
    "Codebook",
    "JacobianPair",
    "Normed",
)
"""The classes that a file may name; `getattr(mechscope.dictionaries, name)(**options)` makes one."""

__all__ = [
    # the contract
    "Dictionary",
    "Coder",
    "Reconstruction",
    "Sparse",
    "ARCHITECTURES",
    # architectures
    "ReLU",
    "Gated",
    "TopK",
    "BatchTopK",
    "JumpReLU",
    "PAnnealing",
    "Matryoshka",
    "transcoder",
    "Crosscoder",
    "CrossLayerTranscoder",
    "JacobianPair",
    "Codebook",
    "EndToEnd",
    "latent_scaling",
    "Scaling",
    "Normed",
    # other packages' files
    "inspect",
    "read",
    "check",
    "write",
    "convert",
    "fold_gain",
    # training
    "train",
    "Activations",
    "store_activations",
    # what a feature is made of: heads, source positions, parts of the stream
    "by_head",
    "by_source",
    "below",
    "weights_by_head",
    # steering vectors
    "steering_vector",
    "decompose",
    "feature_change",
    "Decomposition",
    # evaluation; more in mechscope.dictionaries.evaluating
    "evaluate",
    "loss_recovered",
    "atom_recovery",
    "feature_splitting",
    "composed_features",
    "concept_recovery",
    "feature_absorption",
    "sparse_probing",
    "spurious_correlation_removal",
    "targeted_probe_perturbation",
    "disentanglement",
    "asked",
    "supervised",
    "sparse_control",
    "manifold_features",
    "DictionaryReport",
]

_OWNER: dict[str, str] = {
    **dict.fromkeys(["Coder", "Dictionary", "Reconstruction"], "dictionary"),
    "Sparse": "sparse",
    "ReLU": "relu",
    "Gated": "gated",
    "TopK": "topk",
    "BatchTopK": "batch_topk",
    "JumpReLU": "jump_relu",
    "PAnnealing": "p_annealing",
    "Matryoshka": "matryoshka",
    "transcoder": "transcoders",
    "Crosscoder": "crosscoder",
    "CrossLayerTranscoder": "cross_layer",
    **dict.fromkeys(["latent_scaling", "Scaling"], "latent_scaling"),
    **dict.fromkeys(["Normed", "check", "convert", "fold_gain", "inspect", "read", "write"], "files"),
    "EndToEnd": "end_to_end",
    "Codebook": "codebook",
    "JacobianPair": "jacobian",
    **dict.fromkeys(["below", "by_head", "by_source", "weights_by_head"], "attention_output"),
    **dict.fromkeys(["Decomposition", "decompose", "feature_change", "steering_vector"], "steering_vectors"),
    "train": "training",
    **dict.fromkeys(["Activations", "store_activations"], "activations"),
    **dict.fromkeys(
        [
            "evaluate",
            "loss_recovered",
            "atom_recovery",
            "feature_splitting",
            "composed_features",
            "concept_recovery",
            "feature_absorption",
            "sparse_probing",
            "spurious_correlation_removal",
            "targeted_probe_perturbation",
            "disentanglement",
            "asked",
            "supervised",
            "sparse_control",
            "manifold_features",
            "DictionaryReport",
        ],
        "evaluating",
    ),
}


def __getattr__(name: str) -> Any:
    if name in _OWNER:
        value = getattr(import_module(f"mechscope.dictionaries.{_OWNER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mechscope.dictionaries' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
