"""Attached dictionaries: features and error are sites, a run without an edit is the model's own, nothing stays."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import mechscope as ms
from architectures import ARCHITECTURES

SiteError, DictionaryError, EditError = ms.errors.SiteError, ms.errors.DictionaryError, ms.errors.EditError
SITE = "blocks.1.resid_post"


class Stub(nn.Module):
    """This is the least that can be attached: a ReLU layer and its transpose, which reconstruct nothing well."""

    def __init__(self, d_in: int, n: int, d_out: int | None = None, seed: int = 0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.W = nn.Parameter(torch.randn(n, d_in, generator=draw) / d_in**0.5)
        self.V = nn.Parameter(torch.randn(n, d_out or d_in, generator=draw) / n**0.5)

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.W.T - 0.1).relu()

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.V + 0.1


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.set_num_threads(1)
    return ms.load(ARCHITECTURES["llama"].make())


def metric(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1)[..., 3].log().mean()


# ------------------------------------------------------------------------------------------------ names


def test_features_are_sites_with_selections(model, ids):
    sae = Stub(32, 40)
    assert model.attach(SITE, sae) == f"{SITE}/sae"
    out = model.run(ids, save=[SITE, f"{SITE}/sae", f"{SITE}/sae/error"])
    x, features, error = out[SITE], out[f"{SITE}/sae"], out[f"{SITE}/sae/error"]
    assert torch.equal(features, sae.encode(x)) and not features.requires_grad
    assert torch.allclose(sae.decode(features) + error, x, atol=1e-5)
    expected = {
        "[12]": features[..., 12],
        "[-1]": features[..., -1],
        "[3|7|12]": features[..., [3, 7, 12]],
        "[0:10]": features[..., :10],
        "[12,pos=-1]": features[:, -1, 12],
        "[3|7,pos=0|2|5]": features[:, [0, 2, 5]][..., [3, 7]],
        "[3|7,pos=2]": features[:, 2, [3, 7]],
        "[5,pos=1|4]": features[:, [1, 4], 5],
        "[0:4,pos=1:]": features[:, 1:, :4],
        "[pos=-1]": features[:, -1],
    }
    names = {f"{SITE}/sae{part}": value for part, value in expected.items()}
    names[f"{SITE}/sae/error[pos=-1]"] = error[:, -1]
    saved = model.run(ids, save=list(names))
    for name, value in names.items():
        assert torch.equal(saved[name], value), f"saved {name}"
        assert torch.equal(out[name], value), f"read {name} from the whole"
    assert model.run(ids, save="blocks.1.hook_resid_post/sae").keys() == [f"{SITE}/sae"]


def test_listed_after_what_they_are_of_and_wildcards_need_the_slash(model, ids):
    plain = list(model.sites())
    for layer in (0, 1):
        model.attach(f"blocks.{layer}.resid_post", Stub(32, 40, seed=layer))
    listed = list(model.sites())
    at = listed.index(SITE)
    assert listed[at + 1 : at + 3] == [f"{SITE}/sae", f"{SITE}/sae/error"]
    assert [s for s in listed if "/" not in s] == plain
    assert model.sites()[f"{SITE}/sae"].axes == ("batch", "pos", "latent")
    assert [r.site for r in model.resolve("blocks.1.*")] == [s for s in plain if s.startswith("blocks.1.")]
    both = [f"blocks.{layer}.resid_post/sae" for layer in (0, 1)]
    assert [r.site for r in model.resolve("blocks.*.resid_post/sae")] == both
    assert [r.site for r in model.resolve("*.resid_post/sae")] == both
    assert model.run(ids, save="blocks.*.resid_post/sae[3]")["blocks.*.resid_post/sae[3]"].shape == (2, 3, 7)
    assert list(model.provenance()["dictionaries"]) == both
    model.detach("sae")
    assert list(model.sites()) == plain and "dictionaries" not in model.provenance()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{SITE}/sae[40]", "selects latent 40, but 'blocks.1.resid_post/sae' has latents 0 to 39"),
        (f"{SITE}/sae[3|99]", "latent 99"),
        (f"{SITE}/sae[50:60]", "selects nothing"),
        (f"{SITE}/sea", "did you mean 'blocks.1.resid_post/sae'"),
        ("blocks.0.resid_post/sae", "no dictionary is attached at 'blocks.0.resid_post'"),
        ("blocks.1.resid_psot/sae", "did you mean 'blocks.1.resid_post/sae'"),
        (f"{SITE}/sae[pos=1,3]", "type 'blocks.1.resid_post/sae[3,pos=1]'"),
        (f"{SITE}/sae[latent=3]", "cannot select by 'latent'"),
        (f"{SITE}/sae[head=1]", "has no heads"),
        (f"{SITE}/sae/error[3]", "has none: its axes are batch pos d_out"),
        (f"{SITE}[3]", "select by head and pos"),
        (f"{SITE}/sae[pos=99]", "pos 0 to 6"),
    ],
)
def test_a_wrong_name_is_answered_with_what_to_type(model, ids, name, says):
    model.attach(SITE, Stub(32, 40))
    with pytest.raises(SiteError, match=re.escape(says)):
        model.run(ids, save=name)


def test_what_cannot_be_attached_is_named(model):
    model.attach(SITE, Stub(32, 40))
    for call, error, says in (
        (lambda: model.attach(SITE, Stub(32, 8)), DictionaryError, "attached already.*model.detach"),
        (lambda: model.attach(SITE, Stub(16, 8), name="b"), DictionaryError, "'blocks.1.resid_post' has vectors of 32"),
        (lambda: model.attach(SITE, Stub(32, 8, 16), name="b"), DictionaryError, "decodes to vectors of 16"),
        (lambda: model.attach(SITE, nn.Linear(32, 8), name="b"), DictionaryError, "has no encode"),
        (lambda: model.attach(SITE, Stub(32, 8), name="a b"), DictionaryError, "cannot name features"),
        (lambda: model.attach(SITE, Stub(32, 8), name="b", writes="blocks.0.mlp_out"), DictionaryError, "comes before"),
        (lambda: model.attach("blocks.*.resid_post", Stub(32, 8)), SiteError, "one whole site"),
        (lambda: model.attach(f"{SITE}/sae", Stub(40, 8)), SiteError, "one whole site"),
        (lambda: model.attach("blocks.1.pattern", Stub(7, 8)), SiteError, "one vector at each position"),
        (lambda: model.attach("blocks.1.resid_psot", Stub(32, 8)), SiteError, "did you mean"),
        (lambda: model.detach("sea"), SiteError, "attached are 'blocks.1.resid_post/sae'"),
    ):
        with pytest.raises(error, match=says):
            call()
    assert list(model.anatomy.attached) == [f"{SITE}/sae"]


# ------------------------------------------------------------------------------------------------ runs and edits


SITES = ["resid_pre", "ln1", "z", "head_out", "attn_out", "resid_mid", "ln2", "mlp_post", "mlp_out", "resid_post", "k"]


@pytest.mark.parametrize("short", SITES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_everywhere_reading_changes_nothing_and_edits_are_decode_plus_error(name, short, ids):
    """At every kind of place: reading and differentiating change no bit; zeroed features leave decode(0) + error."""
    model = ms.load(ARCHITECTURES[name].make())
    site = f"blocks.1.{short}"
    shape = model.certificate.sites[site]
    d = shape[-1] * (shape[1] if len(shape) == 4 else 1)
    sae = Stub(d, 24)
    features = model.attach(site, sae)
    plain = model.run(ids, save=site)
    both = [features, f"{features}/error", site]
    assert torch.equal(model.run(ids, save=both).logits, plain.logits)
    assert torch.equal(model.run(ids, save=both, grad=metric).logits, plain.logits)
    same = model.run(ids, edits={features: ms.unchanged(lambda f: f.clone())})
    assert torch.equal(same.logits, plain.logits), "an edit that changes no feature changes the run"
    edited = model.run(ids, save=both, edits={features: ms.scale(0.5)})

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2) if x.dim() == 4 else x

    x = flat(plain[site])
    f = sae.encode(x)
    assert torch.allclose(edited[features], f / 2)
    expected = sae.decode(f / 2) + x - sae.decode(f)
    assert torch.allclose(flat(edited[site]), expected, atol=1e-5 * expected.abs().max().item())
    by_hand = model.run(ids, edits={site: edited[site]})
    assert torch.allclose(edited.logits, by_hand.logits, atol=1e-5) and not torch.equal(edited.logits, plain.logits)
    gone = model.run(ids, save=site, edits={f"{features}/error": ms.zero()})
    assert torch.allclose(flat(gone[site]), sae.decode(f), atol=1e-5 * f.abs().max().item())


def test_clamping_one_latent_at_one_position_moves_that_alone(model, ids):
    sae = Stub(32, 40)
    model.attach(SITE, sae)
    plain = model.run(ids, save=[SITE, f"{SITE}/sae"])
    edit = {f"{SITE}/sae[12,pos=3]": ms.set(5.0)}
    out = model.run(ids, save=[SITE, f"{SITE}/sae"], edits=edit)
    moved = out[SITE] - plain[SITE]
    expected = (5.0 - plain[f"{SITE}/sae"][:, 3, 12])[:, None] * sae.V[12]
    assert torch.allclose(moved[:, 3], expected, atol=1e-4)
    assert moved[:, [0, 1, 2, 4, 5, 6]].abs().max() == 0
    assert out.receipts[-1].changed == 3 and (out[f"{SITE}/sae"][:, 3, 12] == 5).all()
    again = model.run(ids, edits=ms.edits.from_json(ms.edits.to_json(edit)))
    assert torch.equal(again.logits, out.logits), "edits of features are written down and made again"
    with pytest.raises(EditError, match="changed nothing"):
        model.run(ids, edits={f"{SITE}/sae": ms.scale(1.0)})
    other = model.run(ids.flip(0), save=f"{SITE}/sae")
    patched = model.run(ids, save=f"{SITE}/sae", edits={f"{SITE}/sae": ms.patch(other)})
    assert torch.equal(patched[f"{SITE}/sae"], other[f"{SITE}/sae"])


def test_gradients_are_the_decoder_times_the_sites_own_and_spare_the_rest(model, ids):
    sae = Stub(32, 40)
    model.attach(SITE, sae)
    sites = ["blocks.0.resid_post", "blocks.1.attn_out", SITE, f"{SITE}/sae", f"{SITE}/sae/error", "blocks.2.z"]
    plain = {site: model.run(ids, save=site, grad=metric).grad[site] for site in sites}
    assert torch.allclose(plain[f"{SITE}/sae"], plain[SITE] @ sae.V.T, atol=1e-6)
    assert torch.allclose(plain[f"{SITE}/sae/error"], plain[SITE], atol=1e-7)
    together = model.run(ids, save=sites, grad=metric)
    for site in sites:
        assert torch.allclose(together.grad[site], plain[site], atol=1e-7, rtol=1e-4), site
    assert all(p.grad is None and p.requires_grad for p in sae.parameters())
    assert torch.equal(together.grad[f"{SITE}/sae[12,pos=-1]"], together.grad[f"{SITE}/sae"][:, -1, 12])


def test_gradients_of_an_edited_run_are_finite_differences(ids):
    model = ms.load(ARCHITECTURES["llama"].make().double())
    sae = Stub(32, 40).double()
    model.attach(SITE, sae)
    edits = {f"{SITE}/sae[0:20]": ms.scale(1.5)}
    sites = ["blocks.0.resid_post", f"{SITE}/sae"]
    out = model.run(ids, save=sites, edits=edits, grad=metric)
    step = torch.randn(out[sites[0]].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(h: float) -> float:
        return float(metric(model.run(ids, edits={sites[0]: lambda x: x + h * step, **edits}).logits))

    slope = (at(1e-3) - at(-1e-3)) / 2e-3  # norms are computed in float32, so a smaller step would drown
    assert float((out.grad[sites[0]] * step).sum()) == pytest.approx(slope, rel=1e-3)

    def nudged(h: float) -> float:
        # the nudge comes after the scaling, which it is not part of: the gradient is at what the network saw
        return float(metric(model.run(ids, edits={**edits, f"{SITE}/sae[12,pos=-1]": lambda x: x + h}).logits))

    slope = (nudged(1e-2) - nudged(-1e-2)) / 2e-2
    assert float(out.grad[f"{SITE}/sae[12,pos=-1]"].sum()) == pytest.approx(slope, rel=1e-3)


def test_two_dictionaries_at_one_site_follow_each_other(model, ids):
    first, second = Stub(32, 40), Stub(32, 24, seed=1)
    model.attach(SITE, first, name="a")
    model.attach(SITE, second, name="b")
    edits = {f"{SITE}/a[3]": ms.set(2.0), f"{SITE}/b[5]": ms.set(1.0)}
    out = model.run(ids, save=[SITE, f"{SITE}/b"], edits=edits)
    after_first = model.run(ids, save=SITE, edits={f"{SITE}/a[3]": ms.set(2.0)})[SITE]
    expected = second.encode(after_first)
    expected[..., 5] = 1.0
    assert torch.allclose(out[f"{SITE}/b"], expected, atol=1e-6)
    model.detach(f"{SITE}/a")
    assert list(model.anatomy.attached) == [f"{SITE}/b"]


def test_a_site_is_edited_before_its_features_are_read(model, ids):
    sae = Stub(32, 40)
    model.attach(SITE, sae)
    out = model.run(ids, save=[SITE, f"{SITE}/sae"], edits={SITE: ms.zero(), f"{SITE}/sae[3]": ms.set(2.0)})
    assert torch.allclose(out[f"{SITE}/sae"][..., 4], torch.zeros(3, 7))
    assert torch.allclose(out[SITE], (2.0 * sae.V[3]).expand(3, 7, -1), atol=1e-5)


# ------------------------------------------------------------------------------------------------ transcoders


def test_a_transcoder_reads_one_site_and_writes_another(model, ids):
    transcoder = Stub(32, 40)
    name = model.attach("blocks.1.ln2", transcoder, name="tc", writes="blocks.1.mlp_out")
    plain = model.run(ids, save=["blocks.1.ln2", "blocks.1.mlp_out", name, f"{name}/error"])
    assert torch.equal(plain[name], transcoder.encode(plain["blocks.1.ln2"]))
    total = transcoder.decode(plain[name]) + plain[f"{name}/error"]
    assert torch.allclose(total, plain["blocks.1.mlp_out"], atol=1e-5)
    listed = list(model.sites())
    assert listed[listed.index("blocks.1.mlp_out") + 1] == name
    out = model.run(ids, save=["blocks.1.ln2", "blocks.1.mlp_out"], edits={f"{name}[7]": ms.set(3.0)})
    assert torch.equal(out["blocks.1.ln2"], plain["blocks.1.ln2"])
    moved = (3.0 - plain[name][..., 7])[..., None] * transcoder.V[7]
    assert torch.allclose(out["blocks.1.mlp_out"] - plain["blocks.1.mlp_out"], moved, atol=1e-4)
    grads = model.run(ids, save=[name, "blocks.1.mlp_out", "blocks.0.resid_post"], grad=metric)
    assert torch.equal(grads.logits, plain.logits)
    assert torch.allclose(grads.grad[name], grads.grad["blocks.1.mlp_out"] @ transcoder.V.T, atol=1e-6)
    own = model.run(ids, save="blocks.0.resid_post", grad=metric).grad["blocks.0.resid_post"]
    assert torch.allclose(grads.grad["blocks.0.resid_post"], own, atol=1e-7)
    assert model.run(ids, save=name, stop_at=name)[name].shape == (3, 7, 40)


def test_a_dictionary_that_says_where_it_reads_and_writes_is_believed(model, ids):
    made = ms.dictionaries.TopK(32, 64, 32, k=4, skip=True, reads="blocks.1.ln2", writes="blocks.1.mlp_out")
    with torch.no_grad():
        made.W_skip.normal_()
    name = model.attach("blocks.1.ln2", made, name="tc")
    assert model.anatomy.attached[name].writes == "blocks.1.mlp_out"
    out = model.run(ids, save=["blocks.1.ln2", "blocks.1.mlp_out", name, f"{name}/error"])
    total = made.decode(out[name], out["blocks.1.ln2"]) + out[f"{name}/error"]
    assert torch.allclose(total, out["blocks.1.mlp_out"], atol=1e-5) and (out[name] != 0).sum(-1).max() == 4
    with pytest.raises(DictionaryError, match=r"say where it writes: writes='blocks\.1\.mlp_out'"):
        model.attach("blocks.2.ln2", made, name="tc")


# ------------------------------------------------------------------------------------------------ what stays


def test_a_failed_run_leaves_nothing(model, ids):
    from laws.test_laws import state

    model.attach(SITE, Stub(32, 40))
    before, plain = state(model.hf), model.run(ids).logits

    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    for site in (f"{SITE}/sae", f"{SITE}/sae/error", f"{SITE}/sae[3]"):
        with pytest.raises(ZeroDivisionError):
            model.run(ids, save=f"{SITE}/sae", edits={site: broken}, grad=metric)
    assert state(model.hf) == before and torch.equal(model.run(ids).logits, plain)


def test_rows_of_unequal_length_and_generation(words_model):
    model = words_model
    sae = Stub(32, 40)
    model.attach(SITE, sae)
    out = model.run(["the cat saw a bird", "it was quiet"], save=f"{SITE}/sae")
    alone = model.run("it was quiet", save=f"{SITE}/sae")
    real = out[f"{SITE}/sae"][1][out.mask[1]]
    assert torch.allclose(real, alone[f"{SITE}/sae"][0], atol=1e-5)
    edits = {f"{SITE}/sae[3]": ms.set(9.0)}
    cached, plain = (
        model.generate("the cat", max_new_tokens=5, save=f"{SITE}/sae[3|4]", edits=edits, use_cache=use)
        for use in (True, False)
    )
    assert cached.ids == plain.ids
    values = cached[f"{SITE}/sae[3|4]"]
    assert torch.allclose(values, plain[f"{SITE}/sae[3|4]"], atol=1e-5) and (values[..., 0] == 9).all()
    late = model.generate("the cat", max_new_tokens=3, save=f"{SITE}/sae[3,pos=1]")
    assert late[f"{SITE}/sae[3,pos=1]"].shape == (1,)


@pytest.fixture(scope="module")
def words_model():
    from tasks.standin import word_tokenizer

    words = "the a cat dog bird saw heard ran home today and then it was quiet again very old house"
    return ms.load(ARCHITECTURES["llama"].make(), word_tokenizer(words))


def test_a_run_with_features_is_read_back(model, ids, tmp_path):
    model.attach(SITE, Stub(32, 40))
    out = model.run(ids, save=[f"{SITE}/sae", f"{SITE}/sae/error"])
    back = ms.open(out.save(tmp_path / "run.safetensors"))
    assert torch.equal(back[f"{SITE}/sae[12,pos=-1]"], out[f"{SITE}/sae"][:, -1, 12])
    assert torch.equal(back[f"{SITE}/sae/error"], out[f"{SITE}/sae/error"])


def test_a_stream_of_features(model, ids):
    sae = Stub(32, 40)
    model.attach(SITE, sae)
    (got,) = model.stream(ids, at=f"{SITE}/sae", context=7, batch=3)
    (x,) = model.stream(ids, at=SITE, context=7, batch=3)
    assert torch.allclose(got, sae.encode(x))


def test_in_bfloat16_a_run_without_edits_stays_its_own(ids):
    model = ms.load(ARCHITECTURES["llama"].make().bfloat16())
    sae = Stub(32, 40)
    model.attach(SITE, sae)
    plain = model.run(ids)
    out = model.run(ids, save=[f"{SITE}/sae", f"{SITE}/sae/error"], grad=lambda logits: logits.float().sum())
    assert torch.equal(out.logits, plain.logits) and out[f"{SITE}/sae"].dtype == torch.float32
    same = model.run(ids, edits={f"{SITE}/sae": ms.unchanged(lambda f: f.clone())})
    assert torch.equal(same.logits, plain.logits)
