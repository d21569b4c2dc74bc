"""Two processes train as one: the same dictionary, from uneven data too; who is late is named; latents can be split."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mechscope as ms
from dictionaries.together import alone, fresh, uneven

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, str]:
    """The folder of what two processes made in every way, one after the other, and what they printed."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(HERE / "together.py"), str(folder), "even", "latents", "uneven", "late"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    return folder, done.stderr[-2000:]


def trained(launched: tuple[Path, str], how: str):
    folder, printed = launched
    out = folder / f"{how}.safetensors"
    said = [path.read_text() for path in folder.glob(f"{how}.*.txt")]
    assert out.is_file(), said or printed
    return ms.open(out)


def far(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("how", ["even", "latents"])
def test_two_processes_learn_what_one_does(launched, how):
    whole = alone()
    both = trained(launched, how)
    assert far(whole, both) < 2e-4
    assert far(whole, fresh()) > 0.05  # the control: an untrained one is far
    assert torch.equal(whole.idle, both.idle)


def test_data_that_ends_early_on_one_process_ends_nothing(launched):
    assert far(alone(uneven), trained(launched, "uneven")) < 2e-4


def test_a_process_that_is_late_is_named(launched):
    folder, printed = launched
    assert not (folder / "late.safetensors").is_file()
    assert (folder / "late.0.txt").is_file(), printed
    said = (folder / "late.0.txt").read_text()
    assert "waited 5 s at step 7" in said and "1" in said.split("gave up:")[1]
