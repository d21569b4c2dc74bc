"""Codebooks: planted codes are found, gradients pass straight through, a code can be forced."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import mechscope as ms
from mechscope import dictionaries
from mechscope.dictionaries.codebook import finetune
from mechscope.labs import sparse
from mechscope.labs.toy import ToyConfig, ToyTransformer

CODES = normalize(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)), dim=1)


def rows(step: int, n: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """This is vectors near one planted code each, in a size of 7, and which."""
    draw = torch.Generator().manual_seed(step)
    which = torch.randint(len(CODES), (n,), generator=draw)
    return 7 * (CODES[which] + 0.02 * torch.randn(n, 32, generator=draw)), which


@pytest.fixture(scope="module")
def trained():
    made = dictionaries.Codebook(32, 48, k=1, dead_after=2000)
    return dictionaries.train(made, (rows(step)[0] for step in range(300)), steps=300, lr=5e-3)


def test_planted_codes_are_found(trained):
    found = sparse.matched_cosine(trained.W_dec.detach(), CODES)
    assert found.recovered() > 0.95
    shuffled = trained.W_dec.detach().flatten()[torch.randperm(32 * 48, generator=torch.Generator().manual_seed(1))]
    assert sparse.matched_cosine(shuffled.view(48, 32), CODES).recovered() == 0.0


def test_a_code_says_which_planted_one_it_was(trained):
    x, which = rows(1000, 2000)
    codes = trained.active(x).latents
    together = torch.zeros(48, 48).index_put((codes, which), torch.ones(len(x)), accumulate=True)
    assert together.max(1).values.sum() / len(x) > 0.95  # precision
    assert (trained(x).output - x).norm() / x.norm() < 0.3


def test_gradients_pass_straight_through(trained):
    x = rows(5, 8)[0].requires_grad_()
    (trained.bottleneck(x) * torch.arange(32.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(32.0).expand(8, 32))
    assert torch.allclose(trained.bottleneck(x), trained(x).output, atol=1e-5)


def test_it_stands_in_a_model_and_a_code_can_be_forced():
    model = ms.load("grammar")
    site = "blocks.1.resid_post"
    x = model.run("Ben and John went to the store", save=site)[site]
    codes = dictionaries.Codebook(model.d_model, 8, k=2, reads=site)
    codes.begin(x[0], None)
    quantised = model.run("Ben and John went to the store", save=site, edits={site: codes.splice(error=False)})
    assert torch.allclose(quantised[site], codes(x).output, atol=1e-5)
    forced = codes.decode(torch.nn.functional.one_hot(torch.tensor(3), 8).float())
    out = model.run("Ben and John went to the store", save=site, edits={f"{site}[pos=-1]": ms.set(forced)})
    assert torch.allclose(out[site][0, -1], codes.W_dec[3] / codes.scale_in, atol=1e-5)


def test_a_codebook_cannot_write_elsewhere():
    with pytest.raises(ms.errors.DictionaryError, match="leave out writes="):
        dictionaries.Codebook(8, 16, reads="blocks.0.ln2", writes="blocks.0.mlp_out")
    with pytest.raises(ms.errors.DictionaryError, match="width 8"):
        dictionaries.Codebook(8, 16).active(torch.zeros(3, 9))


def test_codes_are_the_states_of_a_machine_and_forcing_one_steers_it():
    """A machine of 16 states, the last two symbols; the model is finetuned with 64 codes at its end."""
    torch.manual_seed(1)
    symbols, site = 4, "blocks.1.resid_post"
    following = torch.distributions.Dirichlet(torch.full((symbols,), 0.4)).sample((symbols**2,))  # pyright: ignore

    def rows(step: int, n: int = 64, length: int = 16) -> torch.Tensor:
        draw = torch.Generator().manual_seed(step)
        ids = list(torch.randint(symbols, (2, n), generator=draw))
        for _ in range(length - 2):
            ids.append(torch.multinomial(following[ids[-2] * symbols + ids[-1]], 1, generator=draw)[:, 0])
        return torch.stack(ids, 1)

    config = ToyConfig(
        vocab_size=symbols, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        norm="layer", max_position_embeddings=16,
    )  # fmt: skip
    model = ms.load(ToyTransformer(config))
    codes = dictionaries.Codebook(32, 64, k=1, dead_after=5000, reads=site)
    finetune(model, [], (rows(i) for i in range(700)), steps=700, lr=3e-3)
    before = finetune(model, [], [rows(5000)], steps=1, lr=0.0)[0]
    losses = finetune(model, [codes], (rows(1000 + i) for i in range(300)), steps=300, lr=3e-3)
    assert losses[-1] < before + 0.1  # the bottleneck costs little

    ids = rows(10**6, 200)
    states = (ids[:, :-1] * symbols + ids[:, 1:]).flatten()
    x = model.run(ids, save=site)[site][:, 1:].reshape(-1, 32)

    def precision(of: dictionaries.Codebook) -> tuple[float, torch.Tensor]:
        used = torch.zeros(64, symbols**2)
        used.index_put_((of.active(x).latents, states), torch.ones(len(x)), accumulate=True)
        return (used.amax(1).sum() / used.sum()).item(), used

    found, used = precision(codes)
    assert found > 0.9 > precision(dictionaries.Codebook(32, 64, k=1))[0]
    forced, free = [], []
    for state in range(symbols**2):
        code = codes.decode(torch.nn.functional.one_hot(used[:, state].argmax(), 64).float())
        for how, edits in ((forced, {f"{site}[pos=-1]": ms.set(code)}), (free, {})):
            said = model.run(ids[:20, :8], edits=edits).logits[:, -1].softmax(-1)
            how.append((said - following[state]).abs().sum(-1).mean().item() / 2)
    assert sum(forced) / 16 < 0.15 < 0.35 < sum(free) / 16  # distance from the forced state's next symbols
