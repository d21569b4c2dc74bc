"""Neurons of experts, on tiny random mixtures: they sum to what the MLP writes, and every detector names them."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from architectures import ARCHITECTURES
from mechscope.models.experts import neurons_written
from mechscope.units.confidence import confidence_neurons, written
from mechscope.units.congruence import token_congruence
from mechscope.units.knowing import knowledge_neurons
from mechscope.units.responding import responses
from mechscope.units.universality import universal

IDS = torch.randint(5, 97, (6, 8), generator=torch.Generator().manual_seed(0))
SITES = ("expert_post", "expert_weight", "mlp_out", "experts", "ln2")


@pytest.fixture(scope="module")
def mixtral():
    return ms.load(ARCHITECTURES["mixtral"].make())


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "gpt_oss"])
def model(request, mixtral):
    return mixtral if request.param == "mixtral" else ms.load(ARCHITECTURES[request.param].make())


def test_contributions_times_the_routers_weight_sum_to_what_the_mlp_writes(model):
    """Also where gate and up lie in turns, transposed, clamped and with biases (gpt_oss)."""
    out = model.run(IDS, save=[f"blocks.1.{site}" for site in SITES if f"blocks.1.{site}" in model.certificate.sites])
    experts = model.anatomy.layers()[1].experts
    post, weight = out["blocks.1.expert_post"], out["blocks.1.expert_weight"]
    values = torch.stack([experts.value(e) for e in range(experts.number)])
    total = torch.einsum("bepi,bpe,eid->bpd", post, weight, values)
    bias = getattr(experts.module, "down_proj_bias", None)
    total = total if bias is None else total + weight @ bias.detach()
    assert torch.allclose(total, out["blocks.1.mlp_out"], atol=1e-4)


def test_there_are_values_only_where_the_router_sent_the_token(model):
    out = model.run(IDS, save=["blocks.1.expert_post", "blocks.1.expert_weight", "blocks.1.experts"])
    sent = torch.zeros_like(out["blocks.1.expert_weight"]).scatter(-1, out["blocks.1.experts"], 1.0).bool()
    there = (out["blocks.1.expert_post"] != 0).any(-1).transpose(1, 2)
    assert torch.equal(there, sent) and torch.equal(out["blocks.1.expert_weight"] != 0, sent)
    assert 0 < int(sent.sum()) < sent.numel()


def test_gate_and_up_are_the_rows_that_make_the_product(mixtral):
    out = mixtral.run(IDS, save=["blocks.1.expert_post", "blocks.1.expert_weight", "blocks.1.ln2"])
    experts, read = mixtral.anatomy.layers()[1].experts, out["blocks.1.ln2"]
    product = torch.nn.functional.silu(read @ experts.key(2).T) * (read @ experts.key(2, "up").T)
    sent = out["blocks.1.expert_weight"][..., 2] != 0
    assert torch.allclose(product[sent], out["blocks.1.expert_post"][:, 2][sent], atol=1e-4)


def test_a_change_of_one_neuron_reaches_the_stream_by_its_value_and_weight(mixtral):
    name, out = "blocks.1.expert_post", mixtral.run(IDS, save=["blocks.1.expert_weight", "blocks.1.mlp_out"])

    def more(post):
        post = post.clone()
        post[:, 3, :, 7] += 2.0
        return post

    moved = mixtral.run(IDS, save="blocks.1.mlp_out", edits={name: more})["blocks.1.mlp_out"]
    value = neurons_written(mixtral, 1).rows[3 * 48 + 7]
    assert torch.allclose(
        moved - out["blocks.1.mlp_out"], 2 * out["blocks.1.expert_weight"][..., 3, None] * value, atol=1e-4
    )
    assert ms.units.expert_neuron(mixtral, 1, expert=3, neuron=7) == "blocks.1.expert_post[151]"
    with pytest.raises(ms.errors.UnitsError, match="4 experts of 48 neurons"):
        ms.units.expert_neuron(mixtral, 1, expert=4, neuron=0)


def test_responses_and_the_harvest_name_experts_neurons_and_agree(mixtral, tmp_path):
    ids = torch.randint(5, 97, (40, 16), generator=torch.Generator().manual_seed(1))
    found = responses(mixtral, ids, at="blocks.1.expert_post", context=16)
    assert len(found.names) == 4 * 48 and found.names[151] == "blocks.1.expert_post[151]"
    assert "router did not send" in found.choices["unit"] and "act(gate) * up" in found.choices["unit"]
    sent = mixtral.run(ids, save="blocks.1.expert_weight")["blocks.1.expert_weight"][..., 3] != 0
    assert 0 < float(found.active[151]) <= float(sent.float().mean())
    kept = ms.units.harvest(mixtral, ids, tmp_path / "h", at="blocks.*.expert_post", k=3, context=16)
    examples = kept.query(ms.units.expert_neuron(mixtral, 1, 3, 7))
    assert examples.facts["above_zero"] == pytest.approx(float(found.active[151]), abs=1e-6)
    best = examples.highest[0]
    assert bool(sent[best.context, best.position]) and best.activation > 0


def test_detectors_by_weights_and_runs_take_experts(mixtral):
    assert token_congruence(mixtral, 9, controls=3).tables[0].rows[0].label.count(".") == 2
    assert len(written(mixtral, 1).null) == 4 * 48
    found = confidence_neurons(mixtral, IDS, top=1, controls=1, context=8)
    assert "router did not send" in found.choices["unit"]
    known = knowledge_neurons(mixtral, [[5, 6, 7], [8, 9, 7]], 3, steps=3, agree=0.5)
    assert known.attributions.shape == (2, 3, 4 * 48)
    same = universal(mixtral, [mixtral], IDS, at="blocks.1.expert_post", context=8)
    assert float(same.best[0].median()) > 0.999


def test_a_mixture_that_hides_its_experts_says_so():
    model = ms.load(ARCHITECTURES["llama4_text"].make())
    with pytest.raises(ms.errors.SiteError, match="given tokens, the experts chosen"):
        model.run(IDS, save="blocks.1.expert_post")
    with pytest.raises(ms.errors.EditError, match="expert_post"):
        ms.load(ARCHITECTURES["mixtral"].make()).run(IDS, edits={"blocks.1.expert_weight": ms.zero()})
