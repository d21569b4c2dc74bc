"""Steering by a feature is steering by the direction that was planted; a vector is taken apart into what made it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mechscope as ms
from mechscope.dictionaries.steering_vectors import decompose, feature_change, steering_vector
from mechscope.labs.sparse import Sparse
from mechscope.labs.toy import ToyConfig, ToyTransformer

DictionaryError = ms.errors.DictionaryError
DATA = Sparse(d=32, n_atoms=40, active=2, seed=5)
SITE = "blocks.0.resid_post"


@pytest.fixture(scope="module")
def sae():
    torch.set_num_threads(1)
    made = ms.dictionaries.TopK(32, 80, k=2, reads=SITE, seed=7)
    return ms.dictionaries.train(made, DATA.stream(512), steps=600, lr=3e-3)


@pytest.fixture(scope="module")
def untrained():
    return ms.dictionaries.TopK(32, 80, k=2, reads=SITE, seed=7)


@pytest.fixture(scope="module")
def model():
    """This reads atoms: a token is a sum of a few, a neuron each adds to those above 0.3, a logit each reads them."""
    config = ToyConfig(
        vocab_size=1024, output_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=40, learned_positions=False,
    )  # fmt: skip
    hf = ToyTransformer(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1e-3)  # not 0: a block that writes nothing cannot be told apart
        hf.embed.weight.copy_(DATA.batch(10**6, 1024).x)
        mlp = hf.blocks[1].mlp
        for linear in (m for m in mlp.modules() if isinstance(m, torch.nn.Linear)):
            if linear.out_features == 40:
                linear.weight.copy_(DATA.atoms)
                if linear.bias is not None:
                    linear.bias.fill_(-0.3)
            else:
                linear.weight.copy_(DATA.atoms.T)
        hf.unembed.weight.copy_(DATA.atoms)
    return ms.load(hf)


def matched(dictionary) -> Tensor:
    """This is the latent whose row is nearest to each atom."""
    return (torch.nn.functional.normalize(dictionary.W_dec.detach(), dim=1) @ DATA.atoms.T).argmax(0)


def effects(model, directions: Tensor) -> Tensor:
    """This is how much adding 2 of each atom's direction raises that atom's logit."""
    ids = torch.randint(1024, (4, 6), generator=torch.Generator().manual_seed(0))
    plain = model.run(ids).logits
    raised = []
    for atom, direction in enumerate(directions):
        logits = model.run(ids, edits={SITE: ms.add(direction, scale=2.0)}).logits
        raised.append((logits - plain)[..., atom].mean())
    return torch.stack(raised)


def test_steering_by_a_feature_is_steering_by_the_true_direction(model, sae, untrained):
    true = effects(model, DATA.atoms)
    found = effects(model, torch.stack([sae.direction(int(latent)) for latent in matched(sae)]))
    assert true.min() > 2 and ((found - true).abs() / true).max() < 0.05
    control = effects(model, torch.stack([untrained.direction(int(latent)) for latent in matched(untrained)]))
    assert ((control - true).abs() / true).median() > 0.2, "an untrained dictionary steers as well"
    vectors = [steering_vector(sae, {int(latent): 1.0}) for latent in matched(sae)[:8]]
    for vector, latent in zip(vectors, matched(sae)):
        assert torch.nn.functional.cosine_similarity(vector, sae.direction(int(latent)), dim=0) > 0.9999


def test_a_vector_is_taken_apart_into_what_made_it(sae, untrained):
    """As a difference of two activations is, of both signs; an untrained dictionary explains as little as chance."""
    wanted = {5: 1.5, 20: -1.0, 31: 0.8}
    vector = sum(value * DATA.atoms[atom] for atom, value in wanted.items())
    latents = matched(sae)
    found = decompose(sae, vector, k=3)
    assert found.explained > 0.99 > 0.7 > found.chance and found.cosine > 0.99
    assert set(found.features()) == {int(latents[atom]) for atom in wanted}
    for atom, value in wanted.items():
        assert found.features()[int(latents[atom])] / float(sae.scale_out) == pytest.approx(value, rel=0.1)
    assert found.explained > decompose(untrained, vector, k=3).explained + 0.2
    assert torch.allclose(steering_vector(sae, found.features()), found.rebuilt, atol=1e-5)
    positive = decompose(sae, vector, k=3, signed=False)
    assert (positive.coefficients >= 0).all() and positive.explained < 0.9, "a negative share was explained without one"
    assert f"{int(latents[20])}" in str(found) and "explain" in str(found)


def test_encoding_a_vector_is_not_taking_it_apart(sae):
    """The reasons of arXiv:2411.08790: no negative share; and a vector without the mean is not an activation."""
    vector = 1.5 * DATA.atoms[5] - 1.0 * DATA.atoms[20]
    latents = matched(sae)
    naive = sae.encode(vector[None])[0]
    assert naive[latents[20]] == 0
    x = DATA.batch(7, 512)
    here = x.x[x.codes[:, 20] > 1.1]  # where there is something to take away
    moved = feature_change(sae, vector, here)
    assert moved[latents[5]] > 0.5 and moved[latents[20]] < -0.5
    rest = [i for i in range(80) if i not in (int(latents[5]), int(latents[20]))]
    assert moved[rest].abs().max() < 0.5 * min(moved[latents[5]], -moved[latents[20]])


def test_a_decomposition_is_kept(sae, tmp_path):
    found = decompose(sae, DATA.atoms[3], k=2)
    back = ms.open(found.save(tmp_path / "vector.safetensors"))
    assert back.features() == found.features() and str(back) == str(found)


def test_what_cannot_be_taken_apart_is_named(sae):
    for call, says in (
        (lambda: decompose(sae, torch.ones(8)), r"a vector of \(8,\)"),
        (lambda: decompose(sae, torch.zeros(32)), "zero everywhere"),
        (lambda: steering_vector(sae, {80: 1.0}), "no latent 80"),
    ):
        with pytest.raises(DictionaryError, match=says):
            call()
