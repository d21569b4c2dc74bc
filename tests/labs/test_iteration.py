"""The laboratory of iteration heads: its chains by hand, its run continued, its evidence and the controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechscope.errors import MechscopeError
from mechscope.labs import shelf
from mechscope.labs.iteration import TASKS, chains, lab, train
from mechscope.units import iteration_heads

TINY = train.Recipe(steps=6, rows=8, longest=4, modulus=5, d_model=8, d_mlp=8, warmup=2)


def by_hand(task: str, inputs: list[int], modulus: int) -> list[int]:
    state, states = 0, []
    for x in inputs:
        state = {"copy": x, "parity": (state + x) % 2, "polynomial": (state * x + 1) % modulus}[task]
        states.append(state)
    return states


@pytest.mark.parametrize("task", TASKS)
def test_every_state_follows_from_the_one_before_and_the_next_input(task):
    made = chains(task, 40, longest=6, modulus=7, generator=torch.Generator().manual_seed(0))
    for row, targets, n in zip(made.ids.tolist(), made.targets.tolist(), made.lengths.tolist()):
        states = by_hand(task, row[:n], 7)
        assert row[n] == 7 and row[n + 1 : 2 * n] == states[:-1]
        assert targets == [-100] * n + states + [-100] * (12 - 2 * n)
    assert set(made.lengths.tolist()) == set(range(1, 7))
    assert [len(row) for row in made.rows()] == [2 * n for n in made.lengths.tolist()]


def test_inputs_that_are_held_out_are_never_trained_on():
    def inputs(held_out: bool, n: int) -> set[tuple[int, ...]]:
        made = chains("parity", n, 6, 7, torch.Generator().manual_seed(1), held_out, shortest=4)
        return {tuple(row[: int(length)]) for row, length in zip(made.ids.tolist(), made.lengths)}

    kept, rest = inputs(False, 4000), inputs(True, 400)
    assert not kept & rest and len(kept | rest) == 2**4 + 2**5 + 2**6 and 0.1 < len(rest) / 112 < 0.3


def test_a_stopped_run_continues_with_the_same_numbers(tmp_path):
    whole, _ = train.train(TINY, tmp_path / "whole")
    train.train(TINY, tmp_path / "parts", stop_after=3)
    parts, progress = train.train(TINY, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert 0.0 <= progress.figures[-1]["right"] <= 1.0
    assert train.steps_until(progress, 0.0) == 6 and train.steps_until(progress, 1.1) == 7
    with pytest.raises(MechscopeError, match="another recipe"):
        train.train(replace(TINY, seed=1), tmp_path / "parts")


def test_a_run_begins_with_the_weights_of_another_task(tmp_path):
    start, _ = train.train(replace(TINY, task="copy"), tmp_path / "copy")
    after = replace(TINY, task="parity", start="copy", lr=0.0)
    model, _ = train.train(after, tmp_path / "parity", start)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters()))
    assert after.name == "parity from copy, seed 0"


def test_the_shipped_model_iterates_by_a_head_that_the_twin_lacks_and_skills_transfer():
    facts = list(lab.check())
    assert len(facts) >= 11 and all(fact.holds for fact in facts), [str(fact) for fact in facts if not fact.holds]


def test_what_the_heads_fetch_is_what_the_states_need():
    model, made = shelf.load(lab.NAME), lab.tried(lab.recipe(), 128)
    found = iteration_heads(model, made.rows(), made.lengths.tolist())["iteration"]
    without = {f"blocks.{layer}.z[head={head}]": 0.0 for layer, head in found.heads}
    others = [(a, b) for a in range(2) for b in range(2) if (a, b) not in found.heads]
    right = {}
    for name, edits in (("whole", {}), ("without", without)):
        logits = model.run(made.ids, edits=edits).logits.argmax(-1)
        right[name] = float((logits == made.targets)[made.targets >= 0].float().mean())
    assert right["whole"] > 0.99 and right["without"] < 0.6 and others


def test_a_slower_transfer_or_a_wrong_chain_is_no_evidence():
    runs = lab.made()["runs"]
    slow = {name: {**run, "steps": 1200} if "from" in name else run for name, run in runs.items()}
    assert not all(fact.holds for fact in lab.transfer_facts(slow))
    wrong = {name: {**run, "right": 0.5} for name, run in runs.items()}
    assert sum(not fact.holds for fact in lab.transfer_facts(wrong)) >= 3


def test_the_shipped_model_is_small_and_says_how_it_was_made():
    made = lab.made()
    assert made["command"] == "python -m mechscope.labs.iteration --ship" and made["recipe"] == lab.recipe().to_dict()
    assert sum(file.stat().st_size for file in (shelf.ZOO / lab.NAME).iterdir()) < 300_000
