"""Absorption and sparse probing of dictionaries made by hand, whose scores are known."""

from __future__ import annotations

import pytest
import torch

from dictionaries import synthetic
from mechscope.dictionaries.evaluating import feature_absorption, sparse_probing
from mechscope.labs.sparse import Sparse

DATA = synthetic.nested()
X, CODES = DATA.batch(0, 6000)
PARENTS = (DATA.parents < 0).nonzero().flatten()
LABELS = {f"parent {int(i)}": CODES[:, i] > 0 for i in PARENTS}
TRUE = {f"parent {int(i)}": DATA.atoms[i] for i in PARENTS}


# --- absorption -------------------------------------------------------------------------------------------------------


def test_an_absorbed_parent_is_flagged_and_its_children_named():
    report = feature_absorption(synthetic.absorbed(DATA), X, LABELS, TRUE, main="aligned")
    # The parent's latent rests where any of three children is active, each half of the time; of what it would write,
    # the strongest child's latent writes less than 0.4 once in a hundred rows.
    assert report["absorbed"].value == pytest.approx(7 / 8, abs=0.03)
    assert report["main latents fire"].value == pytest.approx(1 / 8, abs=0.02)
    assert report["fraction"].value == pytest.approx(7 / 8, abs=0.03)
    assert set(report.tensors["absorbers.parent 4"].tolist()) == {5, 6, 7}
    assert "main 4; absorbed by" in report["absorbed", "parent 4"].about


def test_a_perfect_dictionary_absorbs_nothing():
    for main in ("aligned", "sparse"):
        report = feature_absorption(synthetic.perfect(DATA), X, LABELS, TRUE, main=main)
        assert report["absorbed"].value == 0 == report["fraction"].value
        assert report["main latents fire"].value == 1


def test_children_are_not_absorbed_where_parents_are():
    children = (DATA.parents >= 0).nonzero().flatten()[:4]
    labels = {f"child {int(i)}": CODES[:, i] > 0 for i in children}
    true = {f"child {int(i)}": DATA.atoms[i] for i in children}
    report = feature_absorption(synthetic.absorbed(DATA), X, labels, true, main="aligned")
    assert report["absorbed"].value == 0


def test_a_random_dictionary_is_bad_but_not_absorbing():
    report = feature_absorption(synthetic.random(DATA, 64), X, LABELS, TRUE, main="aligned")
    assert report["absorbed"].value < 0.15


def test_rare_children_take_a_concept_over_and_fitted_probes_see_it():
    """Each of 15 children takes a twentieth of the parent, which rests where any is active."""
    data = Sparse(d=64, n_atoms=32, active=1.75, structure="hierarchical", group=16, together=0.05, orthogonal=True)
    x, codes = data.batch(0, 6000)
    labels = {f"parent {i}": codes[:, i] > 0 for i in (0, 16)}
    resting = 1 - 0.95**15
    for how in (dict(main="aligned"), dict(split=0.06)):
        report = feature_absorption(synthetic.absorbed(data), x, labels, **how)
        assert report["absorbed"].value == pytest.approx(resting, abs=0.04)
        assert all(report["main latents", name].value == 1 for name in labels)
    # As published, a child whose latent raises the F1 by more than 0.03 is a part of an honest split.
    published = feature_absorption(synthetic.absorbed(data), x, labels)
    assert 0.2 < published["absorbed"].value < resting and published["main latents", "parent 0"].value > 1
    assert feature_absorption(synthetic.perfect(data), x, labels)["absorbed"].value == 0


def test_an_honest_split_is_no_absorption():
    data = synthetic.flat()
    x, codes = data.batch(0, 4000)
    report = feature_absorption(synthetic.split(data, 2), x, codes[:, :6] > 0)
    assert report["absorbed"].value == 0
    assert all(report["main latents", str(i)].value == 2 for i in range(6))


def test_the_decoders_bias_is_not_what_latents_have_to_write():
    dictionary, shift = synthetic.absorbed(DATA), 20 * torch.ones(DATA.d)
    with torch.no_grad():
        dictionary.b_dec.copy_(shift)
    dictionary.encode = lambda x: synthetic.ByHand.encode(dictionary, x - shift)  # type: ignore[method-assign]
    moved = feature_absorption(dictionary, X + shift, LABELS, TRUE, main="aligned")
    plain = feature_absorption(synthetic.absorbed(DATA), X, LABELS, TRUE, main="aligned")
    assert moved["absorbed"].value == pytest.approx(plain["absorbed"].value, abs=1e-3)


# --- sparse probing ---------------------------------------------------------------------------------------------------


def test_one_latent_of_a_perfect_dictionary_is_a_probe():
    data = synthetic.flat()
    x, codes = data.batch(0, 4000)
    report = sparse_probing(synthetic.perfect(data), x, codes[:, :6] > 0)
    assert report["latents, k = 1"].value > 0.99 < report["all of x"].value
    assert report["random latents, k = 1"].value == pytest.approx(0.5, abs=0.08)
    assert report["dimensions, k = 1"].value < 0.8
    assert report.tensors["latents.3"][0] == 3


def test_a_split_concept_takes_as_many_latents_as_it_has():
    data = synthetic.flat()
    x, codes = data.batch(0, 4000)
    report = sparse_probing(synthetic.split(data, 2), x, codes[:, :6] > 0)
    assert report["latents, k = 1"].value == pytest.approx(0.75, abs=0.04)
    assert report["latents, k = 2"].value > 0.99


def test_an_absorbed_concept_takes_its_children_too():
    report = sparse_probing(synthetic.absorbed(DATA), X, LABELS, k=[1, 4])
    assert report["latents, k = 1"].value < 0.8 and report["latents, k = 4"].value > 0.97


def test_a_random_dictionary_probes_no_better_than_dimensions():
    data = synthetic.flat()
    x, codes = data.batch(0, 4000)
    report = sparse_probing(synthetic.random(data, 32), x, codes[:, :6] > 0)
    assert report["latents, k = 1"].value < report["dimensions, k = 1"].value + 0.12
    assert report["latents, k = 1"].value < 0.85
