"""Neurons that predict one token: the planted one is first by its weights and by patching, and on no control."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from mechscope.labs.planted.weights import Planter
from mechscope.tasks import Pair, Task
from mechscope.units.congruence import neuron_patching, token_congruence

AN, A, VOWEL, CONSONANT, TOKENS, NEURONS = 5, 6, 0, 2, 12, 8


@pytest.fixture(scope="module")
def model():
    """Head 0.0 brings the first token to the end; neuron 1.3 sees a vowel there and writes towards " an"."""
    plant = Planter({"token": TOKENS, "brought": TOKENS, "out": TOKENS}, TOKENS, 3, 2, 1, NEURONS, head_dim=TOKENS)
    noise = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(3))
    for token in range(TOKENS):
        plant.embed(token, plant["token", token])
        # No row is a unit vector: what other neurons write is seen by every token.
        plant.unembed(token, plant["out", token] + sum(0.1 * x * v for x, v in zip(noise[token], plant.all("out"))))
    plant.attend(0, 0, [40.0 * plant["pos", 2]], [plant["pos", 0]])
    plant.move(0, 0, plant.all("token"), plant.all("brought"))
    plant.neuron(1, 3, plant["brought", VOWEL] + plant["brought", VOWEL + 1], 0.0, 3.0 * plant["out", AN])
    plant.neuron(1, 5, plant["brought", CONSONANT] + plant["brought", CONSONANT + 1], 0.0, 2.0 * plant["out", A])
    plant.neuron(0, 2, plant["token", VOWEL], 0.0, plant["out", 9])
    return ms.load(plant.done())


@pytest.fixture(scope="module")
def task():
    pairs = [
        Pair((vowel, 8, other), (consonant, 8, other), (AN,), (A,))
        for vowel in (VOWEL, VOWEL + 1)
        for consonant in (CONSONANT, CONSONANT + 1)
        for other in (8, 9, 10)
    ]
    return Task("an", tuple(pairs))


def test_the_planted_neuron_is_first_by_its_weights_and_above_shuffled_rows(model):
    found = token_congruence(model, AN)
    first, second = found.tables[0].rows[:2]
    assert first.label == "1.3" and first.scores[0][0] > 2 * abs(second.scores[0][0])
    assert first.scores[1][0] == 1.0, "the token is what the neuron raises most"
    shuffled = found["shuffled row"]
    assert shuffled[0] <= shuffled[2] < first.scores[0][0]
    assert found["another token"][0] < first.scores[0][0]
    assert "1 of 16 neurons" in found.answer
    assert tuple(found.tensors["1"].shape) == (NEURONS,) and int(found.tensors["1"].argmax()) == 3


def test_the_control_token_has_another_first_neuron(model):
    assert token_congruence(model, A).tables[0].rows[0].label == "1.5"
    assert token_congruence(model, 7).tables[0].rows[0].scores[0][0] < 0.5 * token_congruence(model, AN)["1.3"][0]


def test_congruence_is_the_slope_of_the_logit(model):
    """One more of the neuron's activation raises the token's logit over the mean by the congruence (no final norm)."""
    ids, site = torch.tensor([[VOWEL, 8, 9]]), "blocks.1.mlp_post"

    def above_mean(logits):
        return logits[0, -1, AN] - logits[0, -1].mean()

    def more(post):
        post = post.clone()
        post[..., 3] += 1.0
        return post

    rise = above_mean(model.run(ids, edits={site: more}).logits) - above_mean(model.run(ids).logits)
    assert float(rise) == pytest.approx(token_congruence(model, AN)["1.3"][0], rel=1e-4)


def test_the_planted_neuron_is_first_by_patching_and_random_changes_are_not(model, task):
    found = neuron_patching(model, task, controls=4)
    first, second = found.tables[0].rows[:2]
    assert first.label == "1.3" and second.label == "1.5"
    value, low, high = first.scores[0]
    assert low <= value <= high and value > second.scores[0][0] > 0
    assert first.scores[1][0] + second.scores[1][0] == pytest.approx(1.0, abs=0.05), "the two bring all of it back"
    threshold = float(found.choices["threshold"].split(":")[0])
    assert threshold < second.scores[0][1] and "2 neurons" in found.answer
    assert all(abs(row.scores[0][0]) <= threshold for row in found.tables[0].rows if row.control)


def test_a_gated_mlp_is_said_to_be_gated_and_bad_input_is_named():
    model = ms.load("grammar")
    task = ms.tasks.agreement(model.tokenizer, n=8)
    found = neuron_patching(model, task, layers=[-1], top=3, controls=2)
    assert "act(gate) * up" in found.choices["unit"] and all(r.label.startswith("3.") for r in found.tables[0].rows[:3])
    assert "act(gate) * up" in token_congruence(model, " the", layers=[3], controls=3).choices["unit"]
    with pytest.raises(ms.errors.UnitsError, match="no layer 9"):
        token_congruence(model, " the", layers=[9])
    with pytest.raises(ms.errors.UnitsError, match="tokens here"):
        token_congruence(model, " unheardof")
