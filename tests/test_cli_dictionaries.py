"""The command that trains dictionaries: from a model and a text to files, a table and a page."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

import mechscope as ms
from mechscope.cli import app
from mechscope.jobs.dictionaries import pairs_of

OPTIONS = ["--latents", "256", "--k", "4", "--steps", "30", "--batch", "256", "--context", "16"]
SITES = ["--at", "blocks.1.resid_post", "--at", "blocks.1.ln2->blocks.1.mlp_out"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    tokenizer = ms.load("grammar").tokenizer
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(pair.clean for pair in ms.tasks.ioi(tokenizer, n=600).pairs))
    return file


@pytest.fixture(scope="module")
def ran(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, CliRunner().invoke(
        app, ["dictionaries", "grammar", "--text", str(text), "--out", str(out), *SITES, *OPTIONS]
    )


def test_it_leaves_dictionaries_a_table_and_a_page(ran):
    out, result = ran
    assert result.exit_code == 0, result.output
    sae = ms.open(out / "blocks.1.resid_post" / "dictionary.safetensors")
    transcoder = ms.open(out / "blocks.1.mlp_out" / "dictionary.safetensors")
    assert (sae.reads, sae.writes) == ("blocks.1.resid_post",) * 2
    assert (transcoder.reads, transcoder.writes) == ("blocks.1.ln2", "blocks.1.mlp_out")
    assert sae.facts["model"] == "grammar" and sae.facts["mask"]["special"] is True
    assert "±" in result.output and "untrained" in result.output
    assert result.output.strip().endswith("index.html")
    page = (out / "index.html").read_text()
    assert "loss recovered" in page and not re.search(r'(src|href)="https?://', page)


def test_training_beats_its_untrained_twin(ran):
    out, _ = ran
    report = ms.open(out / "report.safetensors")
    label = "blocks.1.resid_post"
    assert report["FVU", label].high < report["FVU", f"{label} (untrained)"].low
    assert report["loss recovered", label].low > report["loss recovered", f"{label} (untrained)"].high


def test_an_ended_run_is_opened(ran, text):
    out, _ = ran
    before = (out / "blocks.1.resid_post" / "dictionary.safetensors").stat().st_mtime_ns
    arguments = ["dictionaries", "grammar", "--text", str(text), "--out", str(out), *SITES, *OPTIONS, "--json"]
    again = CliRunner().invoke(app, arguments)
    assert json.loads(again.stdout)["report"]["kind"] == "score-table"
    assert (out / "blocks.1.resid_post" / "dictionary.safetensors").stat().st_mtime_ns == before


def test_what_cannot_be_trained_is_said(text, tmp_path):
    def said(*arguments: str) -> str:
        command = ["dictionaries", "grammar", "--text", str(text), "--out", str(tmp_path), *arguments]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        return result.output

    assert "did you mean 'TopK'" in said("--architecture", "Topk")
    assert "made and trained in Python" in said("--architecture", "Crosscoder")
    assert "no site 'blocks.1.resid_pots'" in said("--at", "blocks.1.resid_pots")
    assert "do not pair up" in said("--at", "blocks.1.ln2->blocks.*.mlp_out")


def test_pairs_go_layer_by_layer():
    model = ms.load("grammar")
    assert pairs_of(model, "blocks.{0,2}.ln2 -> blocks.{0,2}.mlp_out") == [
        ("blocks.0.ln2", "blocks.0.mlp_out"),
        ("blocks.2.ln2", "blocks.2.mlp_out"),
    ]
