"""Supervised dictionaries control fully where attributes add up, and others are held against them; manifolds."""

from __future__ import annotations

import math

import pytest
import torch

from dictionaries import synthetic
from mechscope.dictionaries.evaluating import asked, manifold_features, sparse_control, supervised
from mechscope.dictionaries.evaluating.supervision import _edits
from mechscope.errors import DictionaryError
from mechscope.labs.sparse.manifold import Manifold

DATA = synthetic.paired(12, 32, low=1.0, high=1.0)
X, CODES = DATA.batch(0, 1500)
VALUES = {"colour": CODES[:, :6].argmax(1), "shape": CODES[:, 6:].argmax(1)}


# --- supervised dictionaries ------------------------------------------------------------------------------------------


def test_supervised_features_are_the_atoms_less_their_mean():
    atoms = 1.0 * DATA.atoms[:6]
    made = supervised(X, VALUES)
    centred = atoms - (torch.bincount(VALUES["colour"]) / len(X)) @ atoms
    cosine = torch.nn.functional.cosine_similarity(made.features["colour"], centred)
    assert cosine.min() > 0.99
    assert made.fvu(X, VALUES) < 1e-6
    varied = synthetic.paired(12, 32)
    x, codes = varied.batch(0, 1500)
    values = {"colour": codes[:, :6].argmax(1), "shape": codes[:, 6:].argmax(1)}
    assert 0.01 < supervised(x, values).fvu(x, values) < 0.15  # no value tells how large a code is


def test_least_squares_are_right_where_attributes_go_together_and_means_are_not():
    colour = torch.randint(3, (3000,), generator=torch.Generator().manual_seed(0))
    follows = torch.rand(3000, generator=torch.Generator().manual_seed(1)) < 0.8
    shape = torch.where(follows, colour, torch.randint(3, (3000,), generator=torch.Generator().manual_seed(2)))
    values = {"colour": colour, "shape": shape}
    x = torch.cat([torch.eye(3)[colour], torch.eye(3)[shape]], 1)
    squares, means = supervised(x, values), supervised(x, values, by="means")
    assert squares.fvu(x, values) < 1e-6 < 0.2 < means.fvu(x, values)
    assert squares.features["colour"][:, 3:].abs().max() < 1e-4 < 0.3 < means.features["colour"][:, 3:].abs().max()


def test_supervised_and_perfect_dictionaries_control_and_random_ones_do_not():
    good = sparse_control(synthetic.perfect(DATA), X, VALUES, latents=[1, 2])
    assert good["control, supervised"].value > 0.97 and good["others kept, supervised"].value > 0.97
    # One latent must go and another come; with one of them alone half of the work is done.
    assert good["control, 2 latents"].value > 0.97 and good["others kept, 2 latents"].value > 0.97
    assert good["control, nothing"].value == 0 and good["control, other row"].value > 0.98
    assert good["control, random, 2 latents"].value < good["control, 2 latents"].value
    bad = sparse_control(synthetic.random(DATA), X, VALUES, latents=[2])
    assert bad["control, 2 latents"].value < 0.6
    assert bad["sufficient, dictionary", "colour"].value < 0.8 < good["sufficient, dictionary", "colour"].value


def test_latents_are_changed_that_bring_the_row_nearest():
    """Beside each atom's latent is one that fires five times as hard, and would overshoot."""
    made = synthetic.ByHand(DATA.atoms, DATA.atoms.repeat(2, 1), lambda codes: torch.cat([codes, 5 * codes], 1))
    base, source = torch.arange(20), torch.arange(20, 40)
    edits = _edits(made, X, base, source, [1, 2, 4], torch.Generator().manual_seed(0))
    away = [(edits[f"{k} latents"] - X[source]).norm(dim=1) for k in (1, 2, 4)]
    start = (X[base] - X[source]).norm(dim=1)
    assert (away[0] <= start).all() and (away[1] <= away[0]).all() and away[2].max() < 1e-4


def test_what_is_left_over_of_a_good_reconstruction_says_nothing():
    report = sparse_control(synthetic.perfect(DATA), X, VALUES, latents=[1])
    for who in ("supervised", "dictionary"):
        assert report[f"left over, {who}", "shape"].value < 0.4
    assert report["read off x", "shape"].value > 0.98


def test_rows_that_differ_in_one_attribute_alone_are_needed():
    with pytest.raises(DictionaryError, match="alone"):
        sparse_control(None, X, {"one": VALUES["colour"], "same": VALUES["colour"]})
    with pytest.raises(DictionaryError, match="did you mean 'colour'"):
        supervised(X, VALUES).edit(X, "color", VALUES["colour"], VALUES["colour"])


def test_the_models_answers_on_mini_ioi():
    """The planted circuit writes the answer's name at the end, and the place of the repeated name."""
    from mechscope.labs.planted import make

    planted = make("mini-ioi")
    model, pairs = planted.model, planted.task.pairs
    prompts = [pair.clean for pair in pairs]
    site = "blocks.2.resid_post"
    x = model.run([list(p) for p in prompts], save=site)[site][:, -1]
    values = {"answer": torch.tensor([pair.answers[0] for pair in pairs])}
    read = asked(model, site, {"answer": prompts}, {"answer": list(range(6))})
    d = x.shape[1]
    report = sparse_control(_basis(d), x, values, read, latents=[1, 2, 4])
    assert report["control, supervised"].value > 0.95 and report["sufficient, supervised", "answer"].value > 0.95
    assert report["control, nothing"].value == 0 and report["control, other row"].value > 0.95
    assert report["control, 2 latents"].value > 0.9
    turned = sparse_control(_basis(d, seed=3), x, values, read, latents=[2])
    assert turned["control, 2 latents"].value < report["control, supervised"].value - 0.2


def _basis(d: int, seed: int | None = None) -> synthetic.ByHand:
    """A latent for each direction of the stream and its opposite; with a seed, of another basis."""
    axes = torch.eye(d)
    if seed is not None:
        axes = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed))).Q
    both = torch.cat([axes, -axes])
    made = synthetic.ByHand(both, both)
    made.encode = lambda x: (x @ both.T).relu()  # type: ignore[method-assign]
    return made


# --- manifolds --------------------------------------------------------------------------------------------------------

CIRCLE = Manifold(d=16, kind="circle", noise=0.01)


def tiled(size: int) -> synthetic.ByHand:
    """Atoms evenly around the circle, of which the nearest two fire, as much as it takes to make the point of them."""
    angle = 2 * math.pi * torch.arange(size) / size
    atoms = torch.stack([angle.cos(), angle.sin()], 1) @ CIRCLE.subspaces[0]

    def rule(codes: torch.Tensor) -> torch.Tensor:
        near, best = codes.topk(2, dim=1)
        g = math.cos(2 * math.pi / size)
        return torch.zeros_like(codes).scatter(1, best, (near - g * near.flip(1)) / (1 - g**2))

    return synthetic.ByHand(atoms, atoms, rule)


def test_atoms_grow_with_size_while_the_place_stays():
    x, points = CIRCLE.batch(0, 2000)
    report = manifold_features({size: tiled(size) for size in (8, 16, 32)}, x, points[:, 0])
    assert report.of("latents") == {"8": 8, "16": 16, "32": 32}
    widths, gaps = report.of("width"), report.of("gap")
    assert widths["8"] > 1.8 * widths["16"] > 3 * widths["32"]
    assert gaps["32"] == pytest.approx(math.pi / 32, abs=0.02)
    assert max(report.of("probe error").values()) < 0.1
    assert min(report.of("shuffled").values()) > 1.2
    assert report["probe error of x"].value < 0.05


def test_random_directions_are_not_on_the_manifold():
    x, points = CIRCLE.batch(0, 1000)
    drawn = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    report = manifold_features({32: synthetic.ByHand(drawn, drawn)}, x, points[:, 0])
    assert report["latents", "32"].value <= 2


def test_a_dictionary_that_dropped_the_manifold_does_not_tell_the_place():
    x, points = CIRCLE.batch(0, 1000)
    one = CIRCLE.subspaces[0][:1]  # a single direction: cosines without sines
    report = manifold_features({1: synthetic.ByHand(one, one)}, x, points[:, 0])
    assert report["probe error", "1"].value > 0.5


def test_spheres_too_and_points_that_are_no_places():
    data = Manifold(d=16, kind="sphere")
    x, points = data.batch(0, 1500)
    atoms = torch.nn.functional.normalize(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    report = manifold_features(
        {64: synthetic.ByHand(atoms @ data.subspaces[0], atoms @ data.subspaces[0])}, x, points[:, 0]
    )
    assert report["latents", "64"].value == 64 and report["probe error", "64"].value < 0.1
    with pytest.raises(DictionaryError, match="unit vectors"):
        manifold_features({8: tiled(8)}, x, 3 * points[:, 0])
