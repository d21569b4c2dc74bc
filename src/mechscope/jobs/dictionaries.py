"""Dictionaries of a model: autoencoders and transcoders for any of its sites, trained together, measured on other text.

DIR/blocks.3.resid_post/dictionary.safetensors      one for each site that is written; `ms.open` reads it
DIR/report.safetensors, DIR/index.html              what was measured on text kept from training, and its page
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mechscope import dictionaries as room
from mechscope.dictionaries import Dictionary
from mechscope.dictionaries.evaluating import DictionaryReport
from mechscope.errors import DictionaryError, did_you_mean
from mechscope.jobs.atlas import texts_of
from mechscope.jobs.circuit import Progress, writable
from mechscope.models import Model, load
from mechscope.viz import to_view, write_page

SITES = ("blocks.*.resid_post", "blocks.*.ln2->blocks.*.mlp_out")
"""What is trained unless told otherwise: autoencoders of the stream after each block, transcoders of each MLP."""

HELD = 10
"""One text in so many is kept from training, to measure on."""


COLUMNS = {
    "loss recovered": "loss recovered, mean",
    "FVU": "fvu",
    "KL ratio": "KL ratio, norms kept",
    "dead": "dead",
    "dense": "dense",
    "L0": "L0",
}
"""What the page's table says of each dictionary, and the measures that it is taken from."""


@dataclass(frozen=True)
class Trained:
    """This is what the job leaves: the dictionaries by what they write, what was measured of them, and the page."""

    folder: Path
    dictionaries: list[Dictionary]
    report: DictionaryReport
    page: Path


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
    known = [name for name in room.ARCHITECTURES if _of_one_site(name)]
    if architecture not in known:
        raise DictionaryError(
            f"no architecture {architecture!r} for single sites{did_you_mean(architecture, known)}; there are "
            f"{', '.join(known)}. Others are made and trained in Python: docs/dictionaries.md"
        )
    tell = progress or (lambda stage, done, total: None)
    folder = writable(Path(out).expanduser())
    if isinstance(model, str):
        tell(f"loading {model}", 0, 0)
        model = load(model)
    texts = texts_of(Path(text), n)
    kept = [one for i, one in enumerate(texts) if i % HELD != HELD - 1]
    held = [one for i, one in enumerate(texts) if i % HELD == HELD - 1]
    if not held:
        raise DictionaryError(
            f"{text} has {len(texts)} texts; give at least {HELD}, of which one is kept to measure on"
        )
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
    report = measured(model, made, held, context, seed, tell)
    report.save(folder / "report.safetensors")
    page = write_page(to_view(report), folder / "index.html")
    return Trained(folder, made, report, page)


def measured(
    model: Model,
    dictionaries: Sequence[Dictionary],
    texts: Sequence[str],
    context: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
    rows: int = 64,
) -> DictionaryReport:
    """This measures dictionaries on texts: reconstruction, sparsity, dead latents, and what the model loses.

    rows: of `context` tokens, on which the model runs with each reconstruction in place. Beside each dictionary stands
    its control, an untrained one of the same size and scales.
    """
    tell = progress or (lambda stage, done, total: None)
    asked = list(dict.fromkeys(site for d in dictionaries for site in (d.reads, d.writes) if isinstance(site, str)))
    stream = model.stream(list(texts), at=asked, context=context, batch=32, vectors=4096)
    twins = [untrained(d) for d in dictionaries]
    batches = list(islice(stream, 16))
    for twin in twins:
        twin.begin(*twin.parts(batches[0]))
        twin.eval()
    both = [*dictionaries, *twins]
    tell("measuring reconstruction", 0, 0)
    fits = room.evaluate(both, batches)
    lines: list[room.Measure] = []
    for number, (d, fit) in enumerate(zip(both, fits)):
        tell("measuring what the model loses", number, len(both))
        loss = room.loss_recovered(model, list(texts), d, context=context, limit=rows, seed=seed)
        for column, name in COLUMNS.items():
            found = next(m for m in (*fit.measures, *loss.measures) if m.name == name)
            label = f"{d.reads} -> {d.writes}" if d.writes != d.reads else str(d.reads)
            control = number >= len(dictionaries)
            lines.append(replace(found, name=column, of=label + " (untrained)" * control, control=control))
    recovered = {m.of: m.value for m in lines if m.name == "loss recovered"}
    gained = {
        of: recovered[of] - recovered[f"{of} (untrained)"] for of in recovered if f"{of} (untrained)" in recovered
    }
    least = min(gained, key=lambda of: gained[of])
    lowest = min(gained, key=lambda of: recovered[of])
    return DictionaryReport(
        question=f"{len(dictionaries)} dictionaries of {model.name}",
        verdict=f"Each recovers {recovered[lowest]:.1%} or more ({lowest}) of the loss that ablating its site to the "
        f"mean costs, and {gained[least]:.1%} or more ({least}) beyond its untrained twin.",
        measures=tuple(lines),
        choices={
            "text": f"{len(texts)} texts kept from training, rows of {context} tokens; special tokens are left alone",
            "loss recovered": f"(ablated - spliced) / (ablated - clean), the site at its mean; {rows} rows",
            "KL ratio": "KL of the splice over that of random errors as large and as far from the vector; 1 is noise",
            "interval": "95 %, bootstrap over rows",
            "control": "the same architecture and size, untrained, with the scales and the middle of the data",
        },
        provenance=model.provenance(),
    )


def untrained(dictionary: Dictionary) -> Dictionary:
    """This is a dictionary of the same architecture, size and sites that has learned nothing."""
    made = getattr(room, type(dictionary).__name__)
    return made(**dictionary.options(), reads=dictionary.reads, writes=dictionary.writes)


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


def takes(architecture: str, option: str) -> bool:
    """This is whether an architecture has an option, such as "k"; False for one that is not there."""
    made = getattr(room, architecture, None) if architecture in room.ARCHITECTURES else None
    return made is not None and option in inspect.signature(made.__init__).parameters


def _of_one_site(architecture: str) -> bool:
    made = getattr(room, architecture)
    sized = list(inspect.signature(made.__init__).parameters)[1:4] == ["d_in", "n_latents", "d_out"]
    return issubclass(made, room.Coder) and sized


def _layer(site: str) -> str:
    found = re.search(r"(.*blocks\.\d+)\.", site)
    return found[1] if found else ""
