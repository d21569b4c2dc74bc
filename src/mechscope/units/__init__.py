"""Heads and neurons: what each attends to, writes and responds to, and how sure we are.

    found = ms.units.harvest(model, texts, out="neurons")
    print(found.query("neuron 3.217"))

Names are fetched when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechscope.units.ablating import HeadImportance, head_importance
    from mechscope.units.by_layer import neuron_kinds
    from mechscope.units.confidence import confidence_neurons
    from mechscope.units.congruence import neuron_patching, token_congruence
    from mechscope.units.effective import effective_ov
    from mechscope.units.examples import Example, Examples, Harvest
    from mechscope.units.few_shot import FewShot, false_induction_heads, misled
    from mechscope.units.harvesting import harvest, join
    from mechscope.units.head_kinds import heads, untrained_twin
    from mechscope.units.ioi_roles import ioi_heads
    from mechscope.units.iterating import iteration_heads
    from mechscope.units.kinds import Heads, Kind
    from mechscope.units.knowing import Knowledge, knowledge_effects, knowledge_neurons
    from mechscope.units.mending import repaired_by_suppression
    from mechscope.units.patterns import pattern_kinds, repeats
    from mechscope.units.phase import tracked
    from mechscope.units.pruning import pruning_curve
    from mechscope.units.relating import Related, semantic_induction_heads
    from mechscope.units.residues import residue_features
    from mechscope.units.responding import Responses, responses
    from mechscope.units.rewriting import knowledge_edits
    from mechscope.units.succession import successor_heads
    from mechscope.units.suppressed import copy_suppression_kind
    from mechscope.units.suppression import copy_suppression
    from mechscope.units.task_heads import head_effects, over_represented
    from mechscope.units.universality import Universal, universal
    from mechscope.units.which import expert_neuron

__all__ = [
    # what every unit responds to, over a corpus
    "harvest",
    "join",
    "Harvest",
    "Examples",
    "Example",
    # kinds of heads
    "heads",
    "ioi_heads",
    "copy_suppression",
    "copy_suppression_kind",
    "repaired_by_suppression",
    "successor_heads",
    "residue_features",
    "iteration_heads",
    "semantic_induction_heads",
    "Related",
    "false_induction_heads",
    "misled",
    "FewShot",
    "tracked",
    "effective_ov",
    "untrained_twin",
    "pattern_kinds",
    "repeats",
    "Heads",
    "Kind",
    # how much heads matter
    "head_importance",
    "HeadImportance",
    "head_effects",
    "over_represented",
    "pruning_curve",
    # kinds of neurons
    "responses",
    "Responses",
    "neuron_kinds",
    "confidence_neurons",
    "knowledge_neurons",
    "knowledge_effects",
    "knowledge_edits",
    "Knowledge",
    "token_congruence",
    "neuron_patching",
    "expert_neuron",
    # units that other seeds have too
    "universal",
    "Universal",
]

_OWNER: dict[str, str] = {
    **dict.fromkeys(["HeadImportance", "head_importance"], "ablating"),
    **dict.fromkeys(["Example", "Examples", "Harvest"], "examples"),
    **dict.fromkeys(["harvest", "join"], "harvesting"),
    **dict.fromkeys(["heads", "untrained_twin"], "head_kinds"),
    "ioi_heads": "ioi_roles",
    "iteration_heads": "iterating",
    "repaired_by_suppression": "mending",
    **dict.fromkeys(["FewShot", "false_induction_heads", "misled"], "few_shot"),
    "pruning_curve": "pruning",
    **dict.fromkeys(["Related", "semantic_induction_heads"], "relating"),
    "residue_features": "residues",
    "copy_suppression_kind": "suppressed",
    "copy_suppression": "suppression",
    "successor_heads": "succession",
    "tracked": "phase",
    "effective_ov": "effective",
    **dict.fromkeys(["Heads", "Kind"], "kinds"),
    **dict.fromkeys(["pattern_kinds", "repeats"], "patterns"),
    "confidence_neurons": "confidence",
    **dict.fromkeys(["neuron_patching", "token_congruence"], "congruence"),
    "knowledge_edits": "rewriting",
    "expert_neuron": "which",
    "neuron_kinds": "by_layer",
    **dict.fromkeys(["Knowledge", "knowledge_effects", "knowledge_neurons"], "knowing"),
    **dict.fromkeys(["Responses", "responses"], "responding"),
    **dict.fromkeys(["head_effects", "over_represented"], "task_heads"),
    **dict.fromkeys(["Universal", "universal"], "universality"),
}


def __getattr__(name: str) -> Any:
    if name in _OWNER:
        value = getattr(import_module(f"mechscope.units.{_OWNER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mechscope.units' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
