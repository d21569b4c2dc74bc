"""Latents are found by what they fire on, and clamping one moves the logit that it was planted to move, no other."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from dictionaries import synthetic
from mechscope.dictionaries import BatchTopK
from mechscope.dictionaries.evaluating import clamp_effects, completeness, feature_search, neighbours_share
from mechscope.errors import DictionaryError
from mechscope.labs.sparse import Sparse
from mechscope.labs.toy import ToyConfig, ToyTransformer

SITE = "blocks.0.resid_post"
DATA = Sparse(d=32, n_atoms=24, active=2, orthogonal=True, seed=5)
IDS = torch.randint(512, (16, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    """This embeds sums of atoms and reads each by a logit of its own: an atom is the cause of its logit alone."""
    torch.set_num_threads(1)
    config = ToyConfig(
        vocab_size=512, output_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=32, learned_positions=False,
    )  # fmt: skip
    hf = ToyTransformer(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1e-3)  # not 0: a block that writes nothing cannot be told apart
        hf.embed.weight.copy_(DATA.batch(10**6, 512).x)
        hf.unembed.weight.copy_(DATA.atoms)
    return ms.load(hf)


@pytest.fixture(scope="module")
def sae():
    made = BatchTopK(32, 24, k=2, reads=SITE, seed=3, dead_after=1000, aux=1.0)
    return ms.dictionaries.train(made, DATA.stream(256), steps=400, lr=5e-3)


def latent_of(dictionary) -> list[int]:
    """This is the latent whose row is nearest to each atom."""
    return (torch.nn.functional.normalize(dictionary.W_dec.detach(), dim=1) @ DATA.atoms.T).argmax(0).tolist()


def test_ablating_a_causal_feature_moves_its_own_logit_and_no_other(model, sae):
    latents = latent_of(sae)
    assert len(set(latents)) == 24, "the dictionary did not find every atom"
    moved = clamp_effects(model, sae, IDS, dict.fromkeys(latents, 0.0), active=True)
    own = moved.diagonal()
    others = moved.masked_fill(torch.eye(24, dtype=torch.bool), 0.0).abs().amax(1)
    assert own.max() < -0.5 and (others < 0.1 * own.abs()).all()
    untrained = BatchTopK(32, 24, k=2, reads=SITE, seed=9)
    first, second = clamp_effects(model, untrained, IDS, dict.fromkeys(range(24), 0.0), True).abs().topk(2).values.T
    assert (second < 0.1 * first).float().mean() < 0.2, "any direction moves one logit"


def test_clamping_to_a_multiple_of_the_maximum_raises_the_logit_everywhere(model, sae):
    latents = latent_of(sae)[:6]
    found = sae.encode(model.run(IDS, save=SITE)[SITE]).detach()
    moved = clamp_effects(model, sae, IDS, {latent: 3 * float(found[..., latent].max()) for latent in latents})
    own = moved[torch.arange(6), torch.arange(6)]
    assert (moved.argmax(1) == torch.arange(6)).all() and own.min() > 1
    # The same as a site of its own, set by an edit.
    name = model.attach(SITE, sae)
    value = 3 * float(found[..., latents[0]].max())
    logits = model.run(IDS, edits={f"{name}[{latents[0]}]": ms.set(value)}).logits
    model.detach(name)
    assert torch.allclose((logits - model.run(IDS).logits).flatten(0, 1).mean(0), moved[0], atol=1e-4)


def test_a_search_finds_the_latent_of_the_tokens_that_share_an_atom(sae):
    x, codes = DATA.batch(7, 2000)
    for atom in range(4):
        on = codes[:, atom] > 0
        report = feature_search(sae, x[on], x[~on])
        assert int(report.tensors["order"][0]) == latent_of(sae)[atom]
        assert report["active here"].value > 0.9 and report["active elsewhere"].value < 0.1
    with pytest.raises(DictionaryError, match="against"):
        feature_search(sae, x, x[:0])


def test_neighbours_share_labels_where_directions_come_in_families():
    draw = torch.Generator().manual_seed(0)
    middle = torch.randn(8, 32, generator=draw).repeat_interleave(6, 0)
    rows = torch.nn.functional.normalize(middle + 0.5 * torch.randn(48, 32, generator=draw), dim=1)
    made, labels = synthetic.ByHand(rows, rows), torch.arange(8).repeat_interleave(6)
    report = neighbours_share(made, labels, k=3)
    assert report["share"].value > 0.9 and report["share, permuted"].value < 0.3
    some = torch.where(torch.arange(48) < 3, -1, labels)
    assert len(neighbours_share(made, some, k=3).tensors["latents"]) == 45
    with pytest.raises(DictionaryError, match="label more"):
        neighbours_share(made, torch.full((48,), -1))


def test_items_without_a_latent_are_counted_and_rare_ones_are_told_from_frequent_ones():
    rows = torch.eye(16)
    made = synthetic.ByHand(rows[8:], rows[8:])  # a latent for the eight most frequent of sixteen items
    items = torch.arange(16).repeat_interleave(10 * torch.arange(1, 17))
    report = completeness(made, rows[items], items, parts=2)
    assert report["have a latent"].value == 0.5 and report["have a latent, permuted"].value < 0.2
    rare, frequent = (report["have a latent", of].value for of in ("10 to 80 times", "90 to 160 times"))
    assert rare == 0 and frequent == 1
