"""The harvest: exact against sorting everything, the same after kills and over shards, and honest about its folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mechscope as ms
from mechscope.models.stream import contexts
from mechscope.units.highest import Highest
from mechscope.units.samples import Samples, keys

UnitsError = ms.errors.UnitsError
OPTIONS = {"k": 6, "per_range": 3, "context": 12, "batch": 4, "seed": 3}
TABLES = ("examples.parquet", "units.parquet")


@pytest.fixture(scope="module")
def model():
    return ms.load("grammar")


@pytest.fixture(scope="module")
def texts(model):
    task = ms.tasks.ioi(model.tokenizer, n=40)
    return [pair.clean for pair in task.pairs]


@pytest.fixture(scope="module")
def whole(model, texts, tmp_path_factory):
    return ms.units.harvest(model, texts, tmp_path_factory.mktemp("whole"), **OPTIONS)


def everything(model, texts) -> torch.Tensor:
    """This is all activations [tokens units] of block 1's neurons, the plain way."""
    special = set(model.tokenizer.all_special_ids)
    rows = []
    for row in contexts(model, texts, OPTIONS["context"]):
        acts = model.run([row], save="blocks.1.mlp_post")["blocks.1.mlp_post"][0]
        for position, token in enumerate(row):
            if token not in special:
                rows.append(acts[position])
    return torch.stack(rows)


def test_the_highest_are_those_that_sorting_everything_gives(model, texts, whole):
    acts = everything(model, texts)
    for unit in range(0, acts.shape[1], 37):
        found = whole.query(f"neuron 1.{unit}")
        best = acts[:, unit].sort(descending=True, stable=True)
        n = len(found.highest)
        assert n == min(OPTIONS["k"], int((acts[:, unit] > 0).sum()))
        assert torch.allclose(torch.tensor([e.activation for e in found.highest]), best.values[:n], atol=1e-5)
        assert found.facts["tokens"] == len(acts)
        assert found.facts["mean"] == pytest.approx(float(acts[:, unit].mean()), abs=1e-5)
        assert found.facts["spread"] == pytest.approx(float(acts[:, unit].std(unbiased=False)), abs=1e-4)
        assert found.facts["above_zero"] == pytest.approx(float((acts[:, unit] > 0).float().mean()), abs=1e-6)


def test_an_example_keeps_its_text_its_place_and_the_models_loss_there(model, texts, whole):
    rows = list(contexts(model, texts, OPTIONS["context"]))
    for example in whole.query("neuron 1.5").highest[:3]:
        row = rows[example.context]
        out = model.run([row], save="blocks.1.mlp_post")
        assert float(out["blocks.1.mlp_post"][0, example.position, 5]) == pytest.approx(example.activation, abs=1e-5)
        assert example.token == model.strings(row)[example.position]
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(row[1:]), reduction="none")
        assert example.loss == pytest.approx(float(loss[example.position - 1]), abs=1e-4)
    assert example.before.endswith(model.strings(row)[example.position - 1])


def test_samples_are_uniform_within_their_range_and_do_not_depend_on_the_order():
    torch.manual_seed(0)
    acts, where = torch.randn(4000, 3), torch.arange(4000)
    edges = torch.tensor([[-0.5, 1.0]] * 3)
    once, again = Samples(edges, 50, seed=1), Samples(edges, 50, seed=1)
    once.add(acts, where)
    order = torch.randperm(4000)
    for piece in order.split(700):
        again.add(acts[piece], where[piece])
    assert torch.equal(once.where, again.where) and torch.equal(once.values, again.values)
    for unit in range(3):
        inside = ((acts[:, unit] >= -0.5) & (acts[:, unit] < 1.0)).nonzero()[:, 0]
        chosen = inside[keys(inside, 1).argsort()[:50]]
        assert torch.equal(once.where[unit, 1], chosen)
        mean, spread = float(inside.double().mean()), float(inside.double().std()) / 50**0.5
        assert abs(float(chosen.double().mean()) - mean) < 3 * spread
    other = Samples(edges, 50, seed=2)
    other.add(acts, where)
    assert not torch.equal(other.where, once.where), "another seed draws others"


def test_of_equal_activations_the_earlier_is_kept_in_any_batching():
    torch.manual_seed(0)
    acts = torch.randint(-2, 4, (500, 8)).float()
    for size, units in ((500, 8), (64, 8), (7, 8), (500, 1)):
        some = acts[:, :units].clone()
        highest = Highest(units, 10)
        for start in range(0, 500, size):
            highest.add(some[start : start + size], torch.arange(500)[start : start + size])
        assert torch.equal(some, acts[:, :units]), "looking changes nothing"
        for unit in range(units):
            assert torch.equal(highest.where[unit], acts[:, unit].sort(descending=True, stable=True).indices[:10])


def test_what_shards_kept_joins_to_what_one_pass_keeps_though_units_are_rare_or_crowded():
    torch.manual_seed(0)
    rates = torch.tensor([0.0, 0.01, 0.05, 0.5, 1.0, 1.0])
    acts = (torch.rand(720, 6) < rates) * torch.randint(1, 40, (720, 6)).float()
    where = torch.arange(720)
    whole = Highest(6, 5), Samples.of(acts[:60], (0.5, 0.9), 4, seed=1)
    shards = [(Highest(6, 5), Samples(whole[1].edges, 4, seed=1)) for _ in range(3)]
    for number, (piece, places) in enumerate(zip(acts.split(60), where.split(60))):
        for kept in (*whole, *shards[number % 3]):
            kept.add(piece, places)
    for i in (2, 0):
        for kept, other in zip(shards[1], shards[i]):
            kept.join(other)
    for kept, wanted in zip(shards[1], whole):
        assert torch.equal(kept.values, wanted.values) and torch.equal(kept.where, wanted.where)


def test_a_pass_that_is_stopped_anywhere_goes_on_to_the_same_tables(model, texts, whole, tmp_path):
    class Stopped(Exception):
        pass

    def stop_at(tokens):
        def progress(what, done, of):
            if done > tokens:
                raise Stopped

        return progress

    for tokens in (50, 130, 131, 300):
        with pytest.raises(Stopped):
            ms.units.harvest(model, texts, tmp_path, **OPTIONS, save_every=0.0, progress=stop_at(tokens))
    found = ms.units.harvest(model, texts, tmp_path, **OPTIONS)
    for table in TABLES:
        assert (tmp_path / table).read_bytes() == (whole.folder / table).read_bytes()
    assert found.query("neuron 0.3") == whole.query("neuron 0.3")


SCRIPT = """
import sys, mechscope as ms
model = ms.load("grammar")
texts = [pair.clean for pair in ms.tasks.ioi(model.tokenizer, n=40).pairs]
def slowly(what, done, of):
    print(done, flush=True)
ms.units.harvest(model, texts, sys.argv[1], k=6, per_range=3, context=12, batch=4, seed=3, save_every=0.0,
                 progress=slowly)
"""


def test_killed_with_sigkill_it_goes_on_bit_for_bit(model, texts, whole, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "harvest.json").exists()
    with pytest.raises(UnitsError, match="half done"):
        ms.units.Harvest(tmp_path)
    ms.units.harvest(model, texts, tmp_path, **OPTIONS)
    for table in TABLES:
        assert (tmp_path / table).read_bytes() == (whole.folder / table).read_bytes()


def test_shards_join_to_what_one_pass_makes(model, texts, whole, tmp_path):
    for i in range(3):
        ms.units.harvest(model, texts, tmp_path / str(i), **OPTIONS, shard=(i, 3))
    joined = ms.units.join(model, [tmp_path / str(i) for i in (2, 0, 1)], tmp_path / "joined")
    assert (joined.folder / "examples.parquet").read_bytes() == (whole.folder / "examples.parquet").read_bytes()
    assert joined.query("neuron 2.9").highest == whole.query("neuron 2.9").highest
    with pytest.raises(UnitsError, match="3 shards"):
        ms.units.join(model, [tmp_path / "0", tmp_path / "1"], tmp_path / "two")


def test_a_folder_of_something_else_is_refused(model, texts, whole, tmp_path):
    with pytest.raises(UnitsError, match="another question \\(k is 6, not 7\\)"):
        ms.units.harvest(model, texts, whole.folder, **{**OPTIONS, "k": 7})
    with pytest.raises(RuntimeError, match="now"):
        ms.units.harvest(model, texts, tmp_path, **OPTIONS, save_every=0.0, progress=_raise)
    with pytest.raises(UnitsError, match="other texts"):
        ms.units.harvest(model, texts[::-1], tmp_path, **OPTIONS)
    with pytest.raises(UnitsError, match="no text"):
        ms.units.harvest(model, [], tmp_path / "empty", **OPTIONS)
    with pytest.raises(UnitsError, match="one vector"):
        ms.units.harvest(model, texts, tmp_path / "pattern", at="blocks.0.pattern")


def _raise(what, done, of):
    if done > 100:
        raise RuntimeError("now")


def test_a_unit_is_asked_for_by_name_and_the_rest_in_sql(whole):
    with pytest.raises(UnitsError, match="did you mean"):
        whole.query("blocks.1.mlp_psot[3]")
    with pytest.raises(UnitsError, match="there is no 99999"):
        whole.query("1.99999")
    with pytest.raises(UnitsError, match="names no unit"):
        whole.query("the best one")
    with pytest.raises(UnitsError, match="The views and their columns"):
        whole.sql("SELECT nothing FROM examples")
    frame = whole.sql("SELECT site, count(*) AS n FROM units GROUP BY site ORDER BY site")
    assert frame["site"].tolist() == whole.sites
    assert "blocks.1.mlp_post[5]" in str(whole.query("1.5"))


def test_heads_and_streams_can_be_harvested_too(model, texts, tmp_path):
    found = ms.units.harvest(model, texts[:4], tmp_path, at="blocks.1.z", **OPTIONS)
    acts = model.run(texts[0], save="blocks.1.z")["blocks.1.z"]
    assert int(found.sql("SELECT count(*) AS n FROM units")["n"][0]) == acts.shape[1] * acts.shape[3]


def test_the_greatest_of_a_unit_that_is_never_positive_is_negative(model, tmp_path):
    ids = torch.randint(20, 900, (4, 12), generator=torch.Generator().manual_seed(0))
    found = ms.units.harvest(model, ids, tmp_path, at="blocks.1.resid_post", **OPTIONS)
    greatest = torch.tensor(found.sql("SELECT greatest FROM units ORDER BY unit")["greatest"].to_numpy())
    wanted = model.run(ids, save="blocks.1.resid_post")["blocks.1.resid_post"].flatten(0, 1).amax(0)
    assert torch.allclose(greatest.float(), wanted, atol=1e-5) and float(wanted.min()) < 0


def test_memory_does_not_grow_with_the_corpus(model, texts, tmp_path):
    kept = []
    for times in (1, 4):
        folder = tmp_path / str(times)
        ms.units.harvest(model, texts * times, folder, **OPTIONS)
        kept.append((folder / "state.safetensors").stat().st_size)
    assert abs(kept[1] - kept[0]) < 100


def test_example_paths_hold_quotes(model, texts, tmp_path: Path):
    found = ms.units.harvest(model, texts[:3], tmp_path / "it's here", **OPTIONS)
    assert found.query("0.1").facts["tokens"] > 0
