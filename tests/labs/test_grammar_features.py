"""On the small bundled model: a search finds names' latent, and clamping latents raises the words that they fire on."""

from __future__ import annotations

import pytest
import torch

from mechscope.labs import shelf
from mechscope.labs.grammar import features


@pytest.fixture(scope="module")
def studied():
    torch.set_num_threads(1)
    model = shelf.load("grammar-small")
    x, _ = features.vectors(model, 512, seed=0)
    held, tokens = features.vectors(model, 160, seed=1000)
    return model, features.trained(x, (256,), 250, k=8)[0], held, tokens


def test_a_few_names_find_a_latent_that_is_rare_elsewhere(studied):
    report = features.search(*studied)
    assert report["active here"].value > 0.8 and report["active elsewhere"].value < 0.2


def test_clamped_latents_raise_their_own_words_more_than_others_do(studied):
    report = features.clamping(*studied)
    assert report["own words"].low > 0 and report["own words"].value > report["own words, another clamped"].value
    assert report["raised more than by another"].value > 0.5


def test_frequent_words_are_better_told_than_rare_ones(studied):
    model, dictionary, held, tokens = studied
    report = features.complete(dictionary, held, tokens, features.words(model, features.KINDS))
    scores = list(report.of("F1").values())
    assert scores[-1] > scores[0] and report["have a latent, permuted"].value < 0.05
