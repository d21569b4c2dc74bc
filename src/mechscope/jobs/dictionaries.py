"""Dictionaries of a model: autoencoders and transcoders for any of its sites, trained together, measured on held text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechscope import dictionaries as room
from mechscope import store
from mechscope.dictionaries import Dictionary
from mechscope.errors import DictionaryError, did_you_mean
from mechscope.jobs.atlas import texts_of
from mechscope.jobs.circuit import Progress, writable
from mechscope.models import Model, load

SITES = ("blocks.*.resid_post", "blocks.*.ln2->blocks.*.mlp_out")
"""What is trained unless told otherwise: autoencoders of the stream after each block, transcoders of each MLP."""

HELD = 10
"""One text in so many is kept from training, to measure on."""


@dataclass(frozen=True)
class Trained:
    """This is what the job leaves: the dictionaries, their folder, and the table of what was measured on held text."""

    folder: Path
    dictionaries: list[Dictionary]
    table: list[dict[str, Any]]


def train_dictionaries(
    model: Model | str,
    text: str | Path,
    out: str | Path,
    sites: Sequence[str] = SITES,
    architecture: str = "TopK",
    latents: int | None = None,
    steps: int = 2000,
    batch: int = 2048,
    context: int = 128,
    every: int = 100,
    n: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Trained:
    """This trains a dictionary for each of `sites` on one pass of the model, and measures them on text held out.

    text: a file; texts are divided by "<|endoftext|>", else by empty lines; `n` takes the first. sites: names or
    wildcards; "A->B" is a transcoder that reads A and writes B. architecture: a class of `ms.dictionaries`, with
    `options` of its own (k=32, l1=4.0). latents: for each dictionary, 16 times the site's width unless given. steps,
    batch: of so many vectors each. every: steps between checkpoints; the same call goes on from the last.

    Raises DictionaryError for an architecture that is not there and for pairs of sites that do not match up.

    >>> train_dictionaries("grammar", "text.txt", "out", ["blocks.1.resid_post"], k=8)  # doctest: +SKIP
    """
    if architecture not in room.ARCHITECTURES:
        near = did_you_mean(architecture, room.ARCHITECTURES)
        raise DictionaryError(f"no architecture {architecture!r}{near}; there are {', '.join(room.ARCHITECTURES)}")
    tell = progress or (lambda stage, done, total: None)
    folder = writable(Path(out).expanduser())
    if isinstance(model, str):
        tell(f"loading {model}", 0, 0)
        model = load(model)
    texts = texts_of(Path(text), n)
    kept = [one for i, one in enumerate(texts) if i % HELD != HELD - 1]
    pairs = [pair for asked in sites for pair in pairs_of(model, asked)]
    make = getattr(room, architecture)
    made = []
    for reads, writes in pairs:
        width = width_of(model, reads)
        d_out = {} if reads == writes else {"d_out": width_of(model, writes)}
        made.append(make(width, latents or 16 * width, **d_out, reads=reads, writes=writes, seed=seed, **options))
    asked = list(dict.fromkeys(site for pair in pairs for site in pair))
    stream = model.stream(
        kept, at=asked, context=context, batch=32, seed=seed, loop=True, vectors=batch, shuffle=8 * batch
    )
    room.train(made, stream, steps=steps, out=folder, every=every, progress=tell)
    return Trained(folder, made, [])


def pairs_of(model: Model, asked: str) -> list[tuple[str, str]]:
    """This is the (reads, writes) that "A->B" or "A" stands for, wildcards matched layer by layer.

    >>> pairs_of(model, "blocks.*.ln2->blocks.*.mlp_out")[0]  # doctest: +SKIP
    ('blocks.0.ln2', 'blocks.0.mlp_out')
    """
    read, _, written = (part.strip() for part in asked.partition("->"))
    reads = [request.key for request in model.resolve(read)]
    writes = [request.key for request in model.resolve(written)] if written else reads
    if [_layer(site) for site in reads] != [_layer(site) for site in writes]:
        raise DictionaryError(
            f"{asked!r} reads {len(reads)} sites and writes {len(writes)}, which do not pair up layer by layer: "
            f"{', '.join(reads)} and {', '.join(writes)}"
        )
    return list(zip(reads, writes))


def width_of(model: Model, site: str) -> int:
    """This is the width of a site's vectors; heads stand side by side."""
    value = model.run([[0, 0]], save=site, stop_at=site)[site]
    return value.shape[-1] * (value.shape[1] if value.dim() == 4 else 1)


def _layer(site: str) -> str:
    found = re.search(r"(.*blocks\.\d+)\.", site)
    return found[1] if found else ""


def written(folder: Path, table: list[dict[str, Any]]) -> Path:
    return store.write_text(folder / "table.json", json.dumps(table, indent=1))
