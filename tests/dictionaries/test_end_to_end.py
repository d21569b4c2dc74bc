"""End-to-end training: its gradient is that through the model, and it loses less of the model than local training."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from mechscope import dictionaries
from mechscope.dictionaries import EndToEnd, TopK
from mechscope.models import TokenMask
from mechscope.models.contexts import contexts

SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def model():
    return ms.load("grammar")


@pytest.fixture(scope="module")
def ids(model):
    task = ms.tasks.ioi(model.tokenizer, n=128)
    rows = [row for row in contexts(model, [pair.clean for pair in task.pairs], 16) if len(row) == 16]
    return torch.tensor(rows)


def coder(model, **more) -> TopK:
    return TopK(model.d_model, 256, k=4, reads=SITE, **more)


def kl(model, ids, sae) -> float:
    clean = model.run(ids, save=SITE)
    x, keep = clean[SITE].clone(), TokenMask().of(model)(ids)
    with torch.no_grad():
        x[keep] = sae(x[keep]).output
    put = ms.unchanged(ms.set(x))
    wanted = clean.logits.log_softmax(-1)
    other = model.run(ids, edits={SITE: put}).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - other)).sum(-1)[keep].mean().item()


def test_the_gradient_is_the_one_through_the_model(model, ids):
    judged = EndToEnd(coder(model), model, later=0.5)
    judged.begin(*judged.parts(ids[:8]))
    found = judged.reconstruct(ids[:4])
    found.loss.backward()
    rows = judged.dictionary.W_dec
    # along a random direction of the decoder, by differences: which latents are active does not change
    along = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    along = along / along.norm()
    moved = []
    for step in (0.1, -0.2):
        with torch.no_grad():
            rows += step * along
        moved.append(judged.reconstruct(ids[:4]).loss.item())
    by_difference = (moved[0] - moved[1]) / 0.2
    assert rows.grad is not None
    assert (rows.grad * along).sum().item() == pytest.approx(by_difference, rel=0.05)


def test_it_loses_less_of_the_model_than_local_training(model, ids):
    steps = 60
    draw = torch.Generator().manual_seed(0)
    batches = [ids[torch.randint(len(ids), (16,), generator=draw)] for _ in range(steps)]
    judged = dictionaries.train(EndToEnd(coder(model), model), batches, steps=steps, lr=2e-3).dictionary
    local = [model.run(rows, save=SITE, stop_at=SITE)[SITE].flatten(0, 1) for rows in batches]
    alone = dictionaries.train(coder(model), local, steps=steps, lr=2e-3)
    held = ids[:32]
    assert kl(model, held, judged) < kl(model, held, alone) < kl(model, held, coder(model))


def test_it_is_kept_as_the_dictionary_that_it_holds(model, ids, tmp_path):
    judged = EndToEnd(coder(model), model, later=1.0)
    assert judged.downstream == ["blocks.2.resid_post", "blocks.3.resid_post"]
    dictionaries.train(judged, [ids[:4]] * 6, steps=6, out=tmp_path, every=2)
    opened = ms.open(tmp_path / "dictionary.safetensors")
    assert isinstance(opened, TopK) and torch.equal(opened.W_dec, judged.dictionary.W_dec)
    assert opened.facts["end_to_end"]["later"] == 1.0
    before = [p.clone() for p in model.hf.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters()))
    with pytest.raises(ms.errors.DictionaryError, match="needs one site"):
        EndToEnd(TopK(model.d_model, 8, k=2), model)
