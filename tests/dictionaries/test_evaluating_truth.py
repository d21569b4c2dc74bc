"""Against known atoms: recovery, splitting, composition, and what single latents tell, of dictionaries made by hand."""

from __future__ import annotations

import pytest
import torch

from dictionaries import synthetic
from mechscope.dictionaries import TopK
from mechscope.dictionaries.evaluating import (
    atom_recovery,
    composed_features,
    concept_recovery,
    feature_splitting,
)
from mechscope.dictionaries.evaluating.concepts import auroc
from mechscope.errors import DictionaryError

DATA = synthetic.flat()
X, CODES = DATA.batch(0, 4000)


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_a_perfect_dictionary_recovers_every_atom_and_its_shuffle_does_not():
    report = atom_recovery(synthetic.perfect(DATA), DATA.atoms)
    assert report["mean max cosine"].value == pytest.approx(1) == report["recovered"].value
    assert report["mean max cosine, latents"].value == pytest.approx(1)
    assert report["mean max cosine, shuffled"].value < 0.5


def test_a_random_dictionary_recovers_nothing():
    report = atom_recovery(synthetic.random(DATA, 64), DATA.atoms)
    assert report["mean max cosine"].high < 0.5 and report["recovered"].value == 0


def test_precision_and_recall_are_told_apart():
    half = synthetic.ByHand(DATA.atoms[:16], DATA.atoms[:16])
    report = atom_recovery(half, DATA.atoms)
    assert report["mean max cosine, latents"].value == pytest.approx(1) and report["recovered"].value == 0.5
    twice = synthetic.split(DATA)
    assert atom_recovery(twice, DATA.atoms)["matched cosine"].value == pytest.approx(1)


def test_what_a_transcoder_reads_is_compared_with_its_encoder():
    transcoder = TopK(64, 32, d_out=12, k=2)
    with torch.no_grad():
        transcoder.W_enc.copy_(3 * DATA.atoms)
    assert atom_recovery(transcoder, DATA.atoms, side="reads")["recovered"].value == 1
    with pytest.raises(DictionaryError, match="do not compare"):
        atom_recovery(transcoder, DATA.atoms)


# --- splitting --------------------------------------------------------------------------------------------------------


def test_splitting_counts_the_latents_of_each_atom():
    made = {32: synthetic.perfect(DATA), 64: synthetic.split(DATA, 2), 128: synthetic.split(DATA, 4)}
    report = feature_splitting(made, DATA.atoms)
    assert report.of("latents an atom") == {"32": 1, "64": 2, "128": 4}
    assert report["split", "32"].value == 0 and report["split", "64"].value == 1
    assert all(m.value < 0.1 for m in report.measures if m.control)


def test_random_latents_belong_to_no_atom():
    report = feature_splitting({"random": synthetic.random(DATA, 256)}, DATA.atoms)
    assert report["latents an atom", "random"].value == 0 == report["found", "random"].value


# --- composition ------------------------------------------------------------------------------------------------------


def test_sums_of_two_atoms_are_flagged_and_atoms_are_not():
    data = synthetic.paired()
    x, codes = data.batch(0, 2000)
    report = composed_features(synthetic.composites(data), data.atoms, x, codes)
    assert report["composed"].value == 1 and report["for pairs alone"].value == 1
    assert report["pairs active"].value == pytest.approx(1 / 16, abs=0.01)
    assert report["composed, shuffled"].value < 0.2
    plain = composed_features(synthetic.perfect(data), data.atoms, x, codes)
    assert plain["composed"].value == 0 and plain["single atoms"].value == 1


def test_sums_are_flagged_where_atoms_are_not_orthogonal():
    from mechscope.labs.sparse import Sparse

    atoms = Sparse(d=64, n_atoms=128, seed=3).atoms
    pairs = torch.combinations(torch.arange(128))[::100]
    sums = atoms[pairs[:, 0]] + 0.7 * atoms[pairs[:, 1]]
    report = composed_features(synthetic.ByHand(atoms, torch.cat([atoms, sums])), atoms)
    flagged = report.tensors["flagged"]
    assert not flagged[:128].any() and flagged[128:].float().mean() > 0.95
    found = torch.stack([report.tensors["first"], report.tensors["second"]], 1)[128:].sort(1).values
    assert (found == pairs).all(1).float().mean() > 0.95


def test_a_trace_of_a_second_atom_makes_no_sum():
    one, other, rest = DATA.atoms[0], DATA.atoms[1], DATA.atoms[2:].sum(0) / 30**0.5
    traced = 0.88 * one + 0.2 * other + (1 - 0.88**2 - 0.2**2) ** 0.5 * rest
    fair = 0.75 * one + 0.55 * other + (1 - 0.75**2 - 0.55**2) ** 0.5 * rest
    made = synthetic.ByHand(DATA.atoms[:2], torch.stack([traced, fair]))
    assert composed_features(made, DATA.atoms).tensors["flagged"].tolist() == [False, True]


def test_random_directions_and_a_latent_that_never_writes_are_not_flagged():
    assert composed_features(synthetic.random(DATA, 200), DATA.atoms)["composed"].value == 0
    assert composed_features(synthetic.padded(DATA, 0, 4), DATA.atoms)["composed"].value == 0


# --- concepts ---------------------------------------------------------------------------------------------------------


def test_a_perfect_dictionary_tells_every_concept():
    report = concept_recovery(synthetic.perfect(DATA), X, CODES > 0)
    assert report["AUROC"].value == 1 == report["F1"].value == report["found"].value
    assert report.tensors["latent"].tolist() == list(range(32))
    assert report["AUROC, shuffled"].value == pytest.approx(0.5, abs=0.05)
    assert report["F1, shuffled"].value < 0.35


def test_half_of_a_split_concept_is_told_by_one_latent():
    report = concept_recovery(synthetic.split(DATA, 2), X, CODES > 0)
    assert report["AUROC"].value == pytest.approx(0.75, abs=0.03)
    assert report["F1"].value == pytest.approx(2 / 3, abs=0.05)
    assert report["found"].value == 0


def test_random_latents_tell_less():
    report = concept_recovery(synthetic.random(DATA, 64), X, CODES > 0)
    assert report["found"].value < 0.1 and report["F1"].value < 0.75


def test_the_area_under_the_curve_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    values, on = torch.randint(0, 5, (200, 3)).float(), torch.rand(200) > 0.7
    expected = [roc_auc_score(on, values[:, i]) for i in range(3)]
    assert auroc(values, on).tolist() == pytest.approx(expected)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(DictionaryError, match="4000 rows"):
        concept_recovery(synthetic.perfect(DATA), X, {"odd": torch.ones(7, dtype=torch.bool)})
    with pytest.raises(DictionaryError, match="none of 1"):
        concept_recovery(synthetic.perfect(DATA), X, torch.ones(4000, dtype=torch.bool))
