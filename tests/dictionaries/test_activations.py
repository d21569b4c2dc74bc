"""The activation store: what is in it, how it is read, what becomes of a kill, a flipped byte and a shard cut short."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mechscope as ms
from dictionaries import filling
from dictionaries.filling import OPTIONS, SITES
from mechscope.dictionaries.activations import Activations, store_activations
from mechscope.models.token_mask import TokenMask


@pytest.fixture(scope="module")
def model_and_ids():
    return filling.made()


@pytest.fixture(scope="module")
def filled(model_and_ids, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    store_activations(*model_and_ids, SITES, folder, **OPTIONS)
    return folder


@pytest.fixture
def copy(filled, tmp_path) -> Path:
    """This is a store of one's own to damage."""
    for path in filled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def streamed(model, ids, **changed):
    options = {name: value for name, value in {**OPTIONS, **changed}.items() if name != "shard_bytes"}
    batches = list(model.stream(ids, SITES, **options))
    return {site: torch.cat([batch[site] for batch in batches]) for site in SITES}


# What is in it


def test_a_store_holds_what_the_stream_gives_in_shards(model_and_ids, filled):
    store, expected = Activations(filled), streamed(*model_and_ids)
    assert all(torch.equal(store[[-1, 3]][site], x[[-1, 3]]) for site, x in expected.items())
    assert len(store) == len(expected[SITES[0]]) and len(store.shards) >= 4
    assert all(torch.equal(x, expected[site]) for site, x in store[:].items())
    assert all((filled / shard["file"]).stat().st_size < 7_000 for shard in store.shards)
    assert store.widths == {SITES[0]: 32, SITES[1]: 32} and store.sites == SITES and store.dtype == torch.float32
    assert sorted(path.name for path in filled.iterdir()) == [
        "index.json",
        *(f"shard-{i:05d}.safetensors" for i in range(len(store.shards))),
    ]


def test_the_header_says_what_made_it(model_and_ids, filled):
    model, ids = model_and_ids
    store = Activations(filled)
    assert store.weights == model.weights_hash() and store.model == model.name
    stream = model.stream(ids, SITES, batch=2, seed=5, mask=OPTIONS["mask"])
    next(stream)
    assert store.mask == stream.mask and store.mask.medians.keys() == set(SITES)
    norms = store[:][SITES[0]].norm(dim=1)
    assert store.norms[SITES[0]] == {
        "mean": pytest.approx(norms.mean().item(), rel=1e-5),
        "rms": pytest.approx(norms.square().mean().sqrt().item(), rel=1e-5),
        "largest": pytest.approx(norms.max().item()),
    }
    assert "all tokens but special tokens; the first 1 of a row; norms above 1.5 medians" in repr(store)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_is_a_cast(model_and_ids, filled, tmp_path, name):
    small = store_activations(*model_and_ids, SITES, tmp_path, dtype=name, **OPTIONS)
    dtype = getattr(torch, name)
    assert small.dtype == dtype and len(small.shards) < len(Activations(filled).shards)
    assert all(torch.equal(small[:][site], x.to(dtype)) for site, x in Activations(filled)[:].items())
    batch = next(small.batches(8))[SITES[0]]
    assert batch.dtype == torch.float32 and torch.equal(batch, batch.to(dtype).float())


def test_so_many_vectors_and_one_site(model_and_ids, tmp_path):
    model, ids = model_and_ids
    store = store_activations(model, ids, SITES[1], tmp_path, vectors=100, shard_bytes="4.1 KB")
    assert len(store) == 100 and [shard["vectors"] for shard in store.shards] == [32, 32, 32, 4]
    assert torch.equal(store[:][SITES[1]], torch.cat(list(model.stream(ids, SITES[1])))[:100])
    assert next(store.batches(7)).shape == (7, 32)


# How it is read


def test_an_epoch_is_a_permutation_of_all_vectors(filled):
    store = Activations(filled)
    everything, n = store[:], len(store)
    one = list(store.batches(50, seed=1, epochs=1))
    assert [len(x[SITES[0]]) for x in one] == [50] * (n // 50) + ([n % 50] if n % 50 else [])
    order = store.batches(n, seed=1).numbers(0, n).long()
    assert order.sort().values.equal(torch.arange(n)) and not order.equal(torch.arange(n))
    for site in SITES:
        assert torch.equal(torch.cat([x[site] for x in one]), everything[site][order])
    orders = [store.batches(n, seed=s).numbers(e * n, (e + 1) * n).tolist() for s in (0, 1) for e in (0, 1)]
    assert len(set(map(tuple, orders))) == 4, "every seed and every epoch has an order of its own"


def test_neighbours_in_a_batch_come_from_one_context_as_often_as_chance_has_it(filled):
    store = Activations(filled)
    n, near = len(store), 8
    order = store.batches(n).numbers(0, 40 * n).long()
    share = ((order[1:] - order[:-1]).abs() < near).float().mean().item()
    chance = sum(2 * (n - d) for d in range(1, near)) / (n * (n - 1))
    assert abs(share - chance) < 4 * (chance / (40 * n)) ** 0.5


def test_batches_without_end_lie_across_epochs(filled):
    store = Activations(filled)
    n = len(store)
    batches = list(itertools.islice(store.batches(n - 10, seed=2, at=SITES[0]), 3))
    assert all(x.shape == (n - 10, 32) for x in batches)
    first = torch.cat(batches)[:n]
    assert torch.equal(first.sort(0).values, store[:][SITES[0]].sort(0).values)


@pytest.mark.parametrize("options", [{"epochs": 2}, {}, {"at": SITES[1]}, {"at": [SITES[1]], "dtype": torch.bfloat16}])
def test_resumed_batches_equal_those_never_stopped(filled, options):
    batches, states, given = Activations(filled).batches(70, seed=3, **options), [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(batches.state())))
        given.append(next(batches, None))
    for number in (0, 1, 5, 13, 19):
        again = Activations(filled).batches(70, seed=3, **options).resume(states[number])
        assert same(next(again, None), given[number])
    with pytest.raises(ms.errors.DictionaryError, match="size"):
        Activations(filled).batches(71, seed=3, **options).resume(states[0])


def same(x, y):
    if not isinstance(x, dict):
        return x is y if x is None else torch.equal(x, y)
    return x.keys() == y.keys() and all(torch.equal(x[site], y[site]) for site in x)


# Killed


def test_filling_that_is_killed_ends_with_the_same_bytes(filled, tmp_path):
    """SIGKILL twenty times at random moments; each time it goes on from the last whole shard."""
    command = [sys.executable, str(Path(__file__).with_name("filling.py")), str(tmp_path), "20", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shards = list(map(int, done.stdout.split()))
    assert shards == sorted(shards) and len(set(shards)) > 5, "it never loses a shard, and was killed in between"
    assert contents(tmp_path) == contents(filled)


def test_half_a_store_is_not_read_and_is_gone_on_with(model_and_ids, copy, filled):
    shards = sorted(copy.glob("shard-*"))
    (copy / "index.json").unlink()
    shards[-1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-100])
    (copy / ".shard-00004.safetensors.0a1b2c3d.tmp").write_bytes(b"half")
    (copy / ".tmpAbC123").write_bytes(b"half")
    with pytest.raises(ms.errors.StoreError, match=r"not full yet.*store_activations"):
        Activations(copy)
    calls = []
    store_activations(*model_and_ids, SITES, copy, progress=lambda *x: calls.append(x), **OPTIONS)
    assert contents(copy) == contents(filled)
    assert calls[0][1] == sum(shard["vectors"] for shard in Activations(copy).shards[:3]), "two shards were whole"


# Damaged


def test_a_flipped_byte_anywhere_is_named_and_that_shard_alone_is_made_again(model_and_ids, copy, filled):
    draw, shards = random.Random(0), sorted(copy.glob("shard-*"))
    sizes = [path.stat().st_size for path in shards]
    before = {path.name: path.stat().st_mtime_ns for path in shards}
    for where in [0, 8, 20, 300, -1, *(draw.randrange(sizes[1]) for _ in range(10))]:
        content = bytearray((filled / shards[1].name).read_bytes())
        content[where] ^= 0xFF
        shards[1].write_bytes(content)
        with pytest.raises(ms.errors.StoreError, match=r"shard 1: .*shard-00001\.safetensors"):
            Activations(copy).verify()
        assert list(Activations(copy).damaged()) == [1]
        assert Activations(copy).rebuild(*model_and_ids) == [1]
        assert contents(copy) == contents(filled)
    content = (filled / shards[1].name).read_bytes()
    shards[1].write_bytes(content.replace(rb"\"batch\": 2", rb"\"batch\": 3", 1))  # still JSON, and of the same length
    assert shards[1].read_bytes() != content and list(Activations(copy).damaged()) == [1]
    assert Activations(copy).rebuild(*model_and_ids) == [1]
    after = {path.name: path.stat().st_mtime_ns for path in shards}
    assert [name for name in before if before[name] != after[name]] == [shards[1].name]


def test_a_damaged_shard_is_named_before_it_is_used(copy):
    path = sorted(copy.glob("shard-*"))[2]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ms.errors.StoreError, match=r"shard 2: .*shard-00002\.safetensors.*rebuild\(model, texts\)"):
        next(Activations(copy).batches(500))
    next(Activations(copy, check=False).batches(500))


def test_a_shard_cut_short_or_missing_is_named_and_made_again(model_and_ids, copy, filled):
    shards = sorted(copy.glob("shard-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:1000])
    shards[3].unlink()
    shards[4].write_bytes(b"")
    assert list(Activations(copy).damaged()) == [0, 3, 4]
    with pytest.raises(ms.errors.StoreError, match=r"shard 0: .*1,000 bytes"):
        next(Activations(copy).batches(500))
    with pytest.raises(ms.errors.StoreError, match=r"3 of \d+ shards(.|\n)*shard 3: .*missing"):
        Activations(copy).verify()
    store_activations(*model_and_ids, SITES, copy, **OPTIONS)  # filling a full store again mends it
    assert contents(copy) == contents(filled)


def test_a_changed_index_is_noticed_and_written_anew(model_and_ids, copy, filled):
    path = copy / "index.json"
    path.write_text(path.read_text().replace('"float32"', '"float16"', 1))
    with pytest.raises(ms.errors.StoreError, match="Delete it"):
        Activations(copy)
    path.unlink()
    store_activations(*model_and_ids, SITES, copy, **OPTIONS)
    assert contents(copy) == contents(filled)


# What does not fit


def test_another_question_or_other_texts_are_refused(model_and_ids, copy, tmp_path):
    model, ids = model_and_ids
    for changed, says in (
        ({"at": SITES[0]}, "sites"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"mask": None}, "mask"),
        ({"batch": 3}, "batch"),
    ):
        arguments = {"at": SITES, **OPTIONS, **changed}
        with pytest.raises(ms.errors.DictionaryError, match=f"another question: {says}"):
            store_activations(model, ids, arguments.pop("at"), copy, **arguments)
    with pytest.raises(ms.errors.TokenError, match="not the texts"):
        store_activations(model, ids.flip(1), SITES, copy, **OPTIONS)
    other = ms.load(filling.ARCHITECTURES["gpt2"].make())
    with torch.no_grad():
        next(other.hf.parameters()).add_(1e-3)
    with pytest.raises(ms.errors.DictionaryError, match="weights"):
        store_activations(other, ids, SITES, copy, **OPTIONS)
    (copy / "shard-00005.safetensors").unlink()
    with pytest.raises(ms.errors.DictionaryError, match="other weights"):
        Activations(copy).rebuild(other, ids)
    with pytest.raises(ms.errors.TokenError, match="pass a list"):
        Activations(copy).rebuild(model, iter(["a text"]))
    (copy / "index.json").unlink()
    with pytest.raises(ms.errors.DictionaryError, match="another question: batch"):
        store_activations(model, ids, SITES, copy, **{**OPTIONS, "batch": 3})


def test_what_cannot_be_stored_or_read_is_named(model_and_ids, filled, tmp_path):
    model, ids = model_and_ids
    for arguments, says in (
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"shard_bytes": 100}, "one vector of 256 bytes"),
    ):
        with pytest.raises(ms.errors.DictionaryError, match=says):
            store_activations(model, ids, SITES, tmp_path / "none", **arguments)
    with pytest.raises(ms.errors.StoreError, match="fill it"):
        Activations(tmp_path / "none")
    with pytest.raises(ms.errors.DictionaryError, match=r"blocks\.0\.mlp_out, blocks\.1\.z"):
        Activations(filled).batches(5, at="blocks.2.z")
    with pytest.raises(ms.errors.DictionaryError, match="1 vector or more"):
        Activations(filled).batches(0)
    gain = model.hf.transformer.h[0].mlp.c_proj.weight
    kept = gain.detach().clone()
    with torch.no_grad():
        gain.mul_(1e6)
    with pytest.raises(ms.errors.DictionaryError, match="float16 cannot hold"):
        store_activations(model, ids, SITES[0], tmp_path / "large", dtype="float16")
    with torch.no_grad():
        gain.copy_(kept)
    assert TokenMask.from_json(Activations(filled).header["mask"]) == Activations(filled).mask
