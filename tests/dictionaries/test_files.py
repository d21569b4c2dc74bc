"""Other packages' files: each layout computes what its package does, comes back bit for bit, says what it assumes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mechscope as ms
from dictionaries.golden_layouts import LAYERED, SINGLE, D, Golden, N, write_all
from mechscope import dictionaries
from mechscope.dictionaries.files.layouts import LAYOUTS, recognise
from mechscope.dictionaries.files.raw import Tensors
from mechscope.dictionaries.transcoders import transcoder
from mechscope.errors import DictionaryError, UnsafeFileError


@pytest.fixture(scope="module")
def goldens(tmp_path_factory) -> dict[str, Golden]:
    made = write_all(tmp_path_factory.mktemp("golden"))
    for golden in made:
        if golden.layout == "dictionary_learning":
            dictionaries.convert(golden.folder)
    return {golden.name: golden for golden in made}


def names() -> list[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return [golden.name for golden in write_all(Path(folder))]


NAMES = names()


def forward(dictionary: dictionaries.Dictionary, golden: Golden) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(golden.x).float()
    with torch.no_grad():
        return dictionary.encode(x), dictionary(x, torch.zeros(golden.output.shape)).output


def close(ours: torch.Tensor, exact) -> None:
    exact = torch.tensor(exact)
    assert (ours.double() - exact).abs().max() <= 1e-6 * max(1, exact.abs().max())


# Each layout


@pytest.mark.parametrize("name", NAMES)
def test_a_file_computes_what_its_package_does(goldens, name):
    golden = goldens[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = dictionaries.read(golden.folder)
    assert isinstance(read, dictionaries.Dictionary)
    assert (type(read).__name__, read.reads, read.writes) == (golden.architecture, golden.reads, golden.writes)
    features, output = forward(read, golden)
    close(features, golden.features)
    close(output, golden.output)
    assert read.facts["layout"] == golden.layout and read.facts["assumptions"] is not None
    assert all(f"assumed: {what}" in repr(read) for what in read.facts["assumptions"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back_bit_for_bit(goldens, name, tmp_path):
    golden = goldens[name]
    first = dictionaries.read(golden.folder)
    place = tmp_path / (golden.folder.name if golden.layout == "sparsify" else "back")
    dictionaries.write(first, place, layout=golden.layout)
    second = dictionaries.read(place / "layer_0.safetensors" if golden.name.startswith("plt") else place)
    assert isinstance(first, dictionaries.Dictionary) and isinstance(second, dictionaries.Dictionary)
    assert second.state_dict().keys() == first.state_dict().keys()
    for part, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[part]), part
    for ours, theirs in zip(forward(first, golden), forward(second, golden), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_our_own_file_keeps_it_with_its_facts(goldens, name, tmp_path):
    golden = goldens[name]
    first = dictionaries.read(golden.folder)
    assert isinstance(first, dictionaries.Dictionary)
    second = ms.open(first.save(tmp_path / "own.safetensors"))
    assert second.facts == first.facts and (second.reads, second.writes) == (first.reads, first.writes)
    for ours, theirs in zip(forward(first, golden), forward(second, golden), strict=True):
        assert torch.equal(ours, theirs)
    told = dictionaries.inspect(tmp_path / "own.safetensors")
    assert (told.layout, told.architecture, told.n_latents) == ("mechscope", golden.architecture, first.n_latents)


@pytest.mark.parametrize("name", NAMES)
def test_inspecting_reads_no_tensor(goldens, name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Tensors, "all", refuse)
    if name not in ("MatryoshkaBatchTopKSAE",):
        monkeypatch.setattr(Tensors, "__getitem__", refuse)
    golden = goldens[name]
    told = dictionaries.inspect(golden.folder)
    assert (told.layout, told.reads, told.writes) == (golden.layout, golden.reads, golden.writes)
    assert golden.architecture in (told.architecture, "Normed") and told.d_in == D
    text = str(told)
    assert all(what in text for what in told.assumptions) and golden.layout in text


def test_every_layout_has_a_golden_file(goldens):
    assert {golden.layout for golden in goldens.values()} == set(LAYOUTS)
    assert len(SINGLE) + len(LAYERED) > len(LAYOUTS)


# From one layout to another


def test_scales_are_folded_with_the_middle(tmp_path):
    """A fold that forgets b_dec passes every test of directions and fails this one."""
    x = torch.randn(64, 16) * 30 + 7
    for kind in ("ReLU", "Gated", "TopK", "BatchTopK", "JumpReLU", "PAnnealing", "Matryoshka"):
        options = {"k": 4} if kind in ("TopK", "BatchTopK", "Matryoshka") else {}
        sae = getattr(dictionaries, kind)(16, 48, reads="blocks.1.resid_post", **options)
        sae.begin(x, None)
        sae.b_enc.data.normal_(0, 0.1)
        sae.eval()
        assert float(sae.scale_in) != 1 and sae.b_dec.norm() > 1
        for layout in ("saelens", "dictionary_learning"):
            read = dictionaries.read(dictionaries.write(sae, tmp_path / kind / layout, layout=layout))
            assert isinstance(read, dictionaries.Dictionary)
            assert read.reads == "blocks.1.resid_post"
            torch.testing.assert_close(read(x).output, sae(x).output, rtol=1e-4, atol=1e-3)


def test_a_transcoder_with_two_scales_and_a_skip_goes_through(tmp_path):
    sites = {"reads": "blocks.2.ln2", "writes": "blocks.2.mlp_out"}
    for kind, layouts in (("JumpReLU", ("saelens", "gemma-scope-2", "circuit-tracer")), ("TopK", ("sparsify",))):
        options = {"k": 4} if kind == "TopK" else {}
        coder = transcoder(kind, 16, 48, 16, skip=True, **sites, **options).eval()
        coder.scale_in.fill_(0.2)
        coder.scale_out.fill_(5.0)
        assert coder.W_skip is not None
        for part in (coder.W_skip, coder.b_dec, coder.b_enc):
            torch.nn.init.normal_(part, std=0.2)
        x, y = torch.randn(32, 16) * 5, torch.randn(32, 16)
        for layout in layouts:
            place = dictionaries.write(coder, tmp_path / layout / "layers.2.mlp", layout=layout)
            read = dictionaries.read(place / "layer_0.safetensors" if layout == "circuit-tracer" else place)
            assert isinstance(read, dictionaries.Dictionary)
            torch.testing.assert_close(read(x, y).output, coder(x, y).output, rtol=1e-4, atol=1e-5)


def test_gemma_scope_takes_a_centred_dictionary(tmp_path):
    sae = dictionaries.JumpReLU(16, 48, threshold=0.2).eval()
    sae.b_dec.data.normal_()
    read = dictionaries.read(dictionaries.write(sae, tmp_path, layout="gemma-scope"), site="blocks.0.resid_post")
    assert isinstance(read, dictionaries.JumpReLU) and not read.centred and read.reads == "blocks.0.resid_post"
    x = torch.randn(32, 16)
    torch.testing.assert_close(read(x).output, sae(x).output, rtol=1e-4, atol=1e-5)


def test_what_a_layout_cannot_hold_is_refused_with_one_that_can(goldens, tmp_path):
    relu, topk = dictionaries.ReLU(16, 48), dictionaries.TopK(16, 48, k=4)
    with pytest.raises(DictionaryError, match=r"sparsify files hold TopK, not ReLU.*save"):
        dictionaries.write(relu, tmp_path / "a", layout="sparsify")
    with pytest.raises(DictionaryError, match=r"gemma-scope files hold JumpReLU, .*not TopK"):
        dictionaries.write(topk, tmp_path / "b", layout="gemma-scope")
    with pytest.raises(DictionaryError, match="no layout 'sae_lens'; did you mean 'saelens'"):
        dictionaries.write(relu, tmp_path / "c", layout="sae_lens")
    with pytest.raises(DictionaryError, match="Crosscoder"):
        dictionaries.write(dictionaries.Crosscoder(2, 16, 48), tmp_path / "d", layout="saelens")
    normed = dictionaries.read(goldens["layer_norm"].folder)
    with pytest.raises(DictionaryError, match="layout='saelens'"):
        dictionaries.write(normed, tmp_path / "layers.1", layout="sparsify")


def test_a_norms_gain_is_folded_in(goldens):
    golden = goldens["gemma-transcoders"]
    gain = torch.rand(D) + 0.5
    read = dictionaries.read(golden.folder)
    assert isinstance(read, dictionaries.Dictionary) and any("fold_gain" in what for what in read.facts["assumptions"])
    dictionaries.fold_gain(read, gain)
    assert not any("fold_gain" in what for what in read.facts["assumptions"])
    output = read(torch.tensor(golden.x).float() * gain, torch.zeros(golden.output.shape)).output
    torch.testing.assert_close(output.double(), torch.tensor(golden.output), rtol=1e-5, atol=1e-5)
    with pytest.raises(DictionaryError, match=r"the gain is \[3\]"):
        dictionaries.fold_gain(read, torch.ones(3))


# Folders


def test_a_set_of_transcoders_is_a_dict_by_what_each_writes(goldens):
    folder = goldens["plt-0"].folder.parent
    read = dictionaries.read(folder)
    assert isinstance(read, dict) and list(read) == [f"blocks.{layer}.mlp_out" for layer in range(3)]
    for layer, one in enumerate(read.values()):
        close(forward(one, goldens[f"plt-{layer}"])[1], goldens[f"plt-{layer}"].output)
    assert list(dictionaries.inspect(folder)) == list(read)


def test_a_folder_of_hookpoints_is_a_dict_by_name(goldens):
    folder = goldens["sparsify-layers.5"].folder.parent
    read = dictionaries.read(folder)
    assert isinstance(read, dict) and sorted(read) == sorted(entry.name for entry in folder.iterdir())


def test_a_circuit_tracer_set_may_list_files_of_gemma_scope(goldens, tmp_path):
    place = tmp_path / "layer_0" / "width_16k" / "average_l0_76"
    shutil.copytree(goldens["gemma-transcoders"].folder, place)
    listed = "hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz"
    config = "model_name: google/gemma-2-2b\nmodel_kind: transcoder_set\nfeature_input_hook: ln2.hook_normalized\n"
    (tmp_path / "config.yaml").write_text(f'{config}feature_output_hook: hook_mlp_out\ntranscoders:\n  - "{listed}"\n')
    read = dictionaries.read(tmp_path, layout="circuit-tracer")
    assert isinstance(read, dict) and list(read) == ["blocks.0.mlp_out"]
    one = read["blocks.0.mlp_out"]
    assert one.reads == "blocks.0.ln2" and any("gain" in what for what in one.facts["assumptions"])
    close(forward(one, goldens["gemma-transcoders"])[1], goldens["gemma-transcoders"].output)
    shutil.rmtree(place)
    with pytest.raises(DictionaryError, match="nothing is downloaded: put the file at"):
        dictionaries.read(tmp_path, layout="circuit-tracer")


# What is wrong with a file is said


def altered(golden: Golden, tmp_path: Path, file: str = "cfg.json", **changes: Any) -> Path:
    """This copies a golden folder with settings changed, or taken out where they are None."""
    folder = tmp_path / golden.folder.name
    shutil.copytree(golden.folder, folder)
    values = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return folder


def test_unknown_settings_warn_by_name(goldens, tmp_path):
    folder = altered(goldens["standard"], tmp_path, surprise=3)
    with pytest.warns(UserWarning, match=r"cfg\.json' has keys that mechscope does not know.*: surprise"):
        dictionaries.read(folder)


def test_missing_settings_are_named_or_assumed(goldens, tmp_path):
    with pytest.raises(DictionaryError, match=r"lacks 'k'.*It has"):
        dictionaries.read(altered(goldens["sparsify-layers.5"], tmp_path / "a", k=None))
    with pytest.raises(DictionaryError, match="lacks 'k', the number of active latents"):
        dictionaries.read(altered(goldens["topk"], tmp_path / "b", k=None))
    told = dictionaries.inspect(altered(goldens["standard"], tmp_path / "c", apply_b_dec_to_input=None))
    assert told.centred and any("whether b_dec is taken off" in what for what in told.assumptions)


def test_what_cannot_be_computed_is_refused(goldens, tmp_path):
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("standard", {"architecture": "matching_pursuit"}, "encodes by an iteration"),
        ("standard", {"architecture": "strange"}, "SAELens's that are read"),
        ("standard", {"normalize_activations": "covariance_whitening"}, "save_inference_model"),
        ("v4-topk", {"activation_fn_str": "tanh-relu"}, "relu and topk are read"),
        ("sparsify-layers.5", {"activation": "groupmax"}, "groupmax"),
        ("sparsify-layers.5", {"num_latents": 99}, "says 99 latents"),
    ]
    for number, (name, changes, said) in enumerate(cases):
        with pytest.raises(DictionaryError, match=said):
            dictionaries.read(altered(goldens[name], tmp_path / str(number), **changes))


def test_tensors_of_the_wrong_shape_or_missing_are_named(goldens, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = altered(goldens["jumprelu"], tmp_path)
    weights = folder / "sae_weights.safetensors"
    held = load_file(weights)
    save_file({**held, "W_enc": held["W_enc"].T.contiguous()}, weights)
    with pytest.raises(DictionaryError, match=rf"'W_enc' is \[{D}, {N}\], and \[{N}, {D}\] was expected"):
        dictionaries.read(folder)
    save_file({name: value for name, value in held.items() if name != "threshold"}, weights)
    with pytest.raises(DictionaryError, match="lacks 'threshold'"):
        dictionaries.read(folder)
    save_file({**held, "b_dec": held["b_dec"] * float("nan")}, weights)
    with pytest.raises(DictionaryError, match="'b_dec' holds NaN"):
        dictionaries.read(folder)
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ms.errors.MechscopeError, match="damaged"):
        dictionaries.read(folder)


def test_the_scale_that_a_file_lacks_is_an_assumption(goldens, tmp_path):
    golden = goldens["checkpoint-scaled"]
    folder = tmp_path / "unscaled"
    shutil.copytree(golden.folder, folder)
    (folder / "activation_scaler.json").unlink()
    without = dictionaries.read(folder)
    assert isinstance(without, dictionaries.Dictionary)
    assert any("expected_average_only_in" in what and "scale=" in what for what in without.facts["assumptions"])
    told = dictionaries.read(folder, scale=0.05)
    assert isinstance(told, dictionaries.Dictionary)
    close(forward(told, golden)[1], golden.output)


def test_half_precision_is_held_as_float32_and_said(goldens, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = altered(goldens["standard"], tmp_path, dtype="bfloat16")
    weights = folder / "sae_weights.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights)
    read = dictionaries.read(folder)
    assert isinstance(read, dictionaries.ReLU) and read.W_enc.dtype == torch.float32
    assert "the weights are stored as bfloat16, and held as float32" in read.facts["assumptions"]


def test_pickles_are_not_opened(goldens, tmp_path):
    folder = tmp_path / "trainer_0"
    shutil.copytree(goldens["AutoEncoderTopK"].folder, folder)
    (folder / "ae.safetensors").unlink()
    assert dictionaries.inspect(folder).architecture == "TopK"
    with pytest.raises(UnsafeFileError, match=r"is a pickle.*convert"):
        dictionaries.read(folder)
    with pytest.raises(UnsafeFileError, match=r"is a pickle.*convert"):
        dictionaries.read(folder / "ae.pt")

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"W_enc": Harm()}, folder / "ae.pt")
    with pytest.raises(UnsafeFileError, match="holds more than tensors"):
        dictionaries.convert(folder)
    assert not (tmp_path / "harm").exists()


def test_what_is_not_there_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DictionaryError, match=r"there is no .*nowhere.*holds: empty/"):
        dictionaries.read(tmp_path / "nowhere")
    with pytest.raises(DictionaryError, match=r"no dictionary of a layout that is known.*Layouts: saelens"):
        dictionaries.read(tmp_path / "empty")
    other = ms.store.save(tmp_path / "other.safetensors", "edge-scores", {"x": torch.zeros(2)}, {})
    with pytest.raises(DictionaryError, match="another kind"):
        recognise(other)
