"""Transcoders: dictionaries that read one site and write another, so that what an MLP does becomes sparse.

    f = activation(W_enc x + b_enc),   y_hat = f W_dec + b_dec (+ W_skip x),   loss = |y - y_hat|^2 + penalty

Sources: Dunefsky et al. 2024, Transcoders Find Interpretable LLM Feature Circuits, arXiv:2406.11944, section 3; the
skip connection: Paulo et al. 2025, Transcoders Beat Sparse Autoencoders for Interpretability, arXiv:2501.18823.
"""

from __future__ import annotations

from typing import Any

from mechscope.dictionaries.dictionary import Coder
from mechscope.errors import DictionaryError, did_you_mean

KINDS = ("ReLU", "Gated", "TopK", "BatchTopK", "JumpReLU", "PAnnealing", "Matryoshka")


def transcoder(
    architecture: str, d_in: int, n_latents: int, d_out: int, *, skip: bool = False, **options: Any
) -> Coder:
    """This is a dictionary of a named architecture that reads vectors of width d_in and writes others, of width d_out.

    skip: whether W_skip x, which starts at 0, is added to what it writes. options: the architecture's own, and the
    sites: reads="blocks.3.ln2", writes="blocks.3.mlp_out".

    Raises DictionaryError for an architecture that is not there.

    >>> transcoder("TopK", 64, 512, 32, k=8, skip=True).W_skip.shape
    torch.Size([32, 64])
    """
    from mechscope import dictionaries

    if architecture not in KINDS:
        near = did_you_mean(architecture, KINDS)
        raise DictionaryError(f"there are no transcoders of kind {architecture!r}{near}; there are {', '.join(KINDS)}")
    return getattr(dictionaries, architecture)(d_in, n_latents, d_out, skip=skip, **options)
