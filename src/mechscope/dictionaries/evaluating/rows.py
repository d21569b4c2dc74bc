"""Rows of activations as a dictionary takes them: what it reads and writes of a batch, its features, labels by name.

pair(dictionary, batch)                (x, y) of a tensor, a pair or a mapping from sites
coded(dictionary, x)                   the features and the reconstruction of x
features(dictionary, x)                [n, n_latents], a few rows at a time
reconstructed(dictionary, x)           [n, d_out]
without(dictionary, x, latents)        y with some latents' contributions taken out, the error left in
halves(n)                              rows to choose on and rows to judge on
named(labels)                          {name: [n] bool}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Coder, Dictionary, Features
from mechscope.errors import DictionaryError

ROWS = 1024
"""Rows that are encoded at once."""

Labels = Mapping[str, Tensor] | Tensor
"""Concepts: {name: [n] bool}, or [n, concepts], or [n]."""


def pair(dictionary: Dictionary, batch: Any) -> tuple[Tensor, Tensor]:
    """This is what a dictionary reads and what it should write of a batch: (x, y), the same tensor for an autoencoder.

    batch: a tensor x; (x, y); or {site: tensor}, as for training. Vectors [..., d] become rows [n, d]; those of several
    sites stay [n, sites, d].
    """
    x, y = dictionary.parts(batch)
    y = x if y is None else y
    if isinstance(dictionary, Coder) and x.shape[-1] == dictionary.d_in:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return x, y


@contextmanager
def in_use(dictionary: Dictionary) -> Iterator[None]:
    """This has a dictionary choose its latents as in use, not as in training, where the two differ."""
    training = dictionary.training
    dictionary.eval()
    try:
        yield
    finally:
        dictionary.train(training)


@torch.no_grad()
def coded(dictionary: Dictionary, x: Tensor) -> tuple[Features, Tensor]:
    """This is the features of x, the active ones alone where the dictionary can tell them, and its reconstruction."""
    with in_use(dictionary):
        found = dictionary.active(x) if isinstance(dictionary, Coder) and dictionary.sparse else dictionary.encode(x)
        return found, dictionary.decode(found, x)


def chunks(n: int, size: int = ROWS) -> Iterator[slice]:
    """This is the rows from 0 to n as slices."""
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


@torch.no_grad()
def features(dictionary: Dictionary, x: Tensor, latents: Tensor | None = None) -> Tensor:
    """This is the features of x [n, n_latents], of some latents alone where they are given."""
    with in_use(dictionary):
        parts = [dictionary.encode(x[part]) for part in chunks(len(x))]
    return torch.cat([f if latents is None else f[:, latents] for f in parts])


@torch.no_grad()
def reconstructed(dictionary: Dictionary, x: Tensor) -> Tensor:
    """This is what the dictionary makes of x, [n, d_out]."""
    return torch.cat([coded(dictionary, x[part])[1] for part in chunks(len(x))])


def directions(dictionary: Dictionary) -> Tensor:
    """This is what one unit of each latent adds to the site, [n_latents, d_out], in the site's own units.

    Raises DictionaryError for a dictionary without one decoder, such as a crosscoder: give it one site at a time.
    """
    decoder = getattr(dictionary, "W_dec", None)
    if not isinstance(decoder, Tensor) or decoder.ndim != 2:
        raise DictionaryError(
            f"a {type(dictionary).__name__} has no decoder [n_latents, d_out] whose directions could be compared; "
            "give a dictionary of one site"
        )
    return decoder.detach() / getattr(dictionary, "scale_out", 1.0)


def bias(dictionary: Dictionary) -> Tensor:
    """This is what the dictionary writes when no latent is active, [d_out], in the site's own units."""
    held = getattr(dictionary, "b_dec", None)
    if not isinstance(held, Tensor):
        return torch.zeros(dictionary.d_out)
    return held.detach() / getattr(dictionary, "scale_out", 1.0)


@torch.no_grad()
def without(dictionary: Dictionary, x: Tensor, latents: Tensor, y: Tensor | None = None) -> Tensor:
    """This is y (x unless given) less what `latents` contribute: they are ablated, and the error is kept."""
    y = x if y is None else y
    return y - features(dictionary, x, latents) @ directions(dictionary)[latents]


def halves(n: int, seed: int = 0, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """This is the rows to choose and fit on, and the rows to judge on, drawn at random."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    cut = round(share * n)
    return order[:cut], order[cut:]


def named(labels: Labels, rows: int) -> dict[str, Tensor]:
    """This is concepts by name, each [n] bool. Raises DictionaryError where they are not of as many rows as x."""
    if isinstance(labels, Mapping):
        found = {str(name): torch.as_tensor(held).bool() for name, held in labels.items()}
    else:
        table = labels[:, None] if labels.ndim == 1 else labels
        found = {str(i): table[:, i].bool() for i in range(table.shape[1])}
    for name, held in found.items():
        if held.shape != (rows,):
            raise DictionaryError(
                f"the labels of {name!r} have the shape {list(held.shape)}, there are {rows} rows of activations; "
                "give {name: [n] bool} or [n, concepts]"
            )
    return found


def both(held: Tensor) -> bool:
    """This is whether labels have both kinds of rows, so that a classifier has something to tell apart."""
    return bool(held.any()) and not bool(held.all())


def usable(labels: dict[str, Tensor], parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """This is the concepts that have both kinds of rows in every part. Raises DictionaryError where none has."""
    kept = {name: held for name, held in labels.items() if all(both(held[part]) for part in parts)}
    if not kept:
        raise DictionaryError(
            f"none of {len(labels)} concepts is both present and absent among the rows to choose and to judge on; "
            "give more rows"
        )
    return kept
