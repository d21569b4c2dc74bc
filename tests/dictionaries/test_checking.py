"""A dictionary that is used wrongly is noticed, and the mistake is named: each is made here on purpose."""

from __future__ import annotations

import warnings

import pytest
import torch

import mechscope as ms
from architectures import ARCHITECTURES
from mechscope import dictionaries
from mechscope.dictionaries.files.checking import Check
from mechscope.dictionaries.transcoders import transcoder

D = 16


def exact(kind: str = "JumpReLU", d_out: int | None = None, **options) -> dictionaries.Coder:
    """This is a dictionary with an atom each way along every axis, which reconstructs anything above its threshold."""
    made = getattr(dictionaries, kind)(D, 2 * D, d_out, reads="blocks.3.resid_post", **options).eval()
    axes = torch.cat([torch.eye(D), -torch.eye(D)])
    with torch.no_grad():
        made.W_enc.copy_(axes)
        made.W_dec.copy_(axes)
    return made


def vectors(n: int = 400, active: int = 4) -> torch.Tensor:
    """This is vectors of mean norm near sqrt(d), a few coordinates of each not 0."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, D, generator=draw).sign() * (1 + torch.rand(n, D, generator=draw))
    kept = torch.rand(n, D, generator=draw).argsort(1) < active
    x = x * kept
    return x * (D**0.5 / x.norm(dim=1).mean())


def quietly(dictionary: dictionaries.Dictionary, batch: object) -> Check:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dictionaries.check(dictionary, batch, warn=False)


def test_a_good_dictionary_passes_in_silence():
    found = quietly(exact(threshold=0.5), vectors())
    assert found.plausible and found.fvu < 0.01 and found.l0 == pytest.approx(4, abs=0.1) and not found.tried
    assert "FVU 0.0" in str(found)


def test_a_scale_that_the_file_lacks_is_named_with_its_value():
    x = vectors() * 0.01
    with pytest.warns(UserWarning, match=r"hardly a latent.*multiplying inputs by 100.*scale=100"):
        found = dictionaries.check(exact(threshold=0.5), x)
    assert found.fix is not None and "sqrt(d)" in found.fix.what and found.fix.fvu < 0.01
    assert found.fix.what in str(found).split("\n")[-len(found.tried)]


def test_b_dec_on_the_input_or_off_it_is_named():
    middle = torch.linspace(-20, 20, D)
    for centred, said in ((False, "taking b_dec off the input"), (True, "leaving b_dec on the input")):
        sae = exact(threshold=0.5) if centred else exact(threshold=0.5, d_out=D)
        assert sae.centred is centred
        sae.b_dec.data.copy_(middle)
        if centred:  # made to read x itself: b_enc takes the middle off
            sae.b_enc.data.copy_(-(sae.W_enc @ middle))
        found = quietly(sae, vectors() + middle)
        assert found.fvu > 1 and found.fix is not None and found.fix.what == said and found.fix.fvu < 0.01


def test_transformer_lens_centring_is_named():
    x = vectors()
    x = x - x.mean(1, keepdim=True)
    sae = dictionaries.ReLU(D, 2 * D, reads="blocks.3.resid_post").eval()
    basis = torch.linalg.svd(x)[2][: D - 1]
    with torch.no_grad():
        atoms = torch.cat([basis, -basis, torch.zeros(2, D)])
        sae.W_enc.copy_(atoms)
        sae.W_dec.copy_(atoms)
    found = quietly(sae, x + 5 * torch.randn(len(x), 1))
    assert found.fvu > 0.5 and found.fix is not None and "TransformerLens" in found.fix.what and found.fix.fvu < 0.01


def test_a_norm_for_each_vector_is_named():
    """relu(4 x - 6) gives 2 back for 2 alone: it needs vectors of 4 coordinates of size 2, which have norm sqrt(d)."""
    sae, x = exact("ReLU"), vectors().sign() * 2
    sae.W_enc.data.mul_(4)
    sae.b_enc.data.fill_(-6)
    x = x * torch.logspace(-0.7, 0.7, len(x))[torch.randperm(len(x)), None]
    found = quietly(sae, x)
    assert found.fix is not None and "constant_norm_rescale" in found.fix.what and found.fix.fvu < 0.01
    assert quietly(dictionaries.Normed(sae, "constant_norm_rescale"), x).fvu < 0.01


def test_outliers_are_named():
    x = vectors()
    x[0] = 1000
    found = quietly(exact("TopK", k=4), x)
    assert found.fix is not None and "leaving out 1 vectors" in found.fix.what and found.fix.fvu < 0.01


def test_the_decoders_norm_twice_is_named():
    sae = exact("ReLU")
    sae.W_dec.data.mul_(3)
    found = quietly(sae, vectors())
    assert found.fvu > 1 and found.fix is not None and found.fix.what == "dividing the features by the decoder's norms"


def test_a_skip_connection_the_wrong_way_round_is_named():
    coder = transcoder("ReLU", D, 2 * D, D, skip=True, reads="blocks.3.ln2", writes="blocks.3.mlp_out")
    coder.eval()
    map_ = torch.randn(D, D)
    assert coder.W_skip is not None
    coder.W_skip.data.copy_(map_.T)
    coder.W_dec.data.zero_()
    x = vectors()
    found = quietly(coder, (x, x @ map_.T))
    assert found.fvu > 1 and found.fix is not None and "skip connection" in found.fix.what and found.fix.fvu < 0.01


def test_another_site_is_what_is_left():
    sae = dictionaries.TopK(D, 2 * D, k=4, reads="blocks.3.resid_post", seed=3).eval()
    sae.W_enc.data.mul_(10)
    with pytest.warns(UserWarning, match=r"none of the usual mistakes.*blocks.3.resid_post"):
        found = dictionaries.check(sae, vectors())
    assert not found.plausible and found.fix is None and len(found.tried) > 4


def test_an_l0_unlike_the_one_that_the_file_states_is_noticed():
    sae = exact(threshold=0.5)
    sae.facts["l0"] = 40
    found = quietly(sae, vectors())
    assert found.problems and "the file states 40" in found.problems[0]


def test_many_sites_at_once_are_measured():
    crosscoder = dictionaries.Crosscoder(2, D, 64, k=8)
    found = quietly(crosscoder, torch.randn(100, 2, D))
    assert found.rows == 100 and not found.tried


def test_heads_apart_are_put_side_by_side():
    x = vectors(40)
    z = x.view(5, 8, 4, 4).transpose(1, 2)  # [batch head pos d_head]
    assert quietly(exact(threshold=0.5), z).fvu == quietly(exact(threshold=0.5), x.view(5, 8, D)).fvu < 0.01


def test_the_first_position_is_tried_without():
    x = vectors(96).view(8, 12, D)
    x[:, 0] = 8
    found = quietly(exact("TopK", k=4), x)
    assert found.fix is not None and found.fix.what == "leaving out the first position (BOS)"


def test_a_batch_by_site_of_a_real_run(tmp_path):
    """From a model's activations, as they come by site, through another package's file."""
    model = ms.load(ARCHITECTURES["gpt2"].make())
    out = model.run([[1, 2, 3, 4, 5, 6, 7, 8]], save="blocks.*.resid_post")
    site = "blocks.1.resid_post"
    sae = dictionaries.TopK(model.d_model, 64, k=8, reads=site)
    dictionaries.train(sae, [out[site].flatten(0, 1)] * 200, steps=200)
    read = dictionaries.read(dictionaries.write(sae, tmp_path, layout="saelens"))
    assert isinstance(read, dictionaries.TopK)
    by_site = {name: out[name].flatten(0, 1) for name in ("blocks.0.resid_post", site)}
    right = quietly(read, by_site)
    assert right.fvu < 0.2 and right.plausible
    read.reads = read.writes = "blocks.0.resid_post"
    assert quietly(read, by_site).fvu > 2 * right.fvu
