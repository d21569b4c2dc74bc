"""The atlas as a document: what it holds is what the model computes, whatever the architecture."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import mechscope as ms
from architectures import ARCHITECTURES
from atlases import CONTEXT, TEXT, gpt2_shape, made_small
from mechscope import jobs, viz
from mechscope.errors import StoreError, UnitsError
from mechscope.jobs.atlas_cards import chosen_neurons
from mechscope.units.examples import AFTER, BEFORE
from mechscope.viz.packing import packed_patterns, packed_signed, unpacked_patterns, unpacked_signed

atlas_job = sys.modules["mechscope.jobs.atlas"]  # `jobs.atlas` is the function


@pytest.fixture(scope="module")
def done():
    return made_small()


def test_weights_and_activations_survive_packing():
    causal = torch.rand(3, 5, 7, 7).tril().softmax(-1).tril()
    for patterns in (causal, torch.rand(2, 3, 3)):
        text, looks_back = packed_patterns(patterns)
        assert looks_back is (patterns is causal)
        back = unpacked_patterns(text, patterns.shape[-1], looks_back)
        assert (back - patterns.flatten(0, -3)).abs().max() <= 0.5 / 255 + 1e-6
    values = torch.randn(33)
    scale = float(values.abs().max())
    assert (unpacked_signed(packed_signed(values, scale), scale) - values).abs().max() <= scale / 254 + 1e-6
    assert unpacked_signed(packed_signed(torch.zeros(3), 0.0), 0.0).tolist() == [0, 0, 0]


def test_patterns_on_the_page_are_the_models(done):
    model, document = gpt2_shape(4, 4), done.document
    assert document["layers"] == list(range(4)) and document["heads"] == [4] * 4
    for i, prompt in enumerate(document["prompts"][:-1]):
        ids = TEXT[i][:CONTEXT]
        assert prompt["tokens"] == model.strings(ids.tolist())
        out = model.run(ids[None], save="blocks.*.pattern")
        wanted = torch.cat([out[f"blocks.{layer}.pattern"][0] for layer in range(4)])
        held = unpacked_patterns(prompt["patterns"], len(prompt["tokens"]), prompt["causal"])
        assert (held - wanted).abs().max() <= 0.5 / 255 + 1e-5


def test_kinds_and_importance_are_the_results_that_were_saved(done):
    heads, important = (
        ms.open(done.page.parent / "heads.safetensors"),
        ms.open(done.page.parent / "importance.safetensors"),
    )
    for kind in done.document["kinds"]:
        assert torch.allclose(torch.tensor(kind["score"]).double(), heads[kind["name"]].score.double(), atol=1e-5)
        assert kind["threshold"] == heads[kind["name"]].threshold
    assert torch.allclose(torch.tensor(done.document["importance"]["score"]), important.score.float(), atol=1e-5)
    assert done.document["labels"][2][3] == heads.label(2, 3)


def test_importance_is_the_rise_of_the_loss_without_the_head(done):
    model = gpt2_shape(4, 4)
    ids = TEXT[: len(done.importance.base), :CONTEXT]

    def loss(**edits):
        logits = model.run(ids, **edits).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    site = "blocks.2.z[head=3]"
    wanted = loss(edits={site: ms.mean(("batch", "pos"))}) - loss()
    assert torch.allclose(done.importance.values[2, 3], wanted, atol=1e-5)
    assert done.importance.cost["forwards"] == 1 + 4 * sum(range(1, 5)) / 4


def test_cards_hold_what_the_neuron_does_at_every_token_of_the_window(done):
    model, document = gpt2_shape(4, 4), done.document
    assert len(document["neurons"]) == 24 and {card["layer"] for card in document["neurons"]} == set(range(4))
    for card in document["neurons"][::5]:
        layer, unit = map(int, card["name"].split("."))
        kept = done.harvest.query(card["name"])
        shown = [example for example in card["examples"] if example["range"] == 0]
        assert [x["activation"] for x in shown] == pytest.approx([x.activation for x in kept.highest[:8]], abs=1e-3)
        for example, source in zip(shown, kept.highest):
            start, end = max(0, source.position - BEFORE), source.position + 1 + AFTER
            row = TEXT[source.context][:CONTEXT]
            acts = model.run(row[None], save=f"blocks.{layer}.mlp_post")[f"blocks.{layer}.mlp_post"][0, start:end, unit]
            held = unpacked_signed(example["values"], card["scale"])
            assert (held - acts).abs().max() <= card["scale"] / 250
            assert [document["words"][i] for i in example["ids"]] == model.strings(row[start:end].tolist())
            assert float(acts[example["peak"]]) == pytest.approx(example["activation"], abs=1e-3)


def test_what_a_neuron_promotes_is_its_column_through_the_unembedding(done):
    model, card = gpt2_shape(4, 4), done.document["neurons"][-1]
    layer, unit = map(int, card["name"].split("."))
    column = model.hf.transformer.h[layer].mlp.c_proj.weight[unit]
    gain = model.hf.transformer.ln_f.weight
    logits = ((column - column.mean()) * gain).detach() @ model.hf.lm_head.weight.T
    order = (logits - logits.mean()).argsort(descending=True)
    assert [token for token, _ in card["promotes"]] == model.strings(order[:8].tolist())
    assert [token for token, _ in card["suppresses"]] == model.strings(order.flip(0)[:8].tolist())
    assert card["promotes"][0][1] == pytest.approx((logits - logits.mean()).max().item(), rel=1e-2)


def test_what_a_head_writes_is_its_output_through_the_frozen_norm(done):
    model, prompt = gpt2_shape(4, 4), done.document["prompts"][0]
    out = model.run(TEXT[:1, :CONTEXT], save=["blocks.1.head_out", "blocks.3.resid_post"])
    position, size, tokens = prompt["writes"][1][2][0]
    vector = out["blocks.1.head_out"][0, 2]
    assert position == int(vector.norm(dim=-1).argmax()) and size == pytest.approx(
        float(vector[position].norm()), rel=1e-3
    )
    logits = (
        model.readout.frozen(out["blocks.3.resid_post"][0, [position]])(vector[[position]])[0] @ model.readout.weight.T
    )
    assert tokens[0][0] == model.strings([int(logits.argmax())])[0]


def test_half_the_cards_are_random_and_the_same_seed_draws_the_same(done):
    chosen = chosen_neurons(done.harvest, 24)
    assert chosen == chosen_neurons(done.harvest, 24) != chosen_neurons(done.harvest, 24, seed=1)
    assert sum(reason == "drawn at random" for reason in chosen.values()) == 12
    assert list(chosen_neurons(done.harvest, ["3.2", "neuron 0.1"]).values()) == ["asked for"] * 2
    with pytest.raises(UnitsError, match="there is no 999"):
        chosen_neurons(done.harvest, ["3.999"])
    with pytest.raises(UnitsError, match="4000"):
        chosen_neurons(done.harvest, 10**6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "bert"])
def test_other_architectures_have_an_atlas_that_says_what_is_absent(name, tmp_path):
    model = ms.load(ARCHITECTURES[name].make())
    ids = torch.randint(3, 90, (12, 24), generator=torch.Generator().manual_seed(0))
    document = jobs.atlas(model, ids, tmp_path, neurons=6, prompts=1, context=24).document
    assert "NaN" not in json.dumps(document["neurons"])
    assert sum(document["heads"]) == model.n_layers * model.n_heads and document["prompts"]
    if name == "llama":  # gated: gate and factor at the boxed token give the activation
        card = next(card for card in document["neurons"] if card["examples"])
        gate, factor = card["examples"][0]["inside"]
        wanted = float(torch.nn.functional.silu(torch.tensor(gate)) * factor)
        assert card["examples"][0]["activation"] == pytest.approx(wanted, rel=0.05)
    if name == "mixtral":
        assert not document["neurons"] and "experts" in " ".join(document["notes"]["neurons"])


def test_a_page_stays_below_its_size_and_says_what_it_left_out(done, tmp_path, monkeypatch):
    document = json.loads(json.dumps(done.document))
    size = len(viz.page(viz.to_view(document)))
    monkeypatch.setattr(atlas_job, "MOST", size - 4_000)
    path = atlas_job.written(document, tmp_path / "index.html")
    assert path.stat().st_size <= size - 4_000 and "1 prompts left out" in document["summary"]["page"][1]
    monkeypatch.setattr(atlas_job, "MOST", 1000)
    with pytest.raises(UnitsError, match="--neurons"):
        atlas_job.written(document, tmp_path / "index.html")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda d: d.update(version=2), "version"),
        (lambda d: d.pop("words"), "words"),
        (lambda d: d["labels"].pop(), "labels"),
        (lambda d: d["prompts"][0].update(causal=False), "weights"),
        (lambda d: d["neurons"][0]["examples"][0].update(peak=99), "peak"),
        (lambda d: d["neurons"][0]["examples"][0]["ids"].append(10**6), "a word"),
    ],
)
def test_a_document_that_cannot_be_drawn_is_refused_by_the_place(change, wanted, done):
    document = json.loads(json.dumps(done.document))
    change(document)
    with pytest.raises(StoreError, match=wanted):
        viz.to_view(document)
