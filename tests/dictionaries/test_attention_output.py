"""Attention-output dictionaries: contributions add up to the pre-activation; induction features are the head's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mechscope as ms
from architectures import ARCHITECTURES
from mechscope.dictionaries.attention_output import below, by_head, by_source, weights_by_head

DictionaryError = ms.errors.DictionaryError


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))


def on_z(model, layer: int = 1, seed: int = 3):
    """This is a dictionary on a block's heads, with every constant that a pre-activation may have."""
    _, heads, _, d_head = model.certificate.sites[f"blocks.{layer}.z"]
    made = ms.dictionaries.TopK(heads * d_head, 64, k=4, reads=f"blocks.{layer}.z", seed=seed)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.b_enc.copy_(torch.randn(64, generator=draw))
        made.b_dec.copy_(torch.randn(made.d_in, generator=draw))
        made.scale_in.fill_(3.0)
        made.scale_out.fill_(3.0)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "bloom", "mixtral", "qwen3"])
def test_heads_sources_and_parts_add_up(name, ids):
    model = ms.load(ARCHITECTURES[name].make())
    sae = on_z(model)
    out = model.run(ids, save=["blocks.1.z", "blocks.1.v", "blocks.1.pattern"])
    z = out["blocks.1.z"].transpose(1, 2).flatten(2)
    pre = sae.pre(sae.inner(z.reshape(-1, sae.d_in))).view(2, 7, 64).detach()
    for latent in (0, 17, -1):
        heads, sources = by_head(sae, out, latent), by_source(sae, out, latent)
        size = pre[..., latent].abs().max()
        assert torch.allclose(heads.pre, pre[..., latent], atol=1e-4 * size)
        assert (heads.values.sum(1) + heads.constant - heads.pre).abs().max() <= 1e-4 * size
        assert (sources.values.sum(-1) - heads.values).abs().max() <= 1e-4 * size
        assert heads.share(torch.ones(2, 7, dtype=torch.bool)).sum() == pytest.approx(1.0, abs=1e-4)
        for pos in (-1, 3):
            found = below(sae, model, ids, latent, pos)
            assert (found.values.sum(1) - sources.values[:, :, pos]).abs().max() <= 1e-3 * size
            assert found.values[..., 4:].abs().max() == 0 if pos == 3 else True, "a later position was read"
    assert found.parts[0] == "embed" and "blocks.0.mlp_out" in found.parts and found.parts[-1] == "biases"
    assert len(found.top(3)) == 3 and found.top(1)[0][0] in found.parts


def test_ablating_a_head_takes_its_contribution_away(ids):
    model = ms.load(ARCHITECTURES["llama"].make())
    sae = on_z(model)
    before = by_head(sae, model.run(ids, save="blocks.1.z"), 5)
    after = by_head(sae, model.run(ids, save="blocks.1.z", edits={"blocks.1.z[head=2]": ms.zero()}), 5)
    assert torch.allclose(before.pre - after.pre, before.values[:, 2], atol=1e-4)


def test_parts_are_what_their_ablation_takes_away(ids):
    """With no norm and held patterns, removing a part from what attention reads removes its terms exactly."""
    from mechscope.labs.toy import ToyConfig, ToyTransformer

    torch.manual_seed(0)
    config = ToyConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    model = ms.load(ToyTransformer(config).eval())
    sae = on_z(model)
    out = model.run(ids, save=["blocks.1.z", "blocks.1.v", "blocks.1.pattern", "blocks.0.head_out"])
    found = below(sae, model, ids, latent=5)
    part = found.parts.index("blocks.0.head_out[head=1]")
    without = {"blocks.1.ln1": lambda x: x - out["blocks.0.head_out"][:, 1], "blocks.1.pattern": ms.patch(out)}
    edits = {site: ms.unchanged(edit) for site, edit in without.items()}
    moved = by_head(sae, out, 5).pre - by_head(sae, model.run(ids, save="blocks.1.z", edits=edits), 5).pre
    assert torch.allclose(found.values[:, part].sum((1, 2)), moved[:, -1], atol=1e-4)


def test_what_cannot_be_attributed_is_named(ids):
    model = ms.load(ARCHITECTURES["llama"].make())
    out = model.run(ids, save=["blocks.1.z", "blocks.1.resid_post"])
    for call, says in (
        (lambda: by_head(ms.dictionaries.TopK(32, 64, reads="blocks.1.resid_post"), out, 0), "heads side by side"),
        (lambda: by_head(on_z(model), out, 64), "no latent 64"),
        (lambda: by_head(ms.dictionaries.TopK(64, 64, reads="blocks.1.z"), out, 0), "reads vectors of 64"),
        (lambda: by_head(on_z(model), out, 0).share(torch.zeros(2, 7, dtype=torch.bool)), "at no position"),
    ):
        with pytest.raises(DictionaryError, match=says):
            call()
    with pytest.raises(ms.errors.SiteError, match="was not saved"):
        by_source(on_z(model), out, 0)


# ------------------------------------------------------------------------------------------------ F-IND


def rows_of(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """This is rows in which a random piece comes back, and where it does [row pos]."""
    from mechscope.labs.induction.lab import recipe
    from mechscope.labs.induction.sequences import tiled

    r = recipe()
    draw = torch.Generator().manual_seed(seed)
    ids, start, length = tiled(n, r.total, r.vocab, (r.shortest, r.longest), r.filler, draw)
    return ids, torch.arange(r.total) - start[:, None] >= length[:, None]


def induction_shares(model, layer: int) -> tuple[Tensor, Tensor, list]:
    """This trains a dictionary on a block's heads and attributes its twenty most inductive latents.

    Returns what of each comes from head 0 [latent], and what from head 0 at tokens after an earlier copy of the current
    one [latent], over the repeated positions where it is active; and (dictionary, run, latents, ids, again).
    """
    site = f"blocks.{layer}.z"
    z = model.run(rows_of(800, 1)[0], save=site)[site]
    x = z.transpose(1, 2).flatten(2).flatten(0, 1)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(9))]
    sae = ms.dictionaries.TopK(x.shape[1], 128, k=4, reads=site, seed=7)
    ms.dictionaries.train(sae, [*x.split(512)][:-1] * 4, steps=250, lr=3e-3)
    ids, again = rows_of(96, 2)
    out = model.run(ids, save=[site, f"blocks.{layer}.v", f"blocks.{layer}.pattern"])
    features = sae.encode(out[site].transpose(1, 2).flatten(2)).detach()
    latents = (features[again].mean(0) - features[~again].mean(0)).topk(20).indices.tolist()
    place = torch.arange(ids.shape[1])
    after = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool)  # [row query key]: the token before key is query's
    after[:, :, 1:] = (ids[:, :, None] == ids[:, None, :-1]) & (place[1:] <= place[:, None])
    heads, sources = [], []
    for latent in latents:
        at = (features[..., latent] > 0) & again
        heads.append(by_head(sae, out, latent).share(at)[0])
        values = by_source(sae, out, latent).values
        total = values.sum((1, 3))[at].sum()
        sources.append((values[:, 0] * after).sum(-1)[at].sum() / total)
    return torch.stack(heads), torch.stack(sources), [sae, out, latents, ids, again]


def test_induction_features_are_the_induction_heads():
    """Kissane et al. 2024, section 3: "token is next by induction"; head 1.0 is the induction head of this model.

    Head 0 is the greatest of every layer here, trained or not, so what tells is where it reads: after an earlier copy.
    """
    from mechscope.labs.induction.lab import untrained

    torch.set_num_threads(1)
    model = ms.load("induction")
    heads, sources, (sae, out, latents, ids, again) = induction_shares(model, 1)
    assert heads.min() > 0.8 and sources.min() > 0.8, (heads, sources)
    assert weights_by_head(sae, 4)[latents].mean(0).argmax() == 0
    for control, layer in ((untrained(), 1), (ms.load("induction-1l"), 0)):
        _, elsewhere, _ = induction_shares(control, layer)
        assert elsewhere.abs().max() < 0.3, elsewhere

    # One step down: what the head copies is the token that it finds, which is the embedding, not what layer 0 wrote.
    active = by_head(sae, out, latents[0]).pre.masked_fill(~again, float("-inf"))
    row, pos = divmod(int(active.argmax()), ids.shape[1])
    found = below(sae, model, ids[row : row + 1], latents[0], pos)
    part, head, key, value = found.top(1)[0]
    assert (part, head) == ("embed", 0) and ids[row, key - 1] == ids[row, pos] and value > 0
    assert found.values[0, 0].sum() > 0.6 * found.values[0].sum()
