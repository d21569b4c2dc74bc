"""Kinds of neurons by layer: planted token neurons are counted, and told apart by what they take back."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from mechscope.labs.planted.weights import Planter
from mechscope.units.by_layer import neuron_kinds, suppression
from mechscope.units.responding import responses

TOKENS, POSITIONS = 24, 12


@pytest.fixture(scope="module")
def model():
    """Layer 1 has a dead neuron, one for token 1 that takes it back, one for 3 and 7 that takes 7, one that adds 4."""
    plant = Planter({"token": TOKENS, "out": TOKENS}, TOKENS, POSITIONS, 2, 1, neurons=6)
    for token in range(TOKENS):
        plant.embed(token, plant["token", token])
        plant.unembed(token, plant["out", token])
    plant.neuron(1, 0, plant["token", 2], -5.0, plant["out", 2])
    plant.neuron(1, 1, plant["token", 1], -0.5, -plant["out", 1])
    plant.neuron(1, 2, plant["token", 3] + plant["token", 7], -0.5, plant["out", 9] - plant["out", 7])
    plant.neuron(1, 3, plant["token", 4], -0.5, plant["out", 4])
    return ms.load(plant.done())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(TOKENS, (100, POSITIONS), generator=torch.Generator().manual_seed(0))


def test_planted_neurons_are_counted_in_their_layer_and_suppressors_told_from_others(model, ids):
    found = responses(model, ids, at="blocks.1.mlp_post", context=POSITIONS)
    assert suppression(model, found) == {1: (True, False), 2: (True, False), 3: (False, False)}
    table = neuron_kinds(model, ids, above=0.0, context=POSITIONS, twin=False).tables[0]
    dead, token, _, _, suppressed, control = table.rows[1].scores
    assert table.rows[1].label == "blocks.1.mlp_post"
    assert dead[0] == pytest.approx(1 / 6) and token[0] == pytest.approx(3 / 6)
    assert suppressed[0] == pytest.approx(2 / 3) and control[0] == 0.0
    assert dead[1] <= dead[0] <= dead[2] and table.rows[0].scores[4] is None


def test_the_untrained_twin_stands_beside_as_the_control():
    model = ms.load("grammar")
    found = neuron_kinds(model, torch.randint(5, 1300, (8, 32)), context=32)
    trained, twin = found.tables
    assert [row.control for row in trained.rows + twin.rows] == [False] * 4 + [True] * 4
    assert all(row.scores[1][0] == 0.0 for row in twin.rows), "permuted weights detect no token"
    assert "act(gate) * up" in found.choices["unit"] and "0.25 of the greatest" in found.choices["active"]


def test_units_that_write_nothing_have_no_direction_to_suppress_with(model, ids):
    assert suppression(model, responses(model, ids, at="blocks.1.mlp_pre", context=POSITIONS)) == {}
