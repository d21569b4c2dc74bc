"""`mechscope atlas`: what it writes and prints, its mistakes, and that Ctrl-C goes on where it was."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

import mechscope as ms
from mechscope import cli, units
from mechscope.units.harvesting import Pass

TEXT = "Mary and John went to the store. John gave a drink to Mary.\n\n" * 30


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.progress, "EVERY", 600)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def go(*args: str) -> SimpleNamespace:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.app(["atlas", *map(str, args)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code or 0, out=out, err=err)

    return go


@pytest.fixture
def no_kinds(monkeypatch):
    """What kind each head is takes longest, and where something else is asked it can be left out."""
    monkeypatch.setattr(sys.modules["mechscope.jobs.atlas"], "kinds_of", lambda *_: None)


def test_a_page_a_harvest_and_the_heads_are_written(run, tmp_path):
    done = run("grammar", "--text", "text.txt", "--out", "atlas", "--neurons", "8", "--prompts", "1", "--context", "32")
    assert done.code == 0 and done.out.endswith("atlas/index.html\n"), done.err
    assert "heads of grammar" in done.out and "harvest  atlas/harvest" in done.out
    assert ms.open(tmp_path / "atlas" / "heads.safetensors").provenance["model"] == "grammar"
    page = (tmp_path / "atlas" / "index.html").read_text()
    assert page.startswith("<!doctype html>") and "default-src 'none'" in page
    assert str(units.Harvest(tmp_path / "atlas" / "harvest").query("neuron 1.5")).startswith("blocks.1.mlp_post[5]")


def test_json_names_the_page_and_importance_says_its_cost_first(run):
    options = ("--neurons", "0.3,2.7", "--importance", "zero", "--n", "3", "--context", "16", "--prompts", "1")
    done = run("grammar", "--text", "text.txt", *options, "--json")
    made = json.loads(done.out)
    assert done.code == 0 and made["kind"] == "atlas" and made["page"].endswith("index.html")
    assert "forwards over 16 rows of 16 tokens" in done.err and len(made["importance"]["score"]) == len(made["layers"])


def test_ctrl_c_keeps_the_harvest_and_the_same_command_goes_on(run, tmp_path, monkeypatch, no_kinds):
    command = ("grammar", "--text", "text.txt", "--out", "atlas", "--neurons", "4", "--prompts", "1", "--context", "16")
    see = Pass.see

    def stopping(self, number, *args):
        if number == 1:
            self.save()
            raise KeyboardInterrupt
        see(self, number, *args)

    monkeypatch.setattr(Pass, "see", stopping)
    done = run(*command)
    assert done.code == 130 and "atlas/harvest" in done.err and "goes on from there" in done.err
    monkeypatch.setattr(Pass, "see", see)
    resumed = run(*command)
    assert resumed.code == 0, resumed.err
    whole = run(*(part if part != "atlas" else "other" for part in command))
    assert whole.code == 0
    asked = [units.Harvest(tmp_path / name / "harvest").sql("SELECT * FROM kept") for name in ("atlas", "other")]
    assert asked[0].equals(asked[1])


def test_another_text_is_not_answered_with_the_old_harvest(run, no_kinds):
    options = ("--out", "atlas", "--neurons", "4", "--prompts", "1", "--context", "16")
    assert run("grammar", "--text", "text.txt", "--n", "3", *options).code == 0
    assert run("grammar", "--text", "text.txt", "--n", "3", *options).code == 0
    other = run("grammar", "--text", "text.txt", "--n", "4", *options)
    assert other.code == 2 and "another text" in other.err and "--out DIR" in other.err


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (("--text", "nothing.txt"), ["nothing.txt", "--text FILE"]),
        (("--text", "text.txt", "--neurons", "many"), ["--neurons many", "3.217"]),
        (("--text", "text.txt", "--neurons", "1.99999", "--prompts", "1"), ["there is no 99999"]),
        (("--text", "text.txt", "--importance", "men"), ["'men'", "mean, zero, resample"]),
        (("--text", "text.txt", "--neurons", "1000000"), ["1,000,000 cards are too many"]),
    ],
)
def test_mistakes_are_one_message_that_says_what_to_type(args, wanted, run, no_kinds):
    done = run("grammar", *args, "--context", "32")
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    for part in wanted:
        assert part in done.err
