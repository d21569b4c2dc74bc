"""Reading changes nothing, writing back changes nothing, writing noise changes something, patching everything restores.

Every test holds for one architecture of `architectures.py`; tolerances are the design's 1e-5 × max(1, largest logit)
in float32 unless a line says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mechscope as ms
from architectures import ARCHITECTURES, REFUSED
from laws.cases import LENGTH, Case, assert_near, plain_logits, short, tolerance
from mechscope.models.sites import BY_NAME


def state(module: nn.Module) -> dict[str, Any]:
    """This is everything that a run could leave behind on a user's module, and on transformers."""
    from transformers.modeling_utils import AttentionInterface

    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {name: [len(getattr(m, kind)) for kind in hooks] for name, m in module.named_modules()},
        "forwards": {name: m.__dict__.get("forward") for name, m in module.named_modules()},
        "training": {name: m.training for name, m in module.named_modules()},
        "interface": AttentionInterface.get_interface.__module__,
        "config": module.config.to_dict(),
        "attention": module.config._attn_implementation,
        "gradients": {name: (p.requires_grad, p.grad) for name, p in module.named_parameters()},
    }


class Deliberate(Exception):
    """This is what an edit raises to see whether a failed run cleans up after itself."""


def test_reading_changes_nothing(case: Case) -> None:
    inputs = case.inputs()
    weights = {name: value.clone() for name, value in case.module.state_dict().items()}
    before = state(case.module)
    plain = plain_logits(case, inputs)
    assert torch.equal(case.model.run(inputs).logits, plain), "a run that saves nothing gives other logits"
    assert torch.equal(case.model.run(inputs, save=case.sites).logits, plain), "saving every site gives other logits"

    def fail(x: Tensor) -> Tensor:
        raise Deliberate

    middle = case.layer_sites("resid_post")[-1]
    with pytest.raises(Deliberate):
        case.model.run(inputs, save=case.sites, edits={middle: fail})
    assert torch.equal(plain_logits(case, inputs), plain)
    assert state(case.module) == before
    after = case.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items()), "a weight changed"


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_loading_leaves_nothing(name: str) -> None:
    module = ARCHITECTURES[name].make()
    before = state(module)
    assert before["interface"] == "transformers.modeling_utils"
    ms.load(module, partial=name in REFUSED)
    assert state(module) == before


def test_each_site_fires_with_its_axes(case: Case) -> None:
    sizes = {"batch": 2, "d_model": case.module.config.hidden_size}
    if case.kind in ("causal", "encoder"):
        sizes |= {"pos": LENGTH, "query": LENGTH, "key": LENGTH, "d_vocab": case.module.config.vocab_size}
    for site in case.sites:
        axes, shape = case.model.sites()[site].axes, tuple(case.clean[site].shape)
        if site == "logits":
            assert torch.equal(case.clean[site], case.clean.logits)
            assert axes == (("batch", "class") if case.kind == "vision" else BY_NAME["logits"].axes)
        assert len(axes) == len(shape), f"{site}: axes {axes}, shape {shape}"
        block = {axis: case.clean[site].shape[i] for i, axis in enumerate(axes)}
        if site == "final" and case.kind != "vision":  # ELECTRA's and ALBERT's unembedding is narrower than the stream
            block["d_model"] += sizes["d_model"] - case.module.get_output_embeddings().weight.shape[1]
        wrong = {axis: size for axis, size in block.items() if axis in sizes and size != sizes[axis]}
        assert not wrong, f"{site}: {wrong}, expected {sizes}"
        assert not case.clean[site].isnan().any(), site
        assert not case.clean[site].requires_grad, site
        values = case.clean[site][case.clean[site].isfinite()].double()
        assert values.std() > 0, f"{site} is constant"


def test_the_sites_that_should_exist_are_listed(case: Case) -> None:
    missing = expected_sites(case) - set(case.sites)
    assert not missing, f"not listed: {', '.join(sorted(missing))}"
    assert case.sites == [site for site in case.sites if site in set(case.sites)]
    assert len(case.sites) == len(set(case.sites))


def expected_sites(case: Case) -> set[str]:
    """These are the sites that follow from an architecture's features, whatever the library found."""
    features = set(case.features)
    names = {"final", "logits"} if case.kind != "vision" else {"logits"}
    layer_types = getattr(case.module.config, "layer_types", None) or []
    stacks = ["encoder.blocks", "decoder.blocks"] if case.kind == "seq2seq" else ["blocks"]
    for stack in stacks:
        for layer in range(case.depth):
            kind = layer_types[layer] if layer < len(layer_types) else "full_attention"
            wanted = {"resid_pre", "resid_post"}
            if not case.refused:
                wanted |= expected_of_attention(kind, features) | expected_of_the_mlp(features)
            names |= {f"{stack}.{layer}.{name}" for name in wanted}
    return names


def expected_of_attention(kind: str, features: set[str]) -> set[str]:
    recurrent = bool({"ssm", "recurrent"} & features)
    if "hybrid" in features or recurrent:
        if kind not in ("full_attention", "attention", "sliding_attention", "mlp", "moe"):
            return {"ssm"}
        if kind in ("mlp", "moe"):
            return {"mlp_out"}
        if recurrent and kind != "sliding_attention":
            return set()
    wanted = {"attn_out", "ln1"}
    if "differential" not in features:
        wanted |= {"q", "k", "v", "scores", "pattern", "z"}
        wanted |= {"head_out"} if not {"sub-norm", "moe-attention"} & features else set()
    return wanted | ({"resid_mid"} if not {"parallel", "hybrid"} & features else set())


def expected_of_the_mlp(features: set[str]) -> set[str]:
    if {"ssm", "hybrid", "recurrent"} & features:
        return set()
    if {"moe", "sub-norm"} & features:
        return {"mlp_out"}
    return {"mlp_out", "mlp_post", "mlp_pre", "ln2"} | ({"mlp_up"} if "gated" in features else set())


def test_writing_back_what_was_read_changes_nothing(case: Case) -> None:
    inputs, clean = case.inputs(), case.clean
    for name in dict.fromkeys(map(short, case.sites)):
        edits = {site: ms.unchanged(ms.set(clean[site])) for site in case.layer_sites(name) if site in case.editable}
        logits = case.model.run(inputs, edits=edits).logits
        assert_near(logits, clean.logits, tolerance(clean.logits), f"writing back every {name}")


def noise(row: int, seed: int) -> Callable[[Tensor], Tensor]:
    """This adds noise, as large as the site's own values, to one row of the batch and leaves the others alone."""

    def edit(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = x[row].isfinite() & (x[row] > -1e30)  # masked scores stay masked
        size = x[row][values].std() if values.sum() > 1 else torch.tensor(1.0)
        drawn = torch.randn(x[row].shape, generator=generator).to(x.dtype) * size
        out = x.clone()
        out[row] = torch.where(values, x[row] + drawn, x[row])
        return out

    return edit


def test_writing_noise_changes_the_logits(case: Case) -> None:
    # One row per site, and a last row that no edit touches: rows must not leak into each other either.
    rows = len(case.editable) + 1
    inputs = case.repeated(rows)
    edits = {site: noise(row, seed=row) for row, site in enumerate(case.editable)}
    clean, noisy = case.model.run(inputs).logits, case.model.run(inputs, edits=edits).logits
    moved = (noisy - clean).abs().flatten(1).amax(1)
    unmoved = [site for site, change in zip(case.editable, moved[:-1], strict=True) if change < 1e-4]
    assert not unmoved, f"noise at {', '.join(unmoved)} changed no logit"
    assert moved[-1] <= tolerance(clean), f"the row without noise moved by {moved[-1]:.1e}"


def test_routers_that_have_chosen_are_read_only(case: Case) -> None:
    """Their logits can be read; an edit or a gradient that could not reach the model is refused with that reason."""
    for site in set(case.sites) - set(case.editable):
        assert short(site) in ("router", "experts", "expert_weight")
        with pytest.raises(ms.errors.EditError, match="can be read but not edited"):
            case.model.run(case.inputs(), edits={site: lambda x: x + 1})
        with pytest.raises(ms.errors.GradientError, match="can be read but not differentiated"):
            case.model.run(case.inputs(), save=site, grad=lambda logits: logits.sum())
    for site in case.layer_sites("experts"):
        router, chosen = case.clean.values.get(site.replace("experts", "router")), case.clean[site]
        if router is not None:
            assert chosen.min() >= 0 and chosen.max() < router.shape[-1]


def test_patching_everything_restores_the_clean_run(case: Case) -> None:
    clean, corrupt = case.clean, case.inputs(seed=1)
    spoiled = case.model.run(corrupt).logits
    assert (spoiled - clean.logits).abs().max() > 1e-2
    for depth, end in ((0, "resid_pre"), (1, "resid_post")):
        sites = [f"{stack[depth]}{end}" for stack in case.stacks()]
        if "shared-block" in case.features:  # blocks that read the embedding again, beside the stream
            sites = ["embed", *sites]
        edits = {site: ms.unchanged(ms.set(clean[site])) for site in sites}
        patched = case.model.run(corrupt, edits=edits).logits
        assert_near(patched, clean.logits, tolerance(clean.logits), f"patching {sites}")
