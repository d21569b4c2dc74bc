"""Trained dictionaries have the faults that theory foretells, and the metrics flag them: absorbed, composed, tiled."""

from __future__ import annotations

import random

import torch

import mechscope as ms
from mechscope.dictionaries import Matryoshka, TopK, train
from mechscope.dictionaries.evaluating import (
    composed_features,
    feature_absorption,
    loss_recovered,
    manifold_features,
)
from mechscope.labs import grammar
from mechscope.labs.sparse import Manifold, Sparse


def test_topk_absorbs_parents_and_matryoshka_does_not():
    data = Sparse(d=32, n_atoms=32, active=3, structure="hierarchical", orthogonal=True)
    x, codes = data.batch(10**6, 3000)
    parents = (data.parents < 0).nonzero().flatten().tolist()
    labels, true = {f"{i}": codes[:, i] > 0 for i in parents}, {f"{i}": data.atoms[i] for i in parents}
    plain, nested = TopK(32, 32, k=3), Matryoshka(32, 32, k=3, sizes=[8, 32])
    train([plain, nested], data.stream(256), steps=400)
    absorbed, free = (feature_absorption(made, x, labels, true, main="aligned") for made in (plain, nested))
    assert absorbed["absorbed"].value > 0.1 and absorbed["absorbed"].low > 0
    for name in ("absorbed", "fraction"):
        assert free[name].value < absorbed[name].value / 3
    # An absorbing latent writes its parent too: a sum of two atoms.
    sums = [composed_features(made, data.atoms)["composed"].value for made in (plain, nested)]
    assert sums[0] > 0.3 > sums[1]


def test_room_for_every_pair_makes_latents_of_pairs():
    data = Sparse(d=32, n_atoms=16, active=2, structure="composed")
    x, codes = data.batch(10**6, 3000)
    tight, roomy = TopK(32, 16, k=2), TopK(32, 64, k=1)
    train([tight, roomy], data.stream(256), steps=300)
    few, many = (composed_features(made, data.atoms, x, codes) for made in (tight, roomy))
    assert few["composed"].value < 0.3 and few["single atoms"].value > 0.6
    assert many["composed"].value > 0.4 and many["composed, shuffled"].value < 0.1
    assert many["for pairs alone"].value > 10 * many["pairs active"].value


def test_a_circle_is_tiled_by_more_latents_as_there_are_more_and_its_place_stays():
    data = Manifold(d=4, noise=0.02)
    x, points = data.batch(10**6, 2000)
    made = {size: TopK(4, size, k=2, dead_after=5000) for size in (8, 32)}
    train(list(made.values()), data.stream(256), steps=250)
    report = manifold_features(made, x, points[:, 0])
    latents, widths, errors = (report.of(name) for name in ("latents", "width", "probe error"))
    assert latents["32"] >= 2 * latents["8"] and widths["32"] < 0.6 * widths["8"]
    assert max(errors.values()) < 0.2 and min(report.of("shuffled").values()) > 1.3


def test_the_bundled_model_gives_a_ratio_of_kls_with_its_interval():
    model = ms.load(grammar.folder())
    draw = random.Random(0)
    texts = [" ".join(s.text for s in grammar.document(draw, 400)) for _ in range(24)]
    site = "blocks.2.resid_post"
    sae = TopK(model.d_model, 512, k=16, reads=site)
    untrained = loss_recovered(model, texts, sae, context=48, limit=16)
    train(sae, model.stream(texts, at=site, context=48, vectors=256, loop=True), steps=60)
    report = loss_recovered(model, texts, sae, context=48, limit=16)
    ratio = report["KL ratio"]
    assert ratio.low < ratio.value < ratio.high and ratio.value > 0
    assert report["loss recovered, mean"].value > untrained["loss recovered, mean"].value + 0.1
    assert torch.isfinite(report.tensors["sums"]).all()
