"""Reconstruction, sparsity and the life of latents, of dictionaries whose scores are known."""

from __future__ import annotations

import pytest
import torch

import mechscope as ms
from dictionaries import synthetic
from mechscope.dictionaries import BatchTopK, Crosscoder, CrossLayerTranscoder, TopK
from mechscope.dictionaries.evaluating import DictionaryReport, evaluate
from mechscope.errors import DictionaryError

DATA = synthetic.flat()
BATCHES = [DATA.batch(step, 1000).x for step in range(4)]


def test_a_perfect_dictionary_misses_nothing_and_has_the_atoms_sparsity():
    report = evaluate(synthetic.perfect(DATA), BATCHES)
    assert report["fvu"].value < 1e-9 and report["explained variance"].value == pytest.approx(1)
    assert report["L0"].value == pytest.approx(4, abs=0.15)
    assert report["L0"].low < report["L0"].value < report["L0"].high
    assert report["gamma"].value == pytest.approx(1) and report["dead"].value == 0 and report["dense"].value > 0.5


@pytest.mark.parametrize("by", [0.5, 0.8, 1.2])
def test_shrinkage_is_what_it_was_made_to_be(by):
    report = evaluate(synthetic.shrunk(DATA, by), BATCHES)
    assert report["gamma"].value == pytest.approx(by, abs=1e-6)
    x = torch.cat(BATCHES)
    missed = ((1 - by) * x).square().sum() / (x - x.mean(0)).square().sum()
    assert report["fvu"].value == pytest.approx(float(missed), abs=1e-5)
    assert report["explained variance"].value == pytest.approx(1 - (1 - by) ** 2, abs=1e-5)


def test_a_large_mean_hides_shrinkage_from_gamma_but_not_from_gamma_about_the_mean():
    shift = torch.full((DATA.d,), 30.0)
    dictionary = synthetic.shrunk(DATA, 0.8)
    with torch.no_grad():
        dictionary.b_dec.copy_(shift + 0.2 * torch.cat(BATCHES).mean(0))
    dictionary.encode = lambda x: synthetic.ByHand.encode(dictionary, x - shift)  # type: ignore[method-assign]
    report = evaluate(dictionary, [x + shift for x in BATCHES])
    assert report["gamma"].value == pytest.approx(1, abs=0.01)
    assert report["gamma about the mean"].value == pytest.approx(0.8, abs=1e-4)


def test_a_random_dictionary_fails():
    report = evaluate(synthetic.random(DATA), BATCHES)
    assert report["fvu"].value > 0.5


def test_dead_and_dense_latents_are_counted():
    report = evaluate(synthetic.padded(DATA, dead=8, dense=4), BATCHES)
    assert report["dead"].value == pytest.approx(8 / 44) and report["dead"].low < 8 / 44 < report["dead"].high
    density = report.tensors["density"]
    assert (density == 0).sum() == 8 and (density == 1).sum() == 4
    assert report.tensors["histogram"].sum() == 36 and report.tensors["histogram"][-1] >= 4


def test_the_pass_equals_the_formulas_however_rows_are_batched():
    dictionary = TopK(64, 96, k=4)
    x = torch.cat(BATCHES) + 5
    y = dictionary(x).output.detach()
    fvu = (x - y).square().sum() / (x - x.mean(0)).square().sum()
    for size in (7, 1000, 4000):
        report = evaluate(dictionary, x.split(size))
        assert report["fvu"].value == pytest.approx(float(fvu), rel=1e-4)
        assert report["explained variance"].value == pytest.approx(
            float(1 - (x - y).var(0).sum() / x.var(0).sum()), abs=1e-4
        )
        assert report["gamma"].value == pytest.approx(float(y.square().sum() / (x * y).sum()), rel=1e-4)


def test_intervals_cover_and_narrow():
    one = evaluate(synthetic.random(DATA), BATCHES[:2])["fvu"]
    many = evaluate(synthetic.random(DATA), [DATA.batch(step, 1000).x for step in range(40)])["fvu"]
    assert one.low < many.value < one.high
    assert many.high - many.low < one.high - one.low


def test_several_dictionaries_share_one_pass_and_an_endless_stream_is_cut():
    several = [synthetic.perfect(DATA), synthetic.random(DATA)]
    good, bad = evaluate(several, DATA.stream(500), steps=3)
    assert good.choices["vectors"] == "1,500" and good["fvu"].value < bad["fvu"].value


def test_a_transcoder_is_judged_on_what_it_writes():
    transcoder = TopK(64, 16, d_out=12, k=2, reads="in", writes="out")
    x, y = torch.randn(500, 64), torch.randn(500, 12)
    by_site = evaluate(transcoder, [{"in": x, "out": y}])
    assert by_site["fvu"].value == evaluate(transcoder, [(x, y)])["fvu"].value
    assert "in -> out" in by_site.question


def test_dictionaries_of_several_sites_and_batches_of_positions_are_read_as_they_come():
    x = torch.randn(300, 2, 8)
    assert evaluate(Crosscoder(2, 8, 32, k=4), [x])["fvu"].value > 0
    layers = CrossLayerTranscoder(2, 8, 16, architecture="TopK", k=2)
    assert evaluate(layers, [(x, x)])["L0"].value <= 4
    plain = TopK(8, 16, k=2)
    assert evaluate(plain, [x])["fvu"].value == evaluate(plain, [x.flatten(0, 1)])["fvu"].value


def test_latents_are_chosen_as_in_use_and_training_goes_on_as_it_was():
    dictionary = BatchTopK(64, 96, k=4).train()
    dictionary.threshold.fill_(1e9)
    assert evaluate(dictionary, BATCHES)["L0"].value == 0
    assert dictionary.training


def test_a_report_is_saved_read_and_printed(tmp_path):
    report = evaluate(synthetic.perfect(DATA), BATCHES)
    again = ms.open(report.save(tmp_path / "report.safetensors"))
    assert isinstance(again, DictionaryReport) and str(again) == str(report)
    assert torch.equal(again.tensors["density"], report.tensors["density"])
    assert list(again.to_frame()["name"])[:2] == ["fvu", "explained variance"]
    assert "fvu" in str(report) and "gamma" in str(report)


def test_the_report_fits_the_page():
    from mechscope.viz.documents import to_view

    report = evaluate(synthetic.perfect(DATA), BATCHES)
    assert to_view(report)


def test_what_cannot_be_evaluated_is_refused():
    with pytest.raises(DictionaryError, match="nothing to evaluate"):
        evaluate(synthetic.perfect(DATA), [])
    with pytest.raises(DictionaryError, match="width 64"):
        evaluate(TopK(64, 16), [torch.zeros(4, 7)])
    with pytest.raises(DictionaryError, match="to compare with"):
        evaluate(TopK(64, 16, d_out=12), [torch.zeros(4, 64)])
    with pytest.raises(DictionaryError, match="did you mean 'gamma'"):
        evaluate(synthetic.perfect(DATA), BATCHES)["gama"]
