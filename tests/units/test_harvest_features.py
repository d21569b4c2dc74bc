"""The harvest of a dictionary's features: exact, the same after a kill, by name, and with the dictionary's hash."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

import mechscope as ms
from mechscope.models.stream import contexts
from mechscope.units.samples import FEWEST

UnitsError = ms.errors.UnitsError
SITE = "blocks.1.resid_post/sae"
OPTIONS: dict[str, Any] = {"k": 6, "per_range": 3, "context": 12, "batch": 8, "seed": 3}
TABLES = ("examples.parquet", "units.parquet")
LEVELS = (0.5, 0.9, 0.99)

SETUP = """
import mechscope as ms
model = ms.load("grammar")
texts = [pair.clean for pair in ms.tasks.ioi(model.tokenizer, n=40).pairs]
x = next(model.stream(texts, "blocks.1.resid_post", vectors=512))
sae = ms.dictionaries.TopK(model.d_model, 96, k=4, reads="blocks.1.resid_post", writes="blocks.1.resid_post", seed=1)
sae.begin(x, None)
model.attach("blocks.1.resid_post", sae, name="sae")
"""
KILLED = """
import sys
ms.units.harvest(model, texts, sys.argv[1], at="blocks.1.resid_post/sae", k=6, per_range=3, context=12, batch=8, seed=3,
                 save_every=0.0, progress=lambda what, done, of: print(done, flush=True))
"""


@pytest.fixture(scope="module")
def made():
    scope: dict = {}
    exec(SETUP, scope)
    return scope["model"], scope["texts"], scope["sae"]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    model, texts, _ = made
    return ms.units.harvest(model, texts, tmp_path_factory.mktemp("whole"), at=SITE, **OPTIONS)


@pytest.fixture(scope="module")
def plain(made):
    """This is the features [tokens latents] of all tokens that are not special, encoded the plain way."""
    model, texts, sae = made
    special, rows = set(model.tokenizer.all_special_ids), []
    for row in contexts(model, texts, OPTIONS["context"]):
        stream = model.run([row], save="blocks.1.resid_post")["blocks.1.resid_post"][0]
        kept = [i for i, token in enumerate(row) if token not in special]
        rows.append(sae.encode(stream[kept]).detach())
    return rows


def test_every_features_highest_and_facts_are_those_of_encoding_everything(whole, plain):
    acts = torch.cat(plain)
    for latent in range(0, acts.shape[1], 2):
        found = whole.query(f"feature 1.{latent}")
        best = acts[:, latent].sort(descending=True, stable=True).values
        n = min(OPTIONS["k"], int((best > 0).sum()))
        assert len(found.highest) == n, latent
        assert torch.allclose(torch.tensor([e.activation for e in found.highest]), best[:n], atol=1e-4)
        assert found.facts["above_zero"] == pytest.approx(float((acts[:, latent] > 0).float().mean()), abs=1e-6)
        assert found.facts["greatest"] == pytest.approx(float(best[0]), abs=1e-4)
    assert float((acts > 0).float().mean()) < 0.1, "features are sparse"


def test_ranges_are_quantiles_of_where_a_feature_is_on_and_the_lowest_is_where_it_is_off(whole, plain):
    batch = torch.cat(plain[: OPTIONS["batch"]])
    pooled, own = batch[batch > 0], 0
    for latent in range(batch.shape[1]):
        on = batch[:, latent][batch[:, latent] > 0]
        own += len(on) >= FEWEST
        among = (on if len(on) >= FEWEST else pooled).sort().values
        edges = [float(among[max(1, round(level * len(among))) - 1]) for level in LEVELS]
        for example in whole.query(f"{SITE}[{latent}]").drawn:
            low, high = ([0.0, *edges][example.range - 2], [*edges, float("inf")][example.range - 2])
            if example.range == 1:
                assert example.activation == 0.0
            else:
                assert low - 1e-4 <= example.activation <= high + 1e-4 and example.activation > 0
    assert 0 < own < batch.shape[1], "some features have quantiles of their own, some do not"


def test_killed_with_sigkill_it_goes_on_bit_for_bit(made, whole, tmp_path):
    model, texts, _ = made
    process = subprocess.Popen([sys.executable, "-c", SETUP + KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "harvest.json").exists() and (tmp_path / "state.safetensors").exists()
    ms.units.harvest(model, texts, tmp_path, at=SITE, **OPTIONS)
    for table in TABLES:
        assert (tmp_path / table).read_bytes() == (whole.folder / table).read_bytes()


def test_shards_join_to_what_one_pass_makes(made, whole, tmp_path):
    model, texts, _ = made
    for i in range(2):
        ms.units.harvest(model, texts, tmp_path / str(i), at=SITE, **OPTIONS, shard=(i, 2))
    joined = ms.units.join(model, [tmp_path / "1", tmp_path / "0"], tmp_path / "joined")
    assert (joined.folder / "examples.parquet").read_bytes() == (whole.folder / "examples.parquet").read_bytes()


def test_it_records_the_dictionary_and_refuses_to_go_on_with_another(made, whole, tmp_path):
    model, texts, sae = made
    recorded = whole.facts["question"]["model"]["dictionaries"]
    assert recorded == {SITE: model.provenance()["dictionaries"][SITE]}
    ms.units.harvest(model, texts[:4], tmp_path, at="blocks.1.mlp_post", **OPTIONS)
    assert "dictionaries" not in ms.units.Harvest(tmp_path).facts["question"]["model"], "it had no part in this"
    with torch.no_grad():
        before = sae.b_enc.clone()
        sae.b_enc[0] += 1.0
    with pytest.raises(
        UnitsError, match=f"another question \\(model dictionaries {SITE} weights is '{recorded[SITE]['weights']}'"
    ):
        ms.units.harvest(model, texts, whole.folder, at=SITE, **OPTIONS)
    with torch.no_grad():
        sae.b_enc.copy_(before)
    again = ms.units.harvest(model, texts, whole.folder, at=SITE, **OPTIONS)
    assert again.query("feature 1.3") == whole.query("feature 1.3")


def test_a_feature_is_named_by_its_block_where_one_dictionary_is_there(made, whole, tmp_path):
    model, texts, _ = made
    assert whole.query("feature 1.17") == whole.query(f"{SITE}[17]")
    with pytest.raises(UnitsError, match=r"no features of block 2; it has blocks\.1\.resid_post/sae"):
        whole.query("feature 2.17")
    with pytest.raises(UnitsError, match="has 96 units, 0 to 95; there is no 96"):
        whole.query("feature 1.96")
    coder = ms.dictionaries.transcoder(
        "TopK", model.d_model, 64, model.d_model, k=4, reads="blocks.1.ln2", writes="blocks.1.mlp_out"
    )
    site = model.attach("blocks.1.ln2", coder, name="transcoder")
    try:
        both = ms.units.harvest(model, texts[:8], tmp_path, at="blocks.1.*/*", **OPTIONS)
    finally:
        model.detach(site)
    assert set(both.sites) == {SITE, site} == set(both.facts["question"]["model"]["dictionaries"])
    with pytest.raises(UnitsError, match=r"block 1 has 2 dictionaries; type '.*\[5\]' or '.*\[5\]'"):
        both.query("feature 1.5")
    assert both.query(f"{site}[5]").site == site


def test_rows_of_nothing_but_special_tokens_are_passed_by(made, tmp_path):
    model, texts, _ = made
    special = model.tokenizer.bos_token_id
    words = torch.tensor(list(contexts(model, texts, OPTIONS["context"]))[:8])
    ids = torch.full((24, OPTIONS["context"]), special)
    ids[8:16] = words
    found = ms.units.harvest(model, ids, tmp_path / "rows", at=SITE, **OPTIONS, save_every=0.0)
    alone = ms.units.harvest(model, words, tmp_path / "alone", at=SITE, **OPTIONS)
    assert found.facts["tokens"] == alone.facts["tokens"]
    one, other = found.query("feature 1.3"), alone.query("feature 1.3")
    assert one.facts == other.facts and [e.activation for e in one.highest] == [e.activation for e in other.highest]
    with pytest.raises(UnitsError, match="nothing but special tokens"):
        ms.units.harvest(model, ids[:8], tmp_path / "none", at=SITE, **OPTIONS, save_every=0.0)
