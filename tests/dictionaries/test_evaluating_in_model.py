"""Loss recovered and the ratio of KLs, for dictionaries spliced into a tiny model whose errors were made to be so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mechscope as ms
from architectures import ARCHITECTURES
from mechscope.dictionaries import ReLU
from mechscope.dictionaries.evaluating import loss_recovered
from mechscope.dictionaries.evaluating.in_model import _turned
from mechscope.errors import DictionaryError
from mechscope.models import TokenMask

SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def model():
    return ms.load(ARCHITECTURES["gpt2"].make())


@pytest.fixture(scope="module")
def ids(model) -> Tensor:
    """Text by the model itself, so that it predicts it better than any damaged copy does."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (48, 1), generator=random)
    for _ in range(11):
        p = model.run(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=random)], 1)
    return ids


class Made(ReLU):
    """A dictionary that is exact (a latent for each direction and its opposite), with errors added by a function."""

    def __init__(
        self, d: int, error=lambda x: torch.zeros_like(x), reads: str | None = SITE, writes: str | None = None
    ):
        super().__init__(d, 2 * d, reads=reads, writes=writes)
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        with torch.no_grad():
            self.W_enc.copy_(both)
            self.W_dec.copy_(both)
        self.error = error

    def decode(self, features, x=None):
        plain = super().decode(features, x)
        return plain + self.error(plain)


def test_an_exact_dictionary_recovers_everything(model, ids):
    report = loss_recovered(model, ids, Made(model.d_model))
    for over in ("zero", "mean"):
        assert report[f"loss recovered, {over}"].value == pytest.approx(1, abs=1e-4)
    assert report["KL of the splice"].value < 1e-6 and report["KL ratio"].value == 1
    assert report["loss, clean"].value < report["loss, mean"].value


def test_zero_recovers_nothing_over_zero_and_the_mean_nothing_over_the_mean(model, ids):
    zero = loss_recovered(model, ids, Made(model.d_model, lambda x: -x))
    assert zero["loss recovered, zero"].value == pytest.approx(0, abs=1e-4)
    mean = model.run(ids, save=SITE)[SITE].flatten(0, 1).mean(0)
    report = loss_recovered(model, ids, Made(model.d_model, lambda x: mean - x))
    assert report["loss recovered, mean"].value == pytest.approx(0, abs=1e-3)
    assert report["KL of the splice"].value == pytest.approx(report["KL of the mean"].value, rel=1e-3)


def test_losses_and_divergences_are_those_of_the_runs(model, ids):
    report = loss_recovered(model, ids, Made(model.d_model, lambda x: -0.5 * x))
    clean = model.run(ids).logits.log_softmax(-1)
    halved = model.run(ids, edits={SITE: ms.scale(0.5)}).logits.log_softmax(-1)
    assert report["KL of the splice"].value == pytest.approx(
        float((clean.exp() * (clean - halved)).sum(-1).mean()), rel=1e-4
    )
    for name, logs in (("clean", clean), ("spliced", halved)):
        loss = torch.nn.functional.nll_loss(logs[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert report[f"loss, {name}"].value == pytest.approx(float(loss), rel=1e-4)


def test_errors_that_are_noise_have_a_ratio_of_one(model, ids):
    random = torch.Generator().manual_seed(1)

    def noise(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=random)
        return 0.3 * x.norm(dim=-1, keepdim=True) * drawn / drawn.norm(dim=-1, keepdim=True)

    report = loss_recovered(model, ids, Made(model.d_model, noise), draws=2)
    for name in ("KL ratio", "KL ratio, norms kept"):
        assert report[name].low < 1 < report[name].high and report[name].value == pytest.approx(1, abs=0.2)
    assert report["error"].value == pytest.approx(0.3, abs=1e-3)


def test_errors_where_the_model_is_sensitive_have_a_greater_ratio_and_hidden_ones_a_smaller(model, ids):
    unembed = model.hf.get_output_embeddings().weight.detach()
    _, _, axes = torch.linalg.svd(unembed - unembed.mean(0))
    hurtful = axes[0] - axes[0].mean()

    def along(direction: Tensor):
        return lambda x: 0.2 * x.norm(dim=-1, keepdim=True) * direction / direction.norm()

    assert loss_recovered(model, ids, Made(model.d_model, along(hurtful)))["KL ratio"].low > 1.2
    # LayerNorm takes the mean off, so that nothing reads the direction of ones.
    hidden = loss_recovered(model, ids, Made(model.d_model, along(torch.ones(model.d_model))))
    assert hidden["KL ratio"].high < 0.2 and hidden["loss recovered, mean"].value > 0.95


def test_shrinkage_is_excused_where_norms_are_kept(model, ids):
    report = loss_recovered(model, ids, Made(model.d_model, lambda x: -0.4 * x))
    assert report["KL ratio, norms kept"].value != report["KL ratio"].value
    assert report["KL of the splice"].value > 1e-4


def test_noise_with_norms_kept_is_as_far_turned_as_the_reconstruction():
    y, restored, noise = torch.randn(3, 5, 16)[..., None, :].unbind(0)
    restored = restored * y.norm(dim=-1, keepdim=True) / restored.norm(dim=-1, keepdim=True)
    turned = _turned(y, restored, noise)
    cosine = torch.nn.functional.cosine_similarity
    assert torch.allclose(turned.norm(dim=-1), y.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(cosine(turned, y, dim=-1), cosine(restored, y, dim=-1), atol=1e-5)
    assert not torch.allclose(turned, restored, atol=0.1)


def test_a_transcoder_is_spliced_where_it_writes(model, ids):
    mlp = model.hf.transformer.h[1].mlp

    class Copied(Made):
        def decode(self, features, x=None):
            return mlp(ReLU.decode(self, features))

    reads, writes = "blocks.1.ln2", "blocks.1.mlp_out"
    report = loss_recovered(model, ids, Copied(model.d_model, reads=reads, writes=writes))
    assert report["loss recovered, zero"].value == pytest.approx(1, abs=1e-3)
    wrong = loss_recovered(model, ids, Made(model.d_model, reads=reads, writes=writes))
    assert wrong["loss recovered, zero"].value < 0.5 and "ln2 -> " in wrong.question


def test_heads_lie_side_by_side(model, ids):
    report = loss_recovered(model, ids[:8], Made(model.d_model, reads="blocks.1.z"))
    assert report["loss recovered, zero"].value == pytest.approx(1, abs=1e-3)


def test_only_kept_tokens_are_replaced(model, ids):
    zero = Made(model.d_model, lambda x: -x)
    last = loss_recovered(model, ids[:8], zero, mask=TokenMask(first=11))
    assert last["loss, spliced"].value != last["loss, spliced"].value  # the last token predicts nothing here
    assert last["KL of the splice"].value > 0
    zero.facts["mask"] = TokenMask(first=11).to_json()
    assert loss_recovered(model, ids[:8], zero)["KL of the splice"].value == last["KL of the splice"].value
    assert "the first 11 of a row" in last.choices["replaced"]


def test_a_dictionary_without_a_site_is_refused(model, ids):
    with pytest.raises(DictionaryError, match="at='blocks"):
        loss_recovered(model, ids, Made(model.d_model, reads=None))
    assert loss_recovered(model, ids[:4], Made(model.d_model, reads=None), at=SITE)["KL ratio"].value == 1
    with pytest.raises(DictionaryError, match="longer than one token"):
        loss_recovered(model, ids[:, :1], Made(model.d_model))
