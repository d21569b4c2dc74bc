"""Erasing and interchanging concepts by their latents, with dictionaries made by hand whose scores are known."""

from __future__ import annotations

import pytest
import torch

from dictionaries import synthetic
from mechscope.dictionaries.evaluating import (
    disentanglement,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from mechscope.errors import DictionaryError

DATA = synthetic.flat(16, 32, active=6)
X, CODES = DATA.batch(0, 6000)
ON = CODES > 0


def blurred() -> synthetic.ByHand:
    """Latents that write two atoms each: sums and differences of neighbours."""
    one, other = DATA.atoms[::2], DATA.atoms[1::2]
    mixed = torch.cat([one + other, one - other, other - one]) / 2**0.5
    return synthetic.ByHand(mixed, mixed)


# --- spurious correlation removal -------------------------------------------------------------------------------------


def test_a_perfect_dictionary_removes_the_bias_with_one_latent():
    report = spurious_correlation_removal(synthetic.perfect(DATA), X, ON[:, 0], ON[:, 1], ablated=[1, 2])
    assert report["accuracy, biased"].value < 0.85 and report["accuracy, unbiased"].value > 0.99
    assert report["SCR, 1 latents"].low > 0.9 and report.tensors["latents"][0] == 1
    assert abs(report["SCR, 1 latents, random"].value) < 0.1


def test_a_split_concept_takes_both_of_its_latents():
    report = spurious_correlation_removal(synthetic.split(DATA, 2), X, ON[:, 0], ON[:, 1], ablated=[1, 2])
    assert report["SCR, 1 latents"].high < 0.8 and report["SCR, 2 latents"].low > 0.9


def test_latents_that_write_both_concepts_remove_little():
    report = spurious_correlation_removal(blurred(), X, ON[:, 0], ON[:, 1], ablated=[1])
    assert report["SCR, 1 latents"].high < 0.7
    report = spurious_correlation_removal(synthetic.random(DATA), X, ON[:, 0], ON[:, 1], ablated=[1])
    assert report["SCR, 1 latents"].high < 0.6


def test_what_cannot_be_biased_is_refused():
    with pytest.raises(DictionaryError, match="four combinations"):
        spurious_correlation_removal(synthetic.perfect(DATA), X, ON[:, 0], ON[:, 0])
    with pytest.raises(DictionaryError, match="no bias to undo"):
        spurious_correlation_removal(synthetic.perfect(DATA), X, ON[:, 0], torch.rand(len(X)) > 0.5)


# --- targeted probe perturbation --------------------------------------------------------------------------------------


def test_a_perfect_dictionary_hurts_one_probe_alone():
    report = targeted_probe_perturbation(synthetic.perfect(DATA), X, ON[:, :6], ablated=[1])
    assert report["TPP, 1 latents"].value == pytest.approx(0.5, abs=0.02)
    assert report["other probes, 1 latents"].value < 0.01
    assert abs(report["TPP, 1 latents, random"].value) < 0.1
    assert report.tensors["drops.1"].shape == (6, 6)


def test_split_and_blurred_and_random_dictionaries_score_less():
    split = targeted_probe_perturbation(synthetic.split(DATA, 2), X, ON[:, :6], ablated=[1, 2])
    assert split["TPP, 1 latents"].value == pytest.approx(0.25, abs=0.05)
    assert split["TPP, 2 latents"].value == pytest.approx(0.5, abs=0.02)
    assert targeted_probe_perturbation(blurred(), X, ON[:, :6], ablated=[1])["TPP, 1 latents"].high < 0.35
    assert targeted_probe_perturbation(synthetic.random(DATA), X, ON[:, :6], ablated=[1])["TPP, 1 latents"].high < 0.3


def test_latents_that_fire_but_write_nothing_are_not_chosen():
    """They fire three times as hard as the atoms' own, which alone write along the probes."""
    made = synthetic.ByHand(
        DATA.atoms,
        torch.cat([DATA.atoms, torch.zeros_like(DATA.atoms)]),
        lambda codes: torch.cat([codes, 3 * codes], 1),
    )
    report = targeted_probe_perturbation(made, X, ON[:, :4], ablated=[1])
    assert report["TPP, 1 latents"].value == pytest.approx(0.5, abs=0.02)
    assert [int(report.tensors[f"latents.{i}"][0]) for i in range(4)] == [0, 1, 2, 3]


def test_one_concept_is_not_enough():
    with pytest.raises(DictionaryError, match="two concepts"):
        targeted_probe_perturbation(synthetic.perfect(DATA), X, ON[:, :1])


# --- disentanglement --------------------------------------------------------------------------------------------------

PAIRED = synthetic.paired(12, 32)
PX, PCODES = PAIRED.batch(0, 4000)
VALUES = {"colour": PCODES[:, :6].argmax(1), "shape": PCODES[:, 6:].argmax(1)}


def test_a_perfect_dictionary_moves_one_attribute_alone():
    report = disentanglement(synthetic.perfect(PAIRED), PX, VALUES, sizes=[1, 2, 4, 6, 8], pairs=300)
    assert report["score"].low > 0.98 and report["cause"].value > 0.98 and report["isolate"].value > 0.98
    assert set(report.tensors["latents.colour"].tolist()) == set(range(6))
    assert report["score, none"].value == pytest.approx(0.5, abs=0.01) == report["score, all"].value
    assert report["cause, none"].value == 0 and report["isolate, all"].value < 0.02
    assert report["score, random latents"].value < 0.8


def test_composed_latents_cannot_move_one_without_the_other():
    report = disentanglement(synthetic.composites(PAIRED), PX, VALUES, sizes=[1, 4, 12, 36], pairs=300)
    assert report["score"].high < 0.65


def test_entities_stay_on_one_side_and_attributes_are_two():
    entities = VALUES["colour"] * 6 + VALUES["shape"]
    report = disentanglement(synthetic.perfect(PAIRED), PX, VALUES, sizes=[6], pairs=200, entities=entities)
    assert report["score"].value > 0.9
    with pytest.raises(DictionaryError, match="two or more"):
        disentanglement(synthetic.perfect(PAIRED), PX, {"colour": VALUES["colour"]})
