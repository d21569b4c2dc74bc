"""The laws of every architecture: files, sparse and dense arithmetic, gradients, odd batches; that each finds atoms."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mechscope as ms
from mechscope import dictionaries
from mechscope.dictionaries import ARCHITECTURES, Coder, Dictionary, Reconstruction, Sparse, train, transcoder
from mechscope.dictionaries.batch_topk import greatest
from mechscope.dictionaries.cross_layer import apart, beside
from mechscope.errors import DictionaryError
from mechscope.labs.sparse import PlantedMap, Sites, chance, matched_cosine, mean_max_cosine
from mechscope.labs.sparse import Sparse as Data
from mechscope.labs.sparse.recovery_table import AUTOENCODERS, REVIVED

OWN: dict[str, dict[str, Any]] = {
    "ReLU": dict(d_in=16, n_latents=48),
    "Gated": dict(d_in=16, n_latents=48),
    "TopK": dict(d_in=16, n_latents=48, k=4),
    "BatchTopK": dict(d_in=16, n_latents=48, k=4),
    "JumpReLU": dict(d_in=16, n_latents=48, threshold=0.3),
    "PAnnealing": dict(d_in=16, n_latents=48),
    "Matryoshka": dict(d_in=16, n_latents=48, k=4),
    "Crosscoder": dict(n_sites=2, d=16, n_latents=48, k=4),
    "CrossLayerTranscoder": dict(n_layers=3, d_in=16, per_layer=16, architecture="TopK", k=4),
}
MINE = tuple(name for name in ARCHITECTURES if name in OWN)
CODERS = tuple(name for name in MINE if name not in ("Crosscoder", "CrossLayerTranscoder"))
VARIANTS = [
    *((name, {}) for name in MINE),
    ("ReLU", {"tied": True}),
    ("TopK", {"d_out": 12, "skip": True}),
    ("JumpReLU", {"penalty": "step"}),
    ("JumpReLU", {"target": 4.0}),
    ("Crosscoder", {"l1": 2.0}),
    *(("CrossLayerTranscoder", {"architecture": name, "k": 4}) for name in ("BatchTopK", "Matryoshka")),
    ("CrossLayerTranscoder", {"skip": True, "d_out": 12}),
]


def made(name: str, **more: Any) -> Dictionary:
    """This is a dictionary a few steps into its training, so that no weight is at its start."""
    dictionary = getattr(dictionaries, name)(**(OWN[name] | more), seed=1)
    return train(dictionary, [batch(dictionary, seed) for seed in range(6)], steps=6, lr=1e-2)


def batch(dictionary: Dictionary, seed: int = 0, n: int = 40) -> Any:
    random = torch.Generator().manual_seed(seed)
    sites = getattr(dictionary, "n_sites", getattr(dictionary, "n_layers", None))
    between = () if sites is None else (sites,)
    width = getattr(dictionary, "d", dictionary.d_in)
    x = torch.randn(n, *between, width, generator=random) + 0.5
    if isinstance(dictionary, dictionaries.CrossLayerTranscoder) or not getattr(dictionary, "centred", True):
        return x, torch.randn(n, *between, dictionary.d_out, generator=random) + x.mean(-1, keepdim=True)
    return x


def called(dictionary: Dictionary, x: Tensor) -> Reconstruction:
    transcodes = dictionary.d_out != dictionary.d_in
    return dictionary(x, x[..., : dictionary.d_out] if transcodes else None)


def inputs(dictionary: Dictionary, **more: Any) -> Tensor:
    return dictionary.parts(batch(dictionary, **more))[0]


def active(dictionary: Any, x: Tensor) -> Sparse:
    return dictionary.active(x)


@pytest.mark.parametrize("name, more", VARIANTS)
def test_files_and_the_two_ways_to_encode(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    dictionary = made(name, **more)
    x = inputs(dictionary, seed=9)
    features = dictionary.encode(x)
    assert features.shape == (40, dictionary.n_latents) and (features >= 0).all() and features.count_nonzero() > 0
    torch.testing.assert_close(active(dictionary, x).dense(), features)
    written = dictionary.decode(active(dictionary, x), x)
    torch.testing.assert_close(written, dictionary.decode(features, x))
    torch.testing.assert_close(dictionary(*both(batch(dictionary, seed=9))).output, written)

    again = ms.open(dictionary.save(tmp_path / "dictionary.safetensors"))
    assert type(again) is type(dictionary) and again.options() == dictionary.options()
    assert torch.equal(again.encode(x), features) and torch.equal(
        again.decode(features, x), dictionary.decode(features, x)
    )
    torch.testing.assert_close(again.direction(5).norm(), torch.tensor(1.0))
    torch.testing.assert_close(again(*both(batch(dictionary))).loss, dictionary(*both(batch(dictionary))).loss)


def both(batch: Any) -> tuple[Tensor, Tensor | None]:
    return batch if isinstance(batch, tuple) else (batch, None)


@pytest.mark.parametrize("name, more", VARIANTS)
def test_odd_batches(name: str, more: dict[str, Any]) -> None:
    dictionary = made(name, **more)
    x = inputs(dictionary)
    for mode in (False, True):
        dictionary.train(mode)
        one, none = called(dictionary, x[:1]), called(dictionary, x[:0])
        assert one.output.shape[0] == 1 and one.output.isfinite().all()
        assert none.output.shape[0] == 0 and dictionary.encode(x[:0]).shape == (0, dictionary.n_latents)
        low = called(dictionary, x.bfloat16())
        assert low.output.dtype == torch.bfloat16 and low.output.isfinite().all()
    dictionary.eval()
    torch.testing.assert_close(
        called(dictionary, x[:1]).output, called(dictionary, x).output[:1]
    )  # no vector depends on another
    deep = x.reshape(4, 10, *x.shape[1:])
    torch.testing.assert_close(dictionary.encode(deep).flatten(0, 1), dictionary.encode(x))
    with pytest.raises(DictionaryError, match="reads"):
        dictionary.encode(torch.randn(3, 7, 5))


@pytest.mark.parametrize("name", [name for name in CODERS if getattr(dictionaries, name).sparse])
@pytest.mark.parametrize("options", [{}, {"d_out": 12, "skip": True}])
def test_sparse_gradients_are_the_dense_ones(name: str, options: dict[str, Any]) -> None:
    dictionary = made(name, aux=0.0, **options).double().train()
    assert isinstance(dictionary, Coder)
    x, target = both(batch(dictionary, seed=3))
    x = x.double().requires_grad_()
    found = dictionary(x, None if target is None else target.double())
    found.loss.backward()
    sparse = {key: p.grad for key, p in dictionary.named_parameters() if p.grad is not None} | {"x": x.grad}
    assert set(sparse) >= {"W_enc", "b_enc", "W_dec", "b_dec"}

    dictionary.zero_grad()
    x.grad = None
    inner = dictionary.inner(x)
    kept = found.features.dense().detach() > 0
    features = torch.where(kept, dictionary.pre(inner), 0)
    wanted = (x if target is None else target.double()) * dictionary.scale_out
    skipped = 0 if dictionary.W_skip is None else x * dictionary.scale_in @ dictionary.W_skip.T
    sizes = getattr(dictionary, "sizes", [dictionary.n_latents])
    loss = torch.zeros((), dtype=torch.double)
    for size in sizes:
        out = features[:, :size] @ dictionary.W_dec[:size] + dictionary.b_dec + skipped
        loss = loss + (wanted - out).square().sum(1).mean()
    torch.testing.assert_close(loss, found.loss)
    loss.backward()
    dense = {key: p.grad for key, p in dictionary.named_parameters() if p.grad is not None} | {"x": x.grad}
    for key, gradient in sparse.items():
        torch.testing.assert_close(gradient, dense[key], atol=1e-5, rtol=1e-5, msg=key)


def test_how_many_are_active() -> None:
    x = torch.randn(50, 16)
    topk = made("TopK")
    assert (topk.encode(x).count_nonzero(1) <= 4).all()
    assert (made("TopK", n_latents=480).encode(x).count_nonzero(1) == 4).all()
    batch = made("BatchTopK").train()
    assert batch.encode(x).count_nonzero() == 4 * 50
    kept = batch.encode(x)
    every = batch.pre(batch.inner(x)).relu()  # pyright: ignore[reportCallIssue]
    assert kept[kept > 0].min() >= every[kept == 0].max()


def test_idle_counts_the_examples_since_a_latent_fired() -> None:
    for name in MINE:
        dictionary = made(name)
        dictionary.idle.zero_()
        found = dictionary(inputs(dictionary))
        dictionary.count(found)
        fired = found.fired() > 0
        assert (dictionary.idle[fired] == 0).all() and (dictionary.idle[~fired] == 40).all(), name
        assert 0 < found.l0 <= dictionary.n_latents


@pytest.mark.parametrize("floor", [0.0, 0.5, 100.0])
def test_the_greatest_of_a_batch_are_exact_in_chunks(floor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = torch.randn(30, 8), torch.randn(40, 8), torch.randn(40)
    dense = x @ W.T + b
    for chunk in (2**25, 40 * 7, 1):
        monkeypatch.setattr("mechscope.dictionaries.sparse.CHUNK", chunk)
        for count in (0, 1, 100, 30 * 40):
            found = greatest(x, W, b, count, floor)
            least = dense.flatten().sort(descending=True).values[count - 1] if count else torch.tensor(float("inf"))
            wanted = torch.where((dense >= least) & (dense > 0), dense, 0)
            torch.testing.assert_close(found.dense(), wanted)


def test_the_threshold_keeps_as_many_as_training_did() -> None:
    data = Data(d=64, n_atoms=64, active=4, seed=3)
    sae = train(dictionaries.BatchTopK(64, 64, k=4), data.stream(256), steps=200)
    assert sae.threshold > 0 and not sae.training
    assert 3.5 < sae(data.batch(10_000, 2000).x).l0 < 4.5


def test_thresholds_get_the_derivative_of_the_expected_loss() -> None:
    """Equations 11 and 12 of arXiv:2407.14435, and their agreement with differences of the expectation."""
    z, theta, width = torch.rand(200_000, 1, dtype=torch.double) * 2, torch.tensor([0.8], dtype=torch.double), 0.2
    from mechscope.dictionaries.jump_relu import _Jump, _Step

    theta.requires_grad_()
    for jump, expected in ((_Step, -0.5), (_Jump, -0.8 * 0.5)):  # z has density 1/2
        (gradient,) = torch.autograd.grad(jump.apply(z, theta, width).mean(), theta)  # type: ignore[union-attr]
        torch.testing.assert_close(gradient, torch.tensor([expected], dtype=torch.double), atol=0.01, rtol=0)


def test_the_gate_does_not_move_the_decoder() -> None:
    sae = made("Gated").train()
    x = inputs(sae)
    losses = sae(x).losses
    gradients = torch.autograd.grad(losses["gate"], [sae.W_dec, sae.W_enc, sae.r_mag], allow_unused=True)  # pyright: ignore
    assert gradients[0] is None and gradients[1] is not None and gradients[2] is None
    pi = sae.pre(sae.inner(x)).relu()  # pyright: ignore[reportCallIssue]
    frozen = sae.decode(pi) * sae.scale_out  # pyright: ignore
    torch.testing.assert_close(losses["gate"], (x * sae.scale_out - frozen).square().sum(1).mean())  # pyright: ignore


def test_the_penalty_does_not_jump_when_p_falls() -> None:
    sae = dictionaries.PAnnealing(16, 48, start=0.0, falls=4, warmup=0.0).train()
    x = torch.randn(200, 16)
    sae.anneal(0.0)
    before = [sae(x).losses["sparsity"] for _ in range(10)]
    sae.anneal(0.26)
    assert int(sae.fallen) == 1 and float(sae.coefficient) != sae.l1
    torch.testing.assert_close(sae(x).losses["sparsity"], before[-1])
    assert sae.exponent(0) == 1.0 and sae.exponent(4) == pytest.approx(0.2)


def test_nested_prefixes_reconstruct_alone() -> None:
    sae = made("Matryoshka", sizes=[8, 20, 48]).train()
    x = inputs(sae)
    found = sae(x)
    features = found.features.dense()
    missed = [(x - sae.decode(features * (torch.arange(48) < size))) * sae.scale_out for size in (8, 20)]  # pyright: ignore
    torch.testing.assert_close(found.losses["nested"], sum(e.square().sum(1).mean() for e in missed))
    with pytest.raises(DictionaryError, match="rise"):
        dictionaries.Matryoshka(16, 48, sizes=[8, 20])


def test_features_side_by_side() -> None:
    parts = [Sparse(torch.rand(3) + 0.1, torch.tensor([0, 2, 1]), torch.tensor([0, 2, 2, 3]), 4) for _ in range(3)]
    joined = beside(parts)
    torch.testing.assert_close(joined.dense(), torch.cat([part.dense() for part in parts], 1))
    for part, again in zip(parts, apart(joined, 3)):
        torch.testing.assert_close(part.dense(), again.dense())


def test_a_cross_layer_transcoder_writes_only_what_comes_later() -> None:
    clt = made("CrossLayerTranscoder")
    assert isinstance(clt, dictionaries.CrossLayerTranscoder)
    features = torch.zeros(1, clt.n_latents)
    features[0, 16 + 3] = 2.0  # latent 3 of layer 1
    effect = (clt.decode(features) - clt.decode(features * 0)) * clt.scale_out
    assert not effect[0, 0].any()
    torch.testing.assert_close(effect[0, 1:], 2 * torch.stack([clt.decoder(1, 1)[3], clt.decoder(1, 2)[3]]))
    torch.testing.assert_close(clt.direction(16 + 3, target=2), effect[0, 2] / effect[0, 2].norm())
    with pytest.raises(DictionaryError, match="does not write"):
        clt.decoder(2, 1)


def test_errors_say_what_there_is() -> None:
    with pytest.raises(DictionaryError, match="TopK"):
        transcoder("TopkK", 16, 48, 16)
    with pytest.raises(DictionaryError, match="'tanh'"):
        dictionaries.JumpReLU(16, 48, penalty="tahn")
    with pytest.raises(DictionaryError, match="target="):
        dictionaries.JumpReLU(16, 48, penalty="target")
    with pytest.raises(DictionaryError, match="no site 2"):
        dictionaries.Crosscoder(2, 16, 48).direction(0, site=2)


DATA = Data(d=64, n_atoms=64, active=3, seed=5)


@cache
def trained(name: str) -> Coder:
    """This is an autoencoder of DATA in a third of the steps of `recovery_table` or fewer, at a higher rate."""
    steps = 600 if name in ("JumpReLU", "Gated") else 300
    return train(getattr(dictionaries, name)(64, 64, **AUTOENCODERS[name][1]), batches(), steps=steps, lr=6e-3)


@cache
def batches() -> list[Tensor]:
    return list(islice(DATA.stream(256), 600))


@pytest.mark.parametrize("name", CODERS)
def test_each_finds_the_atoms(name: str) -> None:
    sae = trained(name)
    found = sae.W_dec.detach()
    assert mean_max_cosine(found, DATA.atoms) > 0.9 and chance(found, DATA.atoms) < 0.5
    assert 2 < sae(DATA.batch(10_000, 2000).x).l0 < 6


def test_shrinkage_of_l1_and_not_of_the_gate() -> None:
    bias = {}
    for name in ("ReLU", "Gated", "JumpReLU"):
        x = DATA.batch(10_000, 2000).x
        out = trained(name)(x).output.detach()
        bias[name] = float(out.square().sum() / (out * x).sum())
    assert bias["ReLU"] < 0.9 < 0.95 < min(bias["Gated"], bias["JumpReLU"])


def test_crosscoders_tell_what_is_shared() -> None:
    data = Sites(Data(d=32, n_atoms=32, active=2, seed=2), n_sites=2, shared=0.5, aligned=True)
    stream = (seen.x for seen in data.batches(256))
    crosscoder = train(dictionaries.Crosscoder(2, 32, 32, **REVIVED | {"k": 2}), stream, steps=250, lr=8e-3)
    atoms = (data.atoms * data.present[..., None]).transpose(0, 1).flatten(1)
    match = matched_cosine(crosscoder.W_dec.detach(), atoms)
    assert match.mean > 0.9
    exclusive = crosscoder.exclusivity()[match.partner]
    shared, second = data.present.all(0), data.present[1] & ~data.present[0]
    assert (exclusive[shared] - 0.5).abs().mean() < 0.1 and exclusive[second].mean() > 0.85
    scaling = dictionaries.latent_scaling(crosscoder, [data.batch(10_000, 4000).x])
    nu = scaling.shrunk[match.partner]
    assert nu[shared].nanmean() > 0.8 and nu[second].nanmean().abs() < 0.3


def test_latent_scaling_flags_a_decoder_that_was_shrunk_away() -> None:
    data = Sites(Data(d=32, n_atoms=32, active=2, seed=2, orthogonal=True), n_sites=2, shared=1.0, aligned=True)
    crosscoder = dictionaries.Crosscoder(2, 32, 32, l1=1.0)
    with torch.no_grad():  # the truth, but for one latent, whose decoder at the first site is missing
        crosscoder.W_enc.copy_(data.atoms.transpose(0, 1).flatten(1) / 2)
        crosscoder.W_dec.copy_(data.atoms.transpose(0, 1).flatten(1))
        crosscoder.W_dec[7, :32] = 0
    assert crosscoder.exclusivity()[7] == 1.0
    scaling = dictionaries.latent_scaling(crosscoder, [data.batch(0, 4000).x])
    torch.testing.assert_close(scaling.shrunk, torch.ones(32), atol=1e-3, rtol=0)
    assert scaling.decoupled[7].abs() < 0.1 and (scaling.decoupled[:7] - 1).abs().max() < 1e-3


def test_transcoders_find_the_planted_map() -> None:
    source = Data(d=64, n_atoms=64, active=3, seed=1, orthogonal=True)
    planted = PlantedMap(source, n_units=64)
    pairs = ((seen.x, seen.y) for seen in planted.batches(256))
    found = train(transcoder("BatchTopK", 64, 64, 64, **REVIVED), pairs, steps=300, lr=8e-3)
    match = matched_cosine(found.W_dec.detach(), planted.writes)
    reads = torch.nn.functional.cosine_similarity(found.W_enc.detach()[match.partner], planted.reads @ source.atoms)
    assert match.mean > 0.9 and reads.mean() > 0.9


def test_reconstruction_of_sites_counts_vectors_once() -> None:
    found = Reconstruction(torch.zeros(5, 3, 8), torch.ones(5, 12))
    assert found.l0 == 12
