"""Erasing and updating facts: what is done to values is what new weights would do, and only the fact's own do it."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from mechscope.labs.facts.kb import knowledge_base
from mechscope.labs.facts.relations import relation_named
from mechscope.units.rewriting import Asked, knowledge_edits


@pytest.fixture(scope="module")
def model():
    return ms.load("facts")


@pytest.fixture(scope="module")
def facts(model):
    """Three people's trades in three wordings each: name -> wordings, name -> answer."""
    relation = relation_named("profession")
    known = [e for e in knowledge_base().of("person") if e.common and "profession" not in e.unstated][:3]
    wordings = {e.name: [template.format(s=e.name) for template in relation.templates[:3]] for e in known}
    first = {e.name: "▁" + e.values["profession"].split()[0] for e in known}
    return wordings, {name: int(model.tokenizer.convert_tokens_to_ids(word)) for name, word in first.items()}


def test_a_rewritten_value_is_what_the_same_weights_would_give(model, facts):
    wordings, answers = facts
    asked = Asked(model, wordings, answers)
    neurons, turn = [(1, 5), (3, 7), (3, 9)], torch.randn(128, generator=torch.Generator().manual_seed(0))
    updated = asked.predicted(lambda: asked.rewritten(neurons, turn))
    erased = asked.predicted(lambda: asked.rewritten(neurons, None))
    weights = {layer: model.anatomy.layers()[layer].places["mlp_post"].module.weight for layer in (1, 3)}
    for found, change in ((updated, lambda value: value + turn), (erased, torch.zeros_like)):
        before = {layer: weight.detach().clone() for layer, weight in weights.items()}
        with torch.no_grad():
            for layer, n in neurons:
                weights[layer][:, n] = change(weights[layer][:, n])
            wanted = asked.predicted(lambda: None)
            for layer, weight in weights.items():
                weight.copy_(before[layer])
        assert torch.allclose(found, wanted, atol=1e-5)
        assert float((wanted - asked.before).abs().max()) > 1e-4


def test_a_facts_own_neurons_take_a_new_answer_and_random_ones_do_not(model, facts):
    wordings, answers = facts
    names = list(wordings)
    new = {name: answers[names[(i + 1) % 3]] for i, name in enumerate(names)}
    assert all(new[name] != answers[name] for name in names)
    found = knowledge_edits(model, wordings, answers, new, towards=2.0, controls=2, steps=6)
    own, random = found.tables[0].rows
    changed, _, kept, success, _ = own.scores
    assert changed[0] < -0.1 and abs(random.scores[0][0]) < 0.02 and kept[0] > 0.9
    assert success[1] <= success[0] <= success[2] and success[0] > random.scores[3][0] + 0.3
    assert random.control and "act(gate) * up" in found.choices["unit"]


def test_bad_input_is_named(model, facts):
    wordings, answers = facts
    with pytest.raises(ms.errors.UnitsError, match="is the one it has"):
        knowledge_edits(model, wordings, answers, answers, steps=1)
