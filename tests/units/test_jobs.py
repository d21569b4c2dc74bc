"""Heads of one job each: planted ones are found and those that look alike are not; an untrained model has none."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from mechscope.errors import UnitsError
from mechscope.labs.facts import lab as facts
from mechscope.labs.facts.evaluate import question
from mechscope.labs.facts.kb import knowledge_base
from mechscope.labs.facts.relations import relation_named
from mechscope.labs.facts.text import trained
from mechscope.labs.planted import roles
from mechscope.labs.planted.heads import mini_ioi
from mechscope.labs.planted.kinds import SUPPRESSOR, writing_kinds
from mechscope.units import (
    FewShot,
    Related,
    copy_suppression_kind,
    false_induction_heads,
    iteration_heads,
    misled,
    repaired_by_suppression,
    residue_features,
    semantic_induction_heads,
    successor_heads,
    untrained_twin,
)


@pytest.fixture(scope="module")
def following():
    return roles.following()


@pytest.fixture(scope="module")
def relating():
    return roles.relating()


@pytest.fixture(scope="module")
def counting():
    return roles.counting()


# --- iteration --------------------------------------------------------------------------------------------------------


def test_the_head_that_fetches_each_steps_input_is_found_and_the_one_of_fixed_distance_is_not():
    model, (rows, inputs) = roles.iterating(), roles.iterating_rows()
    logits = [model.run(torch.tensor([row])).logits[0, n:].argmax(-1).tolist() for row, n in zip(rows, inputs)]
    assert logits == [row[:n] for row, n in zip(rows, inputs)]
    found = iteration_heads(model, rows, inputs)["iteration"]
    assert found.heads == [roles.ITERATION] and float(found.score[roles.ITERATION]) == pytest.approx(1.0)
    assert float(found.score[1, 1]) < 0.7  # right on the rows of as many inputs as it looks back
    assert iteration_heads(untrained_twin(model), rows, inputs)["iteration"].heads == []


def test_rows_of_an_iteration_are_long_enough_and_tell_inputs_apart():
    model = roles.iterating()
    with pytest.raises(UnitsError, match=r"row 0 has 5 tokens.*take 6"):
        iteration_heads(model, [[0, 1, 2, 6, 0]], [3])
    with pytest.raises(UnitsError, match="two inputs or more"):
        iteration_heads(model, [[0, 6]], [1])


# --- semantic induction -----------------------------------------------------------------------------------------------


def test_heads_that_write_a_relations_tail_are_found_by_relation(relating):
    model, triples = relating
    found = semantic_induction_heads(model, triples)
    assert found["semantic-induction: capital"].heads == [roles.CAPITAL]
    assert found["semantic-induction: river"].heads == [roles.RIVER]
    # Two that attend to every entity as much, and write the entity or something random, are none.
    assert set(found["semantic-induction"].heads) == {roles.CAPITAL, roles.RIVER}
    assert float(found["semantic-induction: capital"].score[roles.CAPITAL]) == pytest.approx(2.0, abs=1e-4)
    assert not any(kind.heads for kind in semantic_induction_heads(untrained_twin(model), triples))


def test_permuted_relations_have_no_heads(relating):
    model, triples = relating
    turned = [Related(one.text, one.head, other.tail, one.relation) for one, other in zip(triples, triples[4:])]
    assert not any(kind.heads for kind in semantic_induction_heads(model, turned))


def test_a_trained_models_facts_are_raised_by_late_heads_and_permuted_ones_are_not():
    model, triples = facts.load(), []
    for relation in ("country", "climate"):
        row = relation_named(relation)
        able = [e for e in knowledge_base().of("city") if e.common and e.length == 2 and relation not in e.unstated]
        for entity in able[:12]:
            asked = question(entity, relation, trained(entity, row)[0])
            triples.append(Related(asked.text, entity.name, asked.answer.strip(), relation))
    found = semantic_induction_heads(model, triples)
    assert found["semantic-induction: country"].heads[0] == found["semantic-induction: climate"].heads[0] == (4, 2)
    turned = []
    for half in (triples[:12], triples[12:]):
        turned += [Related(a.text, a.head, b.tail, a.relation) for a, b in zip(half, half[5:] + half[:5])]
    assert not any(kind.heads for kind in semantic_induction_heads(model, turned))
    assert not any(kind.heads for kind in semantic_induction_heads(facts.untrained(), triples))


def test_triples_say_what_is_missing(relating):
    model, triples = relating
    with pytest.raises(UnitsError, match="2 tails; give triples of 3"):
        semantic_induction_heads(model, [one for one in triples if one.tail in (9, 12)])
    with pytest.raises(UnitsError, match="no position 9"):
        semantic_induction_heads(model, [Related((0, 1), 9, 3)])
    with pytest.raises(UnitsError, match="does not stand in"):
        semantic_induction_heads(ms.load("facts"), [Related("Great Oak is a city in", "Small Oak", "Moravia")])
    with pytest.raises(UnitsError, match="is not one token after"):
        semantic_induction_heads(ms.load("facts"), [Related("Great Oak is a city in", "Great Oak", "a b")])


# --- false induction --------------------------------------------------------------------------------------------------


def test_the_head_that_promotes_false_labels_is_found_and_ablating_it_restores_the_truth(following):
    model, prompts = following
    found = false_induction_heads(model, prompts)
    for name, score in (("label-attending", 1.0), ("false-induction", 3.0)):
        assert found[name].heads == [roles.FALSE_INDUCTION], str(found)  # not the one that reads all labels alike
        assert float(found[name].score[roles.FALSE_INDUCTION]) == pytest.approx(score, abs=1e-4)
    margins = {
        (without, false): float(misled(model, prompts, without, false).mean())
        for without in ((), (roles.FALSE_INDUCTION,), ((2, 1),))
        for false in (True, False)
    }
    assert margins[(), True] == pytest.approx(-1.0) and margins[(), False] == pytest.approx(5.0)
    cured = margins[(roles.FALSE_INDUCTION,), True], margins[(roles.FALSE_INDUCTION,), False]
    assert cured == pytest.approx((2.0, 2.0))
    assert margins[((2, 1),), True] == pytest.approx(-1.0)  # control: another head that attends to labels


def test_an_untrained_twin_and_right_labels_show_no_false_induction(following):
    model, prompts = following
    assert not any(kind.heads for kind in false_induction_heads(untrained_twin(model), prompts))
    # Where the labels shown are right, the same head promotes the right one by as much.
    turned = false_induction_heads(model, prompts)["false-induction"]
    assert float(turned.control.mean(-1)[roles.FALSE_INDUCTION]) == pytest.approx(-3.0, abs=1e-4)


def test_few_shot_prompts_of_text_find_their_labels():
    model = ms.load("grammar")
    prompts = [
        FewShot(((f"the {thing}", 0), ("a dog", 1)), ("the boat", 0), (" red", " blue"), between=" is", after=".")
        for thing in ("cat", "box")
    ]
    found = false_induction_heads(model, prompts)
    assert found["label-attending"].score.shape == (model.n_layers, model.n_heads)
    with pytest.raises(UnitsError, match="is not one token"):
        false_induction_heads(model, [FewShot((("a", 0), ("b", 1)), ("c", 0), (" qqq zzz", " blue"))])


# --- what a successor head reads --------------------------------------------------------------------------------------


def test_adding_a_feature_modulo_ten_shifts_what_the_successor_writes(counting):
    assert successor_heads(counting, {"numbers": range(40)})["successor"].heads == [roles.COUNTING]
    found = residue_features(counting, roles.COUNTING, range(40))
    shares = {row.label: row.scores[0][0] for row in found.tables[0].rows}
    assert shares["features modulo 10"] == shares["nothing, the successor's own residue"] == 1.0
    assert max(shares["a random change as large"], shares["features of residues dealt out at random"]) < 0.3
    assert [row.control for row in found.tables[0].rows] == [False, True, True, True]


def test_a_head_that_writes_no_successor_does_not_shift_by_as_much(counting):
    assert residue_features(counting, roles.COPYING, range(40))["features modulo 10"][0] == 0.0
    assert residue_features(counting, (1, 2), range(40))["features modulo 10"][0] < 0.3
    with pytest.raises(UnitsError, match="give 30"):
        residue_features(counting, roles.COUNTING, range(20))


# --- copy suppression: as a kind, and in self-repair ------------------------------------------------------------------


def test_copy_suppression_is_a_kind_that_one_run_tells():
    model, generator = writing_kinds(), torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(24, generator=generator)[:12] for _ in range(16)])
    found = copy_suppression_kind(model, ids)
    assert found.heads == [SUPPRESSOR] and float(found.score[SUPPRESSOR]) > 0.7
    assert copy_suppression_kind(untrained_twin(model), ids).heads == []
    with pytest.raises(UnitsError, match="three positions"):
        copy_suppression_kind(model, ids[:, :2])


def test_the_share_of_self_repair_that_is_copy_suppression_is_what_was_planted():
    model, task = roles.mending()
    found = repaired_by_suppression(model, task, [roles.PREDICTS], by="zero")
    rows = {row.label: [score[0] for score in row.scores] for row in found.tables[0].rows}
    assert rows["1.0"] == pytest.approx([2 / 3, 2 / 3, 0.0], abs=1e-5)
    assert rows["1.1"] == pytest.approx([1 / 3, 0.0, 0.0], abs=1e-5) and rows["1.2"] == pytest.approx([0.0] * 3)
    sizes = {row.label: row.scores[0][0] for row in found.tables[1].rows}
    assert sizes == pytest.approx({"lost": 3.0, "metric": 1.5, "repaired": 1.5}, abs=1e-4)


def test_a_backup_repairs_without_suppressing():
    planted = mini_ioi()
    found = repaired_by_suppression(planted.model, planted.task, [(2, 0)], by="zero")
    assert found["3.0"][0] == pytest.approx(1.0, abs=1e-4)
    assert all(abs(row.scores[1][0]) < 1e-4 for row in found.tables[0].rows)
    by_mean = repaired_by_suppression(planted.model, planted.task, [(2, 0)])
    assert by_mean["3.0"][0] == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(UnitsError, match="nothing repairs"):
        repaired_by_suppression(planted.model, planted.task, [(3, 2)])
    with pytest.raises(UnitsError, match=r"no head 9\.0"):
        repaired_by_suppression(planted.model, planted.task, [(9, 0)])
