"""How good a dictionary is, asked in many ways: each metric with its control, and an interval where it is a sample.

    report = ms.dictionaries.evaluate(sae, model.stream(texts, at="blocks.3.resid_post"))
    print(report["fvu"], report["dead"])

What reconstruction, sparsity and loss say does not rank dictionaries by what they are good for (Karvonen et al. 2025,
SAEBench, arXiv:2503.09532): look at several of these beside one another. Names are fetched when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechscope.dictionaries.evaluating.absorption import feature_absorption
    from mechscope.dictionaries.evaluating.atomicity import composed_features, feature_splitting
    from mechscope.dictionaries.evaluating.concepts import concept_recovery
    from mechscope.dictionaries.evaluating.disentangling import disentanglement
    from mechscope.dictionaries.evaluating.erasing import spurious_correlation_removal, targeted_probe_perturbation
    from mechscope.dictionaries.evaluating.in_model import loss_recovered
    from mechscope.dictionaries.evaluating.looking import (
        clamp_effects,
        completeness,
        feature_search,
        neighbours_share,
    )
    from mechscope.dictionaries.evaluating.manifolds import manifold_features
    from mechscope.dictionaries.evaluating.probing import sparse_probing
    from mechscope.dictionaries.evaluating.reading import asked, probed
    from mechscope.dictionaries.evaluating.reconstruction import evaluate
    from mechscope.dictionaries.evaluating.recovery import atom_recovery, matched_cosine, mean_max_cosine
    from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure
    from mechscope.dictionaries.evaluating.scaling import scaling_law
    from mechscope.dictionaries.evaluating.supervision import Supervised, sparse_control, supervised
    from mechscope.dictionaries.evaluating.sweeping import recovery_sweep

__all__ = [
    # what every metric answers with
    "DictionaryReport",
    "Measure",
    # from activations alone
    "evaluate",
    # in the model
    "loss_recovered",
    # against known atoms and concepts
    "atom_recovery",
    "mean_max_cosine",
    "matched_cosine",
    "feature_splitting",
    "composed_features",
    "concept_recovery",
    "feature_absorption",
    # probes
    "sparse_probing",
    "spurious_correlation_removal",
    "targeted_probe_perturbation",
    # attributes, read by probes or by the model's answers
    "disentanglement",
    "asked",
    "probed",
    "supervised",
    "Supervised",
    "sparse_control",
    # features that are not directions
    "manifold_features",
    # over sizes, sparsities and steps
    "recovery_sweep",
    "scaling_law",
    # looking features up
    "feature_search",
    "clamp_effects",
    "neighbours_share",
    "completeness",
]

_OWNER: dict[str, str] = {
    **dict.fromkeys(["DictionaryReport", "Measure"], "report"),
    "evaluate": "reconstruction",
    "loss_recovered": "in_model",
    **dict.fromkeys(["atom_recovery", "matched_cosine", "mean_max_cosine"], "recovery"),
    **dict.fromkeys(["composed_features", "feature_splitting"], "atomicity"),
    "concept_recovery": "concepts",
    "feature_absorption": "absorption",
    "sparse_probing": "probing",
    **dict.fromkeys(["spurious_correlation_removal", "targeted_probe_perturbation"], "erasing"),
    "disentanglement": "disentangling",
    **dict.fromkeys(["asked", "probed"], "reading"),
    **dict.fromkeys(["Supervised", "sparse_control", "supervised"], "supervision"),
    "manifold_features": "manifolds",
    "recovery_sweep": "sweeping",
    "scaling_law": "scaling",
    **dict.fromkeys(["clamp_effects", "completeness", "feature_search", "neighbours_share"], "looking"),
}


def __getattr__(name: str) -> Any:
    if name in _OWNER:
        value = getattr(import_module(f"mechscope.dictionaries.evaluating.{_OWNER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mechscope.dictionaries.evaluating' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
