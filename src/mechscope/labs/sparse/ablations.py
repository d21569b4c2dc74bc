"""The command `python -m mechscope.labs.sparse.ablations`: which choices in training a dictionary matter, one by one.

Each row changes one thing of a run whose answer is known (F-SAE: independent atoms, more latents than atoms) and gives
what it costs or gains. What is expected is written down first, as orderings, each of which holds or does not:

    encoder started at the decoder's transpose      fewer dead latents than an encoder of its own
    b_dec started at the data's mean                lower FVU than at 0, where the data has a mean
    a warm-up of the penalty                        fewer dead latents than the full penalty at once
    a warm-up of the rate                           no worse
    dead latents resampled, or an auxiliary loss    fewer dead latents than neither
    a lower sparsity                                lower FVU: the penalty's price

Source: Conerly et al. 2025, "Dictionary Learning Optimization Techniques", Transformer Circuits, January update;
Bricken et al. 2023 (resampling); Gao et al. 2024, arXiv:2406.04093, appendix A (the auxiliary loss, tied start).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mechscope import dictionaries
from mechscope.dictionaries import Coder, evaluating
from mechscope.dictionaries.callbacks import resample
from mechscope.dictionaries.evaluating.recovery import matched_cosine
from mechscope.labs.sparse.generator import Sparse

D, ATOMS, LATENTS, ACTIVE = 32, 32, 64, 2
BATCH, RATE = 256, 5e-3
OFFSET = 2.0
"""How far from 0 the data's mean is, in units of a vector's norm: what b_dec is for."""

HELD = 10**6
DEAD = 2000
"""Examples without firing after which a latent is dead: a few batches, as the run is short."""


class Row(NamedTuple):
    """This is a run: the family of rows it is compared in, what it does, and what came of it."""

    family: str
    name: str
    fvu: float
    l0: float
    dead: float
    matched: float
