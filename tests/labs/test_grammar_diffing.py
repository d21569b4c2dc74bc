"""The latent of a habit that a copy was taught is exclusive to it and confirmed; an L1 penalty invents exclusives."""

from __future__ import annotations

import pytest
import torch

from mechscope.labs.grammar import diffing


@pytest.fixture(scope="module")
def found():
    torch.set_num_threads(1)
    return diffing.compared(documents=320, steps=250)


def test_the_habit_has_a_latent_that_only_the_copy_has(found):
    report = found["BatchTopK"]
    assert report["concept, F1"].value > 0.85 and report["concept, exclusivity"].value > 0.75
    assert max(report[f"concept, nu {of}"].value for of in ("error", "reconstruction")) < 0.3
    assert report["shared"].value > 0.9


def test_an_l1_penalty_makes_exclusives_that_are_none_and_latent_scaling_says_so(found):
    few, many = (found[kind]["false exclusives"].value for kind in ("BatchTopK", "L1"))
    assert many >= 4 and few <= many / 2
    assert found["L1"]["false exclusives"].value > found["L1"]["confirmed"].value
