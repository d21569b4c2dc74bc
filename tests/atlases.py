"""Random narrow models and their atlases: what atlas tests look at.

A small one, whose every number is held against the model's, and one of GPT-2-small's layers and heads, to be drawn.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import mechscope as ms
from mechscope import jobs

CONTEXT = 48
TEXT = torch.randint(3, 160, (20, CONTEXT), generator=torch.Generator().manual_seed(0))


@functools.cache
def gpt2_shape(layers: int = 12, heads: int = 12) -> ms.Model:
    torch.manual_seed(0)
    config = GPT2Config(
        bos_token_id=0, eos_token_id=0, n_layer=layers, n_head=heads, n_embd=heads * 4, n_positions=160, vocab_size=160
    )
    config.initializer_range = 0.2
    return ms.load(GPT2LMHeadModel(config).eval())


@functools.cache
def made() -> jobs.Atlas:
    """This is the atlas of 12 layers of 12 heads: 24 neurons, a row of text and one repeated; made once.

    Its importance is drawn, not measured, which would take as long as all else.
    """
    atlas = jobs.atlas(gpt2_shape(), TEXT, _folder(), 24, 1, context=CONTEXT)
    draw = random.Random(0)
    score = [[draw.gauss(0.01, 0.02) for _ in range(12)] for _ in range(12)]
    ends = {"low": [[x - 0.01 for x in row] for row in score], "high": [[x + 0.01 for x in row] for row in score]}
    atlas.document["importance"] = {"about": "Drawn for a test.", "base": 5.0, "score": score, **ends}
    return atlas


@functools.cache
def made_small() -> jobs.Atlas:
    """This is the atlas of 4 layers of 4 heads: as the other, two rows of text, importance measured on 4 rows."""
    return jobs.atlas(gpt2_shape(4, 4), TEXT, _folder(), 24, 2, "mean", context=CONTEXT, rows=4)


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mechscope-atlas-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
