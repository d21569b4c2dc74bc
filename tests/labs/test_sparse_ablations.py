"""What is expected of each choice in training a dictionary holds on data whose atoms are known."""

from __future__ import annotations

import pytest
import torch

from mechscope.labs.sparse import ablations


@pytest.fixture(scope="module")
def rows():
    torch.set_num_threads(1)
    return {name: ablations.measured(ablations.RUNS[name], seed=1) for name in ablations.FOUND}


def test_the_choices_rank_as_stated_by_the_atoms_that_they_find(rows):
    found = [rows[name]["matched"] for name in ablations.FOUND]
    assert found == sorted(found, reverse=True) and found[0] > 0.9 and found[-1] < 0.6


def test_an_auxiliary_loss_revives_and_a_wrong_middle_kills(rows):
    dead = {name: row["dead"] for name, row in rows.items()}
    assert dead["TopK, auxiliary loss"] < dead["TopK"] < dead["TopK, b_dec from 0"]


def test_every_ordering_is_of_runs_that_are_made():
    even = {name: {"fvu": 1.0, "L0": 0.0, "dead": 0.0, "matched": 0.0} for name in ablations.RUNS}
    held = {name: holds(even) for name, holds in ablations.ORDERINGS.items()}
    assert [name for name, true in held.items() if true] == [
        "FVU: a warm-up of the penalty costs nothing",
        "FVU: a warm-up of the rate costs nothing",
        "L0: never more than k",
    ]
