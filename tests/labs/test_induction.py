"""The laboratory of induction: its sequences and measures by hand, its run continued, its evidence and controls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mechscope as ms
from mechscope.errors import MechscopeError
from mechscope.labs import induction, shelf
from mechscope.labs.induction import cut, lab, measures, picture, train
from mechscope.labs.induction.__main__ import kept_steps, main
from mechscope.labs.toy import ToyConfig, ToyTransformer

TINY = train.Recipe(
    steps=8, rows=4, total=16, vocab=24, shortest=3, longest=6, filler=2, d_model=8, n_heads=2, d_head=4, warmup=2
)


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distinct", [False, True])
def test_pieces_come_back_where_they_are_said_to(distinct):
    ids, starts = induction.scattered(50, length=4, copies=3, total=20, vocab=1000, distinct=distinct)
    piece = [ids.gather(1, starts[:, [c]] + torch.arange(4)) for c in range(3)]
    assert torch.equal(piece[0], piece[1]) and torch.equal(piece[1], piece[2])
    assert bool((starts.diff(dim=1) >= 4).all()) and int(starts.max()) <= 16


def test_distinct_rows_have_no_token_twice_but_in_copies():
    ids, _ = induction.scattered(50, length=4, copies=2, total=20, vocab=16, distinct=True)
    assert all(len(set(row)) == 16 for row in ids.tolist())


def test_tiled_rows_repeat_at_their_own_length_after_their_own_filler():
    ids, start, length = induction.tiled(64, 30, 40, (3, 9), 5, torch.Generator().manual_seed(0))
    for row, first, period in zip(ids.tolist(), start.tolist(), length.tolist()):
        assert row[first + period :] == row[first:-period]
        assert len(set(row)) == first + period
    assert set(length.tolist()) == set(range(3, 10)) and set(start.tolist()) == set(range(6))


def test_a_step_announces_what_an_earlier_copy_tells():
    ids, announced = train.batch(TINY, 3)
    for row, told in zip(ids.tolist(), announced.tolist()):
        # Told is each token that was seen before and whose predecessor was too: the copy's first token is not.
        assert told == [i > 0 and row[i] in row[:i] and row[i - 1] in row[: i - 1] for i in range(len(row))]


# --- measures ---------------------------------------------------------------------------------------------------------


def test_scores_are_the_attention_where_an_induction_or_previous_token_head_puts_it():
    ids, starts = induction.scattered(8, length=4, copies=2, total=14, vocab=50, distinct=True)
    pattern = torch.zeros(8, 3, 14, 14)
    for row, (first, again) in enumerate(starts.tolist()):
        for offset in range(3):
            pattern[row, 0, again + offset, first + offset + 1] = 0.75
    pattern[:, 1] = torch.eye(14).roll(-1, 1)  # the position before
    fake = SimpleNamespace(n_layers=1, run=lambda ids, save: {"blocks.0.pattern": pattern})
    torch.testing.assert_close(induction.induction_scores(fake, ids, starts, 4), torch.tensor([[0.75, 0.0, 0.0]]))
    torch.testing.assert_close(induction.previous_token_scores(fake, ids)[0, 1:], torch.tensor([1.0, 0.0]))


def test_composition_is_by_the_input_through_which_a_head_reads_another():
    model = ToyTransformer(ToyConfig(vocab_size=8, hidden_size=32, num_attention_heads=4, head_dim=4))
    writer, reader = model.blocks[0].attn, model.blocks[1].attn
    with torch.no_grad():
        channel = writer.o_proj.weight[:, 4:8]  # what head 1 writes
        reader.k_proj.weight[8:12] = channel.T  # and head 2 reads as key
    scores = {kind: induction.composition(model, kind) for kind in "qkv"}
    assert scores["k"].argmax() == 1 * 4 + 2
    assert scores["k"][1, 2] > 1.5 * scores["k"].flatten().sort().values[-2]
    assert max(scores["q"][1, 2], scores["v"][1, 2]) < 0.7 * scores["k"][1, 2]
    assert float(scores["q"].mean()) == pytest.approx(32**-0.5, rel=0.2)  # random maps


def test_steps_are_chosen_where_the_loss_falls():
    rows = [{"step": s, "loss, second copy": 4.0 if s < 300 else 4 - (s - 300) / 50} for s in range(0, 501, 20)]
    steps = kept_steps(rows, 10)
    assert len(steps) == 10 and steps[0] == 0 and steps[-1] == 500
    assert sum(step >= 300 for step in steps) >= 7


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_continues_with_the_same_numbers(tmp_path):
    whole, progress = train.train(TINY, tmp_path / "whole")
    train.train(TINY, tmp_path / "parts", stop_after=3)
    told: list[int] = []
    parts, again = train.train(TINY, tmp_path / "parts", on_measured=told.append)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert progress.figures == again.figures
    assert told == [4, 5, 6, 7, 8]  # the steps before were kept by the first part
    assert [step for step, _ in lab.kept(tmp_path / "parts")] == TINY.measured()
    with pytest.raises(MechscopeError, match="another recipe"):
        train.train(replace(TINY, seed=1), tmp_path / "parts")


def test_heads_begin_at_a_quarter_of_the_size_of_the_one_before():
    block = train.new_model(train.Recipe()).blocks[1].attn
    for project, dim in ((block.q_proj, 0), (block.o_proj, 1)):
        sizes = project.weight.detach().unflatten(dim, (4, 32)).movedim(dim, 0).flatten(1).std(1)
        torch.testing.assert_close(sizes[1:] / sizes[:-1], torch.full((3,), 0.25), rtol=0.1, atol=0)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    train.train(TINY, tmp_path / "work" / "induction")
    assert main(["--out", str(tmp_path), "--steps", "9"]) == 1
    assert "another recipe" in capsys.readouterr().err


# --- the evidence -----------------------------------------------------------------------------------------------------


def test_the_evidence_holds_on_the_shipped_models_and_not_on_their_controls():
    facts = list(lab.check())
    assert not [str(fact) for fact in facts if not fact.holds]
    assert sum("control" in fact.text for fact in facts) >= 9


def test_what_holds_of_the_model_fails_of_the_control():
    row = measures.measures(shelf.load(lab.NAME), lab.recipe())
    assert not any(fact.holds for fact in lab.absent_facts(row, "two layers"))
    twin = measures.measures(lab.untrained(), lab.recipe())
    assert sum(not fact.holds for fact in lab.formed_facts(twin)) >= 4


def test_a_slow_or_late_course_is_no_phase_change():
    rows = lab.made(lab.NAME)["losses"]
    _, after = lab.pair(rows[-1])
    slow = [{**row, f"induction {after}": row["step"] / rows[-1]["step"]} for row in rows]
    assert [fact.holds for fact in lab.course_facts(slow)][1] is False
    late = [{**row, "in-context score": row["in-context score"] if row["step"] > 650 else 0.0} for row in rows]
    assert [fact.holds for fact in lab.course_facts(late)][2] is False


def test_the_picture_shows_both_runs(tmp_path):
    runs = [lab.made(name)["losses"] for name in (lab.NAME, lab.CONTROL, lab.SMEARED)]
    page = picture.draw(*runs, path=tmp_path / "induction.html").read_text()
    assert "second copy, one layer, smeared keys" in page and "0.0 to 1.0" in page


def test_one_layer_changes_phase_with_smeared_keys_and_without_them_does_not():
    smeared, control = ((lab.made(name)["losses"], shelf.load(name)) for name in (lab.SMEARED, lab.CONTROL))
    rows = measures.measures(smeared[1], lab.recipe(lab.SMEARED))
    assert all(fact.holds for fact in lab.smeared_facts(smeared[0], rows))
    kinds = ms.units.pattern_kinds(smeared[1], rows=12, length=40)
    assert kinds["induction"].heads == [(0, 0)] and kinds["previous-token"].heads == []
    without = measures.measures(control[1], lab.recipe(lab.CONTROL))
    assert [fact.holds for fact in lab.smeared_facts(control[0], without)][:3] == [False] * 3
    # Keys are what is mixed: without the mixing the same weights find nothing.
    model = ms.load(lab.SMEARED)
    with torch.no_grad():
        model.hf.blocks[0].attn.smear.fill_(30.0)
    assert float(ms.units.pattern_kinds(model, rows=12, length=40)["induction"].score.max()) < 0.1


def test_a_smeared_key_is_mixed_with_the_one_before_it():
    module = ToyTransformer(ToyConfig(vocab_size=20, hidden_size=16, num_attention_heads=2, smeared_keys=True)).eval()
    plain = ToyTransformer(ToyConfig(vocab_size=20, hidden_size=16, num_attention_heads=2)).eval()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "smear" not in k})
    with torch.no_grad():
        for block in module.blocks:
            block.attn.smear.fill_(30.0)
    ids = torch.tensor([[3, 5, 7, 9]])
    torch.testing.assert_close(module(ids).logits, plain(ids).logits)
    with torch.no_grad():
        module.blocks[0].attn.smear.fill_(-30.0)
    out, own = (ms.load(one).run(ids, save=["blocks.0.q", "blocks.0.k", "blocks.0.pattern"]) for one in (module, plain))
    shifted = torch.cat([own["blocks.0.k"][:, :, :1], own["blocks.0.k"][:, :, :-1]], 2)
    scores = own["blocks.0.q"] @ shifted.mT * module.blocks[0].attn.scaling
    wanted = scores.masked_fill(~torch.ones(4, 4).tril().bool(), float("-inf")).softmax(-1)
    torch.testing.assert_close(out["blocks.0.pattern"], wanted)


def test_prompts_to_cut_on_end_within_the_second_copy():
    for pair in cut.task(20).pairs:
        clean, (answer,) = list(pair.clean), pair.answers
        assert clean.index(clean[-1]) < len(clean) - 1  # the last token came before
        assert clean[clean.index(clean[-1]) + 1] == answer and answer not in pair.corrupt


def test_kept_checkpoints_are_those_of_the_run():
    found = shelf.steps(lab.NAME)
    if not found:
        pytest.skip("zoo-checkpoints is in the repository only")
    rows = {row["step"]: row for row in lab.made(lab.NAME)["losses"]}
    assert set(found) <= set(rows) and len(found) == 14
    from mechscope import models

    middle = next(step for step in found if rows[step]["loss, second copy"] < 2.0)
    model = models.load(found[middle], dtype=torch.float32)
    row = measures.measures(model, lab.recipe())
    # Half precision moves the loss a little.
    assert row["loss, second copy"] == pytest.approx(rows[middle]["loss, second copy"], abs=0.02)
    size = sum(file.stat().st_size for file in Path(found[0]).parent.rglob("*") if file.is_file())
    assert size < 3e6
    assert json.loads((found[0] / "config.json").read_text())["model_type"] == "mechscope_toy"
