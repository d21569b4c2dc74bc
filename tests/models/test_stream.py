"""`stream`: activations [n, d] of every token that counts, in contexts of one length, cut, mixed and resumed."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import mechscope as ms
from mechscope.models.stream import size_of
from mechscope.models.token_mask import TokenMask

TEXTS = [
    "the cat saw a bird",
    "it was quiet",
    "a very old dog ran home and then it was quiet again",
    "today the bird ran",
]
AT = "blocks.1.resid_post"


def test_the_stream_is_every_token_of_the_texts_once(words):
    """Contexts: `<s>`, then 6 tokens of the texts joined by `</s>`; special tokens are left out of what is yielded."""
    given = list(words.stream(TEXTS, at=AT, context=7, batch=2))
    ids = [i for text in TEXTS for i in [*words.ids(text)[0][1:], 2]]
    contexts = [[1, *ids[i : i + 6]] for i in range(0, len(ids), 6)]
    expected = []
    for row in contexts:
        values = words.run([row], save=AT)[AT][0]
        expected += [values[i] for i, token in enumerate(row) if token not in (0, 1, 2)]
    assert torch.allclose(torch.cat(given), torch.stack(expected), atol=1e-5)
    assert all(x.dim() == 2 and x.shape[1] == 32 for x in given)


def test_looping_never_ends_and_seeds_shuffle(words):
    once = torch.cat(list(words.stream(TEXTS, at=AT, context=7, batch=2)))
    endless = words.stream(TEXTS, at=AT, context=7, batch=2, loop=True)
    rounds = torch.cat(list(itertools.islice(endless, 6)))
    assert len(rounds) > len(once) and torch.equal(rounds[: len(once)], once)
    a, b, c = (torch.cat(list(words.stream(TEXTS, at=AT, context=7, batch=2, seed=s))) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.allclose(a.sum(0), once.sum(0), atol=1e-3), "a shuffle yields the same tokens"


def test_heads_stand_side_by_side_and_selections_are_kept(words):
    whole = torch.cat(list(words.stream(TEXTS, at="blocks.1.z", context=7)))
    one = torch.cat(list(words.stream(TEXTS, at="blocks.1.z[head=2]", context=7)))
    assert whole.shape[1] == 4 * 8 and torch.equal(one, whole[:, 16:24])


def test_ids_stream_without_a_tokenizer(tiny, ids):
    model = tiny("llama")
    given = torch.cat(list(model.stream(ids, at=AT, batch=2)))
    assert torch.allclose(given, model.run(ids, save=AT)[AT].flatten(0, 1), atol=1e-6)


def test_the_forward_stops_at_the_site(words):
    calls = []
    handle = words.hf.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    list(words.stream(TEXTS, at=AT, context=7))
    handle.remove()
    assert not calls


def test_what_cannot_be_streamed_is_named(words):
    for texts, at, says in (
        ("the cat", AT, r"pass \[text\]"),
        (TEXTS, [], "no site"),
        (TEXTS, "blocks.1.pattern", "tokens"),
        (TEXTS, "blocks.1.resid_post[pos=-1]", "every token"),
        ([], AT, "no text"),
    ):
        with pytest.raises(ms.errors.MechscopeError, match=says):
            next(iter(words.stream(texts, at=at)))
    with pytest.raises(ms.errors.TokenError, match="read once"):
        words.stream((text for text in TEXTS), at=AT, loop=True)


# Several sites

SITES = ["blocks.2.resid_post", "blocks.0.mlp_out", "blocks.1.z"]


def test_several_sites_come_from_one_forward_with_their_rows_aligned(words):
    calls, later = [], []
    handles = [
        words.hf.model.layers[0].register_forward_hook(lambda *_: calls.append(1)),
        words.hf.model.norm.register_forward_hook(lambda *_: later.append(1)),
    ]
    given = list(words.stream(TEXTS, SITES, context=7, batch=2))
    for handle in handles:
        handle.remove()
    assert len(calls) == len(list(words.stream(TEXTS, AT, context=7, batch=2))) and not later
    assert [list(x) for x in given] == [SITES] * len(given), "one dict a forward, in the order asked for"
    for site in SITES:
        alone = list(words.stream(TEXTS, site, context=7, batch=2))
        assert all(torch.equal(x[site], y) for x, y in zip(given, alone, strict=True))


def test_a_wildcard_or_a_list_of_one_yields_a_dict(words):
    assert list(next(words.stream(TEXTS, "blocks.*.resid_post", context=7))) == [
        f"blocks.{i}.resid_post" for i in range(3)
    ]
    assert list(next(words.stream(TEXTS, [AT], context=7))) == [AT]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gptj", "gemma2", "qwen3_moe", "mamba", "t5"])
def test_all_sites_of_an_architecture_stream_together(tiny, ids, name):
    """Also where a block's parts run in another order than they are listed in."""
    model = tiny(name)
    sites = [
        name
        for name, site in model.sites().items()
        if "pos" in site.axes and name not in ("final", "logits") and not name.startswith("decoder.")
    ]
    together = next(model.stream(ids, sites))
    assert list(together) == sites
    for site in sites[:: max(1, len(sites) // 5)]:
        assert torch.equal(together[site], next(model.stream(ids, site))), site


# Batches of one size, mixed in windows


def everything(model, **options):
    return list(model.stream(TEXTS * 3, AT, context=7, batch=2, **options))


def test_vectors_cuts_the_same_row_into_equal_batches(words):
    whole = torch.cat(everything(words))
    for size in (1, 4, 10, 1000):
        cut = everything(words, vectors=size)
        assert torch.equal(torch.cat(cut), whole)
        assert {len(x) for x in cut[:-1]} <= {size} and 0 < len(cut[-1]) <= size


def test_a_window_is_a_permutation_of_its_stretch(words):
    whole = torch.cat(everything(words))
    for shuffle in (12, "1600 B"):  # of 128 bytes each: 12 vectors, which is 3 batches
        mixed = torch.cat(everything(words, vectors=4, shuffle=shuffle))
        orders = []
        for first in range(0, len(whole), 12):
            there, here = whole[first : first + 12], mixed[first : first + 12]
            same = (here[:, None] == there[None]).all(-1)
            assert same.any(1).all() and same.any(0).all()
            orders.append(same.int().argmax(1).tolist())
        assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
        assert torch.equal(mixed, torch.cat(everything(words, vectors=4, shuffle=shuffle))), "by the seed alone"
    assert not torch.equal(mixed, torch.cat(everything(words, vectors=4, shuffle=12, seed=1)))


def test_a_shuffle_larger_than_the_texts_mixes_all_of_them(words):
    """Vectors of one context are next to each other as often as chance has it."""
    ids = torch.arange(3, 35).repeat_interleave(32).view(32, 32)  # every context is one token, 32 times
    given = torch.cat(list(words.stream(ids, "embed", batch=2, vectors=64, shuffle=10_000)))
    beside = (given[1:] == given[:-1]).all(-1).float().mean().item()
    assert len(given) == 1024 and abs(beside - 31 / 1023) < 4 * (0.03 / 1023) ** 0.5


def test_a_looping_stream_never_gives_a_smaller_batch(words):
    rounds = list(itertools.islice(everything_looped(words), 40))
    whole = torch.cat(everything(words))
    assert {len(x) for x in rounds} == {4}
    assert torch.equal(torch.cat(rounds)[: 2 * len(whole)], torch.cat([whole, whole]))


def everything_looped(model):
    return model.stream(TEXTS * 3, AT, context=7, batch=2, loop=True, vectors=4)


# Stopping and going on

CUTS = [
    {},
    {"vectors": 4},
    {"vectors": 4, "shuffle": 12},
    {"vectors": 4, "shuffle": 1000},
    {"vectors": 5, "shuffle": 15, "seed": 3, "loop": True, "mask": TokenMask(first=2, outliers=1.2)},
    {"seed": 3, "loop": True},
]


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("at", [AT, SITES], ids=["one", "several"])
def test_a_resumed_stream_equals_one_that_never_stopped(words, options, at):
    def made():
        return words.stream(TEXTS * 3, at, context=7, batch=2, **options)

    stream, states, batches = made(), [], []
    for _ in range(24):
        states.append(json.loads(json.dumps(stream.state())))
        batch = next(stream, None)
        if batch is None:
            break
        batches.append(batch)
    assert len(batches) >= 3
    for number, state in enumerate(states):
        rest = list(itertools.islice(made().resume(state), len(batches) - number))
        assert len(rest) == len(batches) - number
        for x, y in zip(rest, batches[number:], strict=True):
            assert same(x, y)
    again = stream.resume(states[1])  # the same stream, back again
    assert same(next(again), batches[1]) and again.state() == states[2]


def same(x, y):
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else all(torch.equal(x[site], y[site]) for site in y)


def test_resuming_runs_the_current_window_alone(words):
    def made():
        return words.stream(TEXTS * 12, AT, context=7, batch=1, vectors=4, shuffle=12)

    stream = made()
    for _ in range(14):
        next(stream)
    calls = []
    handle = words.hf.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    next(made().resume(stream.state()))
    handle.remove()
    assert len(calls) <= 4, "12 vectors, from contexts of at most 6"


def test_a_text_that_is_cut_is_gone_on_with_inside(words):
    long = [" ".join(["the cat saw a bird and then it ran home"] * 20)]
    stream = words.stream(long, AT, context=7, batch=1, vectors=6)
    first = list(stream)
    for at in (3, 17):
        again = words.stream(long, AT, context=7, batch=1, vectors=6)
        for _ in range(at):
            next(again)
        rest = list(words.stream(long, AT, context=7, batch=1, vectors=6).resume(again.state()))
        assert all(torch.equal(x, y) for x, y in zip(rest, first[at:], strict=True))


def test_a_file_streams_a_text_a_line_and_resumes(words, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    whole = list(words.stream(TEXTS, AT, context=7, batch=1))
    stream = words.stream(path, AT, context=7, batch=1)
    assert torch.equal(next(stream), whole[0])
    rest = list(words.stream(path, AT, context=7, batch=1).resume(stream.state()))
    assert all(torch.equal(x, y) for x, y in zip(rest, whole[1:], strict=True))


def test_a_resume_that_cannot_be_right_is_refused(words, tiny):
    stream = words.stream(TEXTS, AT, context=7, batch=1, vectors=4)
    list(itertools.islice(stream, 2))
    state = stream.state()
    with pytest.raises(ms.errors.TokenError, match=r"vectors=4.*vectors=5"):
        words.stream(TEXTS, AT, context=7, batch=1, vectors=5).resume(state)
    with pytest.raises(ms.errors.TokenError, match="sites"):
        words.stream(TEXTS, [AT, "embed"], context=7, batch=1, vectors=4).resume(state)
    with pytest.raises(ms.errors.TokenError, match="weights"):
        other = ms.load(tiny("gpt2").hf, words.tokenizer)
        other.stream(TEXTS, AT, context=7, batch=1, vectors=4).resume(state)
    with pytest.raises(ms.errors.TokenError, match="not the texts"):
        next(words.stream(TEXTS[::-1], AT, context=7, batch=1, vectors=4).resume(state))
    once = words.stream(iter(TEXTS), AT, context=7, batch=1, vectors=4)
    list(itertools.islice(once, 2))
    assert once.state() == state
    with pytest.raises(ms.errors.TokenError, match="pass a list, the Path of a file"):
        once.resume(state)
    fresh = words.stream(iter(TEXTS), AT, context=7, batch=1, vectors=4).resume(state)
    assert torch.equal(next(fresh), next(stream)), "an iterator made anew is read from its beginning"


def test_an_interrupted_batch_is_given_after_all(words):
    whole = everything(words, vectors=20)
    stream = words.stream(TEXTS * 3, AT, context=7, batch=2, vectors=20)
    next(stream)
    before, calls = stream.state(), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = words.hf.model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    handle.remove()
    assert stream.state() == before
    assert all(torch.equal(x, y) for x, y in zip(stream, whole[1:], strict=True))


def test_what_a_window_cannot_be_is_named(words):
    for options, says in (
        ({"shuffle": 12}, "vectors=4096"),
        ({"vectors": 0}, "1 vector or more"),
        ({"vectors": 8, "shuffle": 7}, "less than one batch"),
        ({"vectors": 8, "shuffle": "1 KB"}, "0.001024 MB"),
        ({"vectors": 8, "shuffle": "lots"}, "as in '2 GB'"),
        ({"mask": TokenMask(first=1000)}, "no token of the texts counts"),
        ({"mask": TokenMask(first=1000, outliers=3)}, "no token of the first batch counts"),
        ({"mask": TokenMask(special_ids=(7,))}, "another"),
    ):
        with pytest.raises(ms.errors.TokenError, match=says):
            next(words.stream(TEXTS, AT, context=7, **options))
    with pytest.raises(ms.errors.TokenError, match="no room"):
        next(words.stream(TEXTS, AT, context=1))
    assert size_of("2 GB") == 2 * 10**9 and size_of("512MiB") == 512 * 2**20
