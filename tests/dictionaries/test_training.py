"""The training loop: killed at random it ends as if it had not been; every checkpoint is a dictionary; bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mechscope as ms
from mechscope import dictionaries
from mechscope.dictionaries.training import figures
from mechscope.labs import sparse

DictionaryError = ms.errors.DictionaryError


@pytest.fixture(scope="module")
def data():
    return sparse.Sparse(d=16, n_atoms=32, active=2, seed=0)


def attempt(folder: Path, kills: int, seed: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder), str(kills), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**_environment(), "HOME": "/"})


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_at_twenty_random_moments_it_ends_as_if_it_had_not_been(tmp_path):
    attempt(tmp_path / "whole", 0, 0)
    killed = attempt(tmp_path / "killed", 20, 1)
    assert len(killed.stdout.splitlines()) == 20
    for name in "ab":
        one, other = (ms.store.read(tmp_path / run / name / "dictionary.safetensors") for run in ("whole", "killed"))
        assert one[0] == other[0]  # the header: the log, the recipe, the facts
        assert all(torch.equal(value, other[1][key]) for key, value in one[1].items())
    read = [
        {(line["dictionary"], line["step"]): line for line in map(json.loads, path.read_text().splitlines())}
        for path in (tmp_path / "whole" / "log.jsonl", tmp_path / "killed" / "log.jsonl")
    ]
    assert read[0] == read[1]


def test_a_checkpoint_is_a_dictionary_and_two_are_kept(tmp_path, data):
    seen = []

    def look(moment):
        seen.append(sorted(path.name for path in tmp_path.glob("*.safetensors")))
        if moment.step == 35:
            raise KeyboardInterrupt

    untrained = dictionaries.TopK(16, 32, k=2)
    with pytest.raises(KeyboardInterrupt):
        dictionaries.train(untrained, data.stream(128), steps=60, lr=1e-2, out=tmp_path, every=10, callbacks=[look])
    assert seen[-1] == ["step-000020.safetensors", "step-000030.safetensors"]
    half = ms.open(tmp_path / "step-000030.safetensors")
    x = data.batch(256, 7)[0] if hasattr(data, "batch") else next(iter(data.stream(256)))
    assert half.encode(x).count_nonzero(dim=1).max() <= 2
    # usable as it is: scaled, centred, and better than the mean
    assert (x - half(x).output).square().sum() < 0.7 * (x - x.mean(0)).square().sum()
    header = ms.store.header(tmp_path / "step-000030.safetensors")
    assert header["training"]["step"] == 30 and header["architecture"] == "TopK"


def test_a_damaged_checkpoint_is_passed_over_with_a_notice(tmp_path, data):
    whole = dictionaries.train(dictionaries.TopK(16, 32, k=2), data.stream(128), steps=40)

    def stop(moment):
        if moment.step == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dictionaries.train(
            dictionaries.TopK(16, 32, k=2), data.stream(128), steps=40, out=tmp_path, every=10, callbacks=[stop]
        )
    last = tmp_path / "step-000020.safetensors"
    bytes_ = bytearray(last.read_bytes())
    bytes_[-100] ^= 1
    last.write_bytes(bytes_)
    with pytest.warns(UserWarning, match="passed over.*step-000020.*damaged"):
        again = dictionaries.train(dictionaries.TopK(16, 32, k=2), data.stream(128), steps=40, out=tmp_path, every=10)
    assert torch.equal(again.W_dec, whole.W_dec) and torch.equal(again.b_enc, whole.b_enc)


def test_an_ended_run_is_opened_and_another_run_refused(tmp_path, data):
    options = dict(steps=20, out=tmp_path)
    first = dictionaries.train(dictionaries.TopK(16, 32, k=2), data.stream(128), **options)
    opened = dictionaries.train(dictionaries.TopK(16, 32, k=2), [], **options)
    assert torch.equal(first.W_enc, opened.W_enc) and opened.facts == first.facts
    with pytest.raises(DictionaryError, match="another run: k=2 where 3 was asked for"):
        dictionaries.train(dictionaries.TopK(16, 32, k=3), data.stream(128), **options)
    with pytest.raises(DictionaryError, match="architecture='TopK' where 'ReLU'"):
        dictionaries.train(dictionaries.ReLU(16, 32), data.stream(128), **options)


def test_what_cannot_be_trained_is_said(data):
    sae = dictionaries.TopK(16, 32, k=2)
    x = next(iter(data.stream(128)))
    with pytest.raises(DictionaryError, match="ended after 3 of 5 steps"):
        dictionaries.train(sae, [x] * 3, steps=5)
    with pytest.raises(DictionaryError, match="nothing to train on"):
        dictionaries.train(sae, [], steps=5)
    with pytest.raises(DictionaryError, match="no 'kk' to schedule; did you mean 'k'"):
        dictionaries.train(sae, [x] * 3, steps=3, schedules={"kk": lambda done: 2})
    with pytest.raises(DictionaryError, match=r"width 16.*12"):
        dictionaries.train(sae, [x[:, :12]] * 3, steps=3)
    with pytest.raises(DictionaryError, match=r"step 1 is nan; give a lower lr="):
        dictionaries.train(dictionaries.TopK(16, 32, k=2), [x * float("nan")] * 3, steps=3)
    on_a_site = dictionaries.TopK(16, 32, k=2, reads="blocks.3.resid_post")
    with pytest.raises(DictionaryError, match=r"no 'blocks.3.resid_post'; did you mean 'blocks.2.resid_post'\?"):
        dictionaries.train(on_a_site, [{"blocks.2.resid_post": x}] * 3, steps=3)


def test_dictionaries_that_share_batches_learn_what_each_alone_does(data):
    batches = [{"a": x, "b": 3 * x + 1} for x, _ in zip(data.stream(128), range(30))]
    first, second = dictionaries.TopK(16, 32, k=2, reads="a"), dictionaries.TopK(16, 32, k=2, reads="b")
    dictionaries.train([first, second], batches, steps=30)
    alone = dictionaries.train(dictionaries.TopK(16, 32, k=2), [batch["b"] for batch in batches], steps=30)
    assert torch.equal(second.W_dec, alone.W_dec)
    assert not torch.equal(first.W_dec, alone.W_dec)
    assert first.facts["training"]["log"][-1]["step"] == 30


def test_what_is_read_is_scaled_inside(data):
    """The same data in other units is the same training: scales are part of the dictionary, not of the data."""
    one, other = (
        dictionaries.train(dictionaries.TopK(16, 32, k=2), (size * x for x in data.stream(128)), steps=50)
        for size in (1.0, 64.0)
    )
    x = next(iter(data.stream(64)))
    assert torch.allclose(64 * one(x).output, other(64 * x).output, rtol=1e-3, atol=1e-2)
    assert torch.allclose(one.encode(x), other.encode(64 * x), rtol=1e-3, atol=1e-3)


def test_dead_latents_are_given_a_new_start(data):
    from mechscope.dictionaries.callbacks import resample

    def trained(*callbacks):
        sae = dictionaries.ReLU(16, 64, l1=1.0, seed=1)
        with torch.no_grad():
            sae.b_enc[:32] = -50.0  # half of the latents can never fire
        train = dictionaries.train(sae, data.stream(128), steps=200, callbacks=callbacks)
        return (train.idle <= 128 * 20).float().mean().item()

    assert trained() <= 0.5
    assert trained(resample(every=50, dead_after=128 * 20)) > 0.6


def test_the_auxiliary_loss_wakes_dead_latents(data):
    def living(aux: float) -> float:
        sae = dictionaries.TopK(16, 64, k=2, aux=aux, dead_after=500)
        with torch.no_grad():
            sae.b_enc[:32] = -5.0
        dictionaries.train(sae, data.stream(128), steps=300, lr=3e-3)
        return (sae.idle <= 128 * 20).float().mean().item()

    assert living(1.0) > living(0.0) + 0.1


def test_a_line_of_the_log(data):
    sae = dictionaries.TopK(16, 32, k=2)
    line = figures(sae, sae(next(iter(data.stream(128)))), 3)
    assert set(line) == {"step", "loss", "mse", "l0", "fvu", "dead"} and line["step"] == 3


@pytest.mark.parametrize("name", ["BatchTopK", "JumpReLU", "Gated", "PAnnealing", "Matryoshka", "Codebook"])
def test_every_architecture_goes_on_bit_for_bit(tmp_path, data, name):
    """What an architecture keeps beside its weights (thresholds, exponents, guesses) is in the checkpoint, or exact."""

    def fresh():
        return getattr(dictionaries, name)(16, 32, **({"k": 2} if "TopK" in name or name == "Matryoshka" else {}))

    def stop(moment):
        if moment.step == 15:
            raise KeyboardInterrupt

    whole = dictionaries.train(fresh(), data.stream(128), steps=25)
    with pytest.raises(KeyboardInterrupt):
        dictionaries.train(fresh(), data.stream(128), steps=25, out=tmp_path, every=10, callbacks=[stop])
    again = dictionaries.train(fresh(), data.stream(128), steps=25, out=tmp_path, every=10)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert whole.facts == again.facts
