"""Splices: with the error the identity, without it the reconstruction; clamps; transcoders; equal to attached sites."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mechscope as ms
from architectures import ARCHITECTURES

DictionaryError = ms.errors.DictionaryError
SITE = "blocks.1.resid_post"


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return ms.load(ARCHITECTURES["llama"].make())


ARCHITECTURE = {
    "TopK": {"k": 4},
    "ReLU": {},
    "BatchTopK": {"k": 4},
    "JumpReLU": {},
    "Gated": {},
    "PAnnealing": {},
    "Matryoshka": {"k": 4, "sizes": [16, 64]},
}


def made(name: str):
    return getattr(ms.dictionaries, name)(32, 64, reads=SITE, seed=1, **ARCHITECTURE[name]).eval()


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_with_its_error_a_splice_is_the_identity(model, ids, name):
    sae = made(name)
    plain = model.run(ids)
    out = model.run(ids, edits={SITE: ms.unchanged(sae.splice(error=True))})
    assert torch.equal(out.logits, plain.logits)
    with pytest.raises(ms.errors.EditError, match="changed nothing"):
        model.run(ids, edits={SITE: sae.splice()})
    kept = model.run(ids, edits={SITE: ms.unchanged(sae.splice(features={3: lambda f: f}))})
    assert torch.equal(kept.logits, plain.logits), "a clamp that changes no feature changes the run"


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_without_it_the_site_is_the_reconstruction(model, ids, name):
    sae = made(name)
    x = model.run(ids, save=SITE)[SITE]
    out = model.run(ids, save=SITE, edits={SITE: sae.splice(error=False)})
    assert torch.allclose(out[SITE], sae(x).output, atol=1e-5)
    last = model.run(ids, save=SITE, edits={f"{SITE}[pos=-1]": sae.splice(error=False)})[SITE]
    assert torch.allclose(last[:, -1], out[SITE][:, -1], atol=1e-5) and torch.equal(last[:, :-1], x[:, :-1])
    gone = model.run(ids, save=SITE, edits={SITE: sae.splice(error=False, features={3: 0.0})})
    assert torch.allclose(out[SITE] - gone[SITE], sae.encode(x)[..., 3:4] * sae.W_dec[3], atol=1e-5)


def test_clamps_are_the_edits_of_attached_features(model, ids):
    sae = made("TopK")
    clamped = model.run(ids, edits={SITE: sae.splice(features={3: 0.0, 5: lambda f: 2 * f + 1, -1: 4.0})})
    model.attach(SITE, sae)
    try:
        named = {3: ms.zero(), 5: lambda f: 2 * f + 1, -1: ms.set(4.0)}
        other = model.run(ids, edits={f"{SITE}/sae[{latent}]": edit for latent, edit in named.items()})
    finally:
        model.detach("sae")
    assert torch.allclose(clamped.logits, other.logits, atol=1e-5)
    with pytest.raises(DictionaryError, match="no latent 64 to clamp: this dictionary has 64"):
        sae.splice(features={64: 0.0})


def test_heads_are_taken_side_by_side(model, ids):
    shape = model.certificate.sites["blocks.1.z"]
    sae = ms.dictionaries.TopK(shape[1] * shape[3], 64, k=4, reads="blocks.1.z")
    z = model.run(ids, save="blocks.1.z")["blocks.1.z"]
    out = model.run(ids, save="blocks.1.z", edits={"blocks.1.z": sae.splice(error=False)})["blocks.1.z"]
    expected = sae(z.transpose(1, 2).flatten(2)).output
    assert torch.allclose(out.transpose(1, 2).flatten(2), expected, atol=1e-5)
    last = model.run(ids, save="blocks.1.z", edits={"blocks.1.z[pos=-1]": sae.splice(error=False)})["blocks.1.z"]
    assert torch.allclose(last[:, :, -1], out[:, :, -1], atol=1e-5)
    with pytest.raises(DictionaryError, match="not into heads"):
        model.run(ids, edits={"blocks.1.z[head=0]": sae.splice(error=False)})


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_spliced_where_it_writes(model, ids, skip):
    reads, writes = "blocks.1.ln2", "blocks.1.mlp_out"
    made = ms.dictionaries.TopK(32, 64, 32, k=4, skip=skip, reads=reads, writes=writes)
    if skip:
        torch.nn.init.normal_(made.W_skip)
    plain = model.run(ids, save=[reads, writes])
    edits = made.splices(error=False)
    assert list(edits) == [reads, writes]
    for _ in range(2):
        out = model.run(ids, save=[reads, writes], edits=edits)
        assert torch.allclose(out[writes], made.decode(made.encode(plain[reads]), plain[reads]), atol=1e-5)
    assert torch.equal(out[reads], plain[reads])
    same = {site: ms.unchanged(edit) for site, edit in made.splices().items()}
    assert torch.equal(model.run(ids, edits=same).logits, plain.logits)
    clamped = model.run(ids, save=writes, edits=made.splices(features={3: 2.0}))[writes]
    moved = (2.0 - made.encode(plain[reads])[..., 3:4]) * made.W_dec[3]
    assert torch.allclose(clamped - plain[writes], moved, atol=1e-5)
    with pytest.raises(DictionaryError, match=r"dictionary\.splices"):
        made.splice()
    with pytest.raises(DictionaryError, match="nothing was read"):
        model.run(ids, edits={writes: made.splices(error=False)[writes]})
    ragged = model.run([[5, 6, 7], [8, 9]], save=[reads, writes], edits=edits)
    read = ragged[reads][1, :2]
    expected = made.decode(made.encode(read), read)
    assert torch.allclose(ragged[writes][1, :2], expected, atol=1e-5), "rows of each length read their own"


def test_splices_need_to_know_their_sites():
    with pytest.raises(DictionaryError, match="reads None and writes None"):
        ms.dictionaries.TopK(32, 64, k=4).splices()
    assert list(ms.dictionaries.TopK(32, 64, k=4, reads=SITE).splices()) == [SITE]


def test_generation_is_spliced_at_every_step():
    from tasks.standin import word_tokenizer

    words = "the a cat dog bird saw heard ran home today and then it was quiet again very old house"
    model = ms.load(ARCHITECTURES["llama"].make(), word_tokenizer(words))
    made = ms.dictionaries.TopK(32, 64, 32, k=4, reads="blocks.1.ln2", writes="blocks.1.mlp_out")
    cached, plain = (
        model.generate(
            "the cat", max_new_tokens=4, save="blocks.1.mlp_out", edits=made.splices(error=False), use_cache=use
        )
        for use in (True, False)
    )
    assert cached.ids == plain.ids
    assert torch.allclose(cached["blocks.1.mlp_out"], plain["blocks.1.mlp_out"], atol=1e-4)
