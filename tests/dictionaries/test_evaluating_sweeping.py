"""Sweeps find the true size in a window of penalties; scaling laws find the exponents that were planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechscope.dictionaries import ReLU
from mechscope.dictionaries.evaluating import recovery_sweep, scaling_law
from mechscope.errors import DictionaryError
from mechscope.labs.sparse import Sparse
from mechscope.labs.sparse.plot import heat_map

DATA = Sparse(d=32, n_atoms=32, active=2, seed=1)
SIZES, PENALTIES = [16, 32, 64], [0.1, 2.0, 20.0]


@pytest.fixture(scope="module")
def swept():
    torch.set_num_threads(1)

    # A seed for each size: dictionaries of one seed begin at the same rows, and would agree for that reason alone.
    def make(size: int, l1: float) -> ReLU:
        return ReLU(32, size, l1=l1, seed=size)

    return recovery_sweep(make, DATA.stream(256), SIZES, PENALTIES, atoms=DATA.atoms, steps=300, lr=1e-2)


def test_the_maximum_is_at_the_true_size_in_a_window_of_penalties(swept):
    assert swept["best size"].value == 32 and swept["best penalty"].value == 2.0
    assert swept["matched", "32 at 2"].value > 0.9 > swept["matched", "32 at 0.1"].value
    assert swept["matched", "32 at 20"].value < 0.6
    assert max(swept.tensors["control"].flatten().tolist()) < 0.5 < swept["mmcs", "64 at 2"].value


def test_agreement_with_the_next_size_says_the_same_without_the_truth(swept):
    between = swept.tensors["between"]
    assert between.shape == (2, 3) and int(between[1].argmax()) == 1 and between[1, 1] > 0.9


def test_the_sweep_is_drawn_as_maps(swept, tmp_path):
    drawn = heat_map(swept, tmp_path / "sweep.html").read_text()
    assert all(title in drawn for title in ("matched with true atoms", "with the next larger", "Heatmap".lower()))


def test_a_sweep_that_cannot_be_says_why():
    with pytest.raises(DictionaryError, match="rising sizes"):
        recovery_sweep(lambda n, l1: ReLU(8, n, l1=l1), [], [16, 8], [1.0], atoms=torch.eye(8))


def test_a_law_of_features_and_steps_finds_what_was_planted():
    random = np.random.default_rng(0)
    n, s = (grid.ravel() for grid in np.meshgrid([32, 64, 128, 256, 512], [100, 200, 400, 800]))
    losses = (0.05 + 2 * n**-0.6 + 3 * s**-0.8) * np.exp(0.01 * random.standard_normal(20))
    report = scaling_law({"features": n, "steps": s}, losses, draws=40)
    for name, planted in (("features", 0.6), ("steps", 0.8)):
        found = report["exponent", name]
        assert found.low < planted < found.high and found.high - found.low < 0.5
    assert report["R2"].value > 0.99 and report["foretold"].value < 0.05
    assert report["R2, shuffled"].value < 0.5


def test_too_few_sizes_are_no_law():
    with pytest.raises(DictionaryError, match="needs 4 or more"):
        scaling_law({"features": [1, 2, 3]}, [3.0, 2.0, 1.0])
