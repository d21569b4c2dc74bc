"""Two processes train as one: the same dictionary, from uneven data too; who is late is named; latents can be split."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mechscope as ms

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def launched(out: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, str(HERE / "together.py"), str(out), how],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def trained(tmp_path: Path, how: str):
    out = tmp_path / f"{how}.safetensors"
    done = launched(out, how)
    assert out.is_file(), done.stderr[-2000:]
    return ms.open(out)


def far(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("how", ["even", "latents"])
def test_two_processes_learn_what_one_does(tmp_path, how):
    from together import alone, fresh

    whole = alone()
    both = trained(tmp_path, how)
    assert far(whole, both) < 2e-4
    assert far(whole, fresh()) > 0.05  # the control: an untrained one is far
    assert torch.equal(whole.idle, both.idle)


def test_data_that_ends_early_on_one_process_ends_nothing(tmp_path):
    from together import alone, uneven

    assert far(alone(uneven), trained(tmp_path, "uneven")) < 2e-4


def test_a_process_that_is_late_is_named(tmp_path):
    out = tmp_path / "late.safetensors"
    launched(out, "late")
    assert not out.is_file()
    said = (tmp_path / "late.0.txt").read_text()
    assert "waited 5 s at step 7" in said and "1" in said.split("gave up:")[1]
