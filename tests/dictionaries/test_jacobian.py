"""Jacobian pairs: the Jacobian is autograd's; the planted map's directions are found; links become few."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from mechscope import dictionaries
from mechscope.labs import sparse

PLANTED = sparse.PlantedMap(sparse.Sparse(d=32, n_atoms=32, active=2, seed=0), n_units=32, d_out=32)
MLP = PLANTED.mlp().requires_grad_(False)


def trained(weight: float, steps: int = 250) -> dictionaries.JacobianPair:
    pair = dictionaries.JacobianPair(32, 32, k=2, function=MLP, weight=weight, links=16)
    return dictionaries.train(pair, (PLANTED.batch(i, 256)[:2] for i in range(steps)), steps=steps, lr=6e-3)


@pytest.fixture(scope="module")
def pair():
    return trained(1.0)


def test_the_jacobian_is_that_of_autograd(pair):
    x = PLANTED.batch(9, 3).x
    found, written, read = pair.jacobian(x)
    for row in range(3):
        values, latents = pair._active(pair.first, pair.first.inner(x[row : row + 1]))
        features = torch.zeros(32).index_put((latents[0],), values[0])

        def whole(s: torch.Tensor) -> torch.Tensor:
            inner = (s @ pair.first.W_dec + pair.first.b_dec) / pair.first.scale_in
            return pair.second.pre(pair.second.inner(MLP(inner)))

        wanted = torch.autograd.functional.jacobian(whole, features.detach())
        made = wanted[written[row]][:, read[row]]
        on = found[row].abs().sum(1) > 0
        assert torch.allclose(found[row][on], made[on], atol=1e-4)


def test_the_planted_directions_are_found(pair):
    atoms = PLANTED.source.atoms
    assert sparse.mean_max_cosine(pair.first.W_dec.detach(), atoms) > 0.9
    assert sparse.mean_max_cosine(pair.second.W_dec.detach(), PLANTED.writes) > 0.9
    untrained = dictionaries.JacobianPair(32, 32, k=2)
    assert sparse.mean_max_cosine(untrained.first.W_dec.detach(), atoms) < 0.7


def test_links_are_fewer_than_between_two_dictionaries_that_do_not_know_of_each_other():
    """Through an MLP with no structure, and more latents than atoms, where there is a choice of dictionaries."""
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(64, 32, generator=draw) / 5.6, torch.randn(32, 64, generator=draw) / 8
    data = sparse.Sparse(d=32, n_atoms=64, active=4, seed=0)

    def mlp(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ first.T) @ second.T

    def fitted(weight: float) -> tuple[float, float]:
        pair = dictionaries.JacobianPair(32, 128, k=6, function=mlp, weight=weight, links=32)
        batches = ((x, mlp(x)) for x in data.stream(128))
        dictionaries.train(pair, batches, steps=200, lr=5e-3)
        x = data.batch(999, 512)[0]
        links = (pair.jacobian(x)[0].abs() > 0.2).float().sum((1, 2)).mean().item()
        return links, (pair.first(x).fvu + pair.second(mlp(x)).fvu).item() / 2

    (links, missed), (links_alone, missed_alone) = fitted(10.0), fitted(0.0)
    assert links < 0.9 * links_alone
    assert 1 - missed > 0.95 * (1 - missed_alone)


def test_a_pair_is_saved_and_asks_for_what_it_needs(pair, tmp_path):
    opened = ms.open(pair.save(tmp_path / "pair.safetensors"))
    x = PLANTED.batch(3, 8).x
    assert torch.equal(opened.encode(x), pair.encode(x))
    with pytest.raises(ms.errors.DictionaryError, match="no function to differentiate"):
        opened.jacobian(x)
    with pytest.raises(ms.errors.DictionaryError, match="give both"):
        pair(x)
