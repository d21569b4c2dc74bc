"""The atlas of a model, on one page: its heads by kind and importance, where they look, what its neurons respond to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechscope import store, units
from mechscope.errors import LoadError, SiteError, UnitsError
from mechscope.jobs.atlas_cards import Cards, chosen_neurons, neuron_cards, range_names
from mechscope.jobs.atlas_heads import Shown, head_parts, shown_prompts
from mechscope.jobs.circuit import Interrupted, Progress, writable
from mechscope.jobs.tasks import task_for
from mechscope.models import Model, load
from mechscope.tasks import Task
from mechscope.units.ablating import VALUES, HeadImportance, forwards
from mechscope.units.patterns import MEASURES
from mechscope.viz import page as page_of
from mechscope.viz import to_view

AT = "blocks.*.mlp_post"
MOST = 20 * 10**6
"""How many bytes a page has at most; prompts are left out until it has no more, and said so."""
ENDS = "<|endoftext|>"
SUPPRESSED = 8
"""On how many rows of the text copy suppression is measured."""


@dataclass(frozen=True)
class Atlas:
    """This is what the job leaves: the page, its document, the kinds of heads, their importance, the harvest."""

    page: Path
    document: dict[str, Any]
    heads: units.Heads | None
    importance: HeadImportance | None
    harvest: units.Harvest | None


def atlas(
    model: Model | str,
    texts: str | Path | Iterable[str] | Tensor,
    out: str | Path,
    neurons: int | Sequence[str] = 200,
    prompts: int = 4,
    importance: str | None = None,
    task: Task | str | None = None,
    n: int | None = None,
    context: int = 128,
    examples: int = 8,
    rows: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Atlas:
    """This maps a model on a text and writes DIR/index.html, one page that needs nothing else.

    texts: a file (texts divided by "<|endoftext|>", else by empty lines), texts, or ids [row pos]; `n` takes the first
    of a file. neurons: how many cards, spread over the layers, or names such as "3.217"; examples: how many of the
    highest activations a card shows. prompts: on how many rows of the text patterns are shown, besides one of random
    tokens repeated. importance: "mean", "zero" or "resample" ablates every head on `rows` rows of the text. task:
    IOI-like pairs, on which heads' roles are measured too.

    The harvest of all neurons is kept in DIR/harvest; Ctrl-C raises Interrupted, and the same call goes on from there.
    Raises UnitsError for a file without text, a neuron that is not there and an ablation that is none.

    >>> atlas("grammar", "sentences.txt", "atlas").page  # doctest: +SKIP
    PosixPath('atlas/index.html')
    """
    tell = progress or (lambda stage, done, total: None)
    folder = writable(Path(out).expanduser())
    read = texts_of(Path(texts), n) if isinstance(texts, str | Path) else texts
    read = read if isinstance(read, Tensor) else list(read)
    if importance is not None and importance not in VALUES:
        raise UnitsError(f"no ablation {importance!r}; type one of {', '.join(VALUES)}")
    if isinstance(model, str):
        tell(f"loading {model}", 0, 0)
        model = load(model)
    notes: dict[str, list[str]] = {}
    tell("what kind each head is", 0, 0)
    kinds = attempted(lambda: kinds_of(model, task, seed, notes), "heads", notes)
    ids = list(rows_of(model, read, context, max(rows if importance else 0, prompts, SUPPRESSED)))
    if kinds is not None:
        kinds = with_copy_suppression(model, kinds, ids, seed, notes)
        kinds.save(folder / "heads.safetensors")
    harvest = cards = None
    if attempted(lambda: model.resolve(AT), "neurons", notes) and neurons:
        harvest = harvested(model, read, folder / "harvest", context, seed, tell)
        tell("cards of neurons", 0, 0)
        cards = neuron_cards(model, harvest, chosen_neurons(harvest, neurons, seed), examples)
    important = None
    if importance is not None:
        same = torch.tensor([row for row in ids if len(row) == len(ids[0])][:rows])
        important = units.head_importance(model, same, importance, seed, tell)
        important.save(folder / "importance.safetensors")
    tell("attention patterns", 0, 0)
    shown = attempted(lambda: shown_prompts(model, ids[:prompts], seed), "attention", notes)
    document = assembled(model, kinds, important, shown, cards, harvest, notes, folder)
    return Atlas(written(document, folder / "index.html"), document, kinds, important, harvest)


def predicted_forwards(model: Model) -> float:
    """This is what `importance=` costs, in forwards over its rows."""
    return forwards(model)


def texts_of(file: Path, n: int | None = None) -> list[str]:
    """This is the texts of a file, divided by "<|endoftext|>" where that stands in it, else by empty lines.

    Raises UnitsError for a file that is not there, is no text or has none.
    """
    try:
        held = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UnitsError(f"cannot read the text {file} ({why}); give a text file with --text FILE") from None
    texts = [text.strip() for text in held.split(ENDS if ENDS in held else "\n\n")]
    texts = [text for text in texts if text][:n]
    if not texts:
        raise UnitsError(f"{file} has no text; give a file with some, --text FILE")
    return texts


def rows_of(model: Model, texts: Iterable[str] | Tensor, context: int, most: int) -> Iterator[list[int]]:
    """This is the first rows of the text, as the harvest cuts it."""
    from itertools import islice

    from mechscope.models.stream import contexts

    yield from islice((row[:context] for row in contexts(model, texts, context)), most)


def kinds_of(model: Model, task: Task | str | None, seed: int, notes: dict[str, list[str]]) -> units.Heads:
    """This is the heads by every kind that needs no text of its own and, with a task of the IOI's make, by their roles.

    Where heads' outputs cannot be told apart, kinds are by where heads look alone.
    """
    try:
        found = units.heads(model, seed=seed)
    except (SiteError, LoadError):
        found = units.heads(model, tuple(MEASURES), seed=seed)
    more: dict[str, Callable[[], units.Heads]] = {"successor": lambda: units.successor_heads(model, seed=seed)}
    if task is not None:
        more["task"] = lambda: units.ioi_heads(model, task_for(model, task, 64, seed), seed)
    kinds, choices = dict(found.kinds), dict(found.choices)
    shape = next(iter(kinds.values())).score.shape
    for name, measure in more.items():
        held = attempted(measure, f"kinds of heads: {name}", notes)
        if held is None:
            continue
        taken = {k.name if name == "successor" else f"{held.choices['task']}: {k.name}": k for k in held}
        kinds |= {n: replace(k, name=n) for n, k in taken.items() if ":" not in k.name and k.score.shape == shape}
        choices |= {f"{name}: {choice}": said for choice, said in held.choices.items()}
    return units.Heads(kinds, choices, found.provenance, found.cost)


def with_copy_suppression(
    model: Model, kinds: units.Heads, ids: list[list[int]], seed: int, notes: dict[str, list[str]]
) -> units.Heads:
    """This is the kinds and, measured on rows of the text itself, copy suppression."""
    rows = torch.tensor([row for row in ids if len(row) == len(ids[0])][:SUPPRESSED])
    part = "kinds of heads: copy suppression"
    kind = attempted(lambda: units.copy_suppression_kind(model, rows, seed), part, notes)
    if kind is None or any(one.score.shape != kind.score.shape for one in kinds):
        return kinds
    choices = {**kinds.choices, "copy suppression": kind.text}
    return units.Heads({**kinds.kinds, kind.name: kind}, choices, kinds.provenance, kinds.cost)


def harvested(model: Model, texts: Any, folder: Path, context: int, seed: int, tell: Progress) -> units.Harvest:
    """This is the harvest of every neuron over the text; Ctrl-C keeps what was done.

    Raises UnitsError where the folder holds the harvest of another text, which a finished one does not tell by itself.
    """
    mark, held = folder.parent / "text.json", text_digest(texts)
    if folder.is_dir() and mark.is_file() and json.loads(mark.read_text(encoding="utf-8"))["sha256"] != held:
        raise UnitsError(f"'{folder.parent}' holds the atlas of another text; give another --out DIR, or delete it")
    store.write_text(mark, json.dumps({"sha256": held, "texts": len(texts)}) + "\n")
    try:
        return units.harvest(model, texts, folder, AT, context=context, seed=seed, save_every=5.0, progress=tell)
    except KeyboardInterrupt as stopped:
        if (folder / "state.safetensors").is_file():
            raise Interrupted(folder, resumes=True) from stopped
        raise


def text_digest(texts: Sequence[str] | Tensor) -> str:
    """This is the SHA-256 of a text, or of ids."""
    rows = texts.tolist() if isinstance(texts, Tensor) else texts
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row).encode())
    return found.hexdigest()


def attempted(call: Any, part: str, notes: dict[str, list[str]]) -> Any:
    """This is what `call` gives, or None where this model lacks what it takes; the page then says why."""
    try:
        return call()
    except (SiteError, LoadError, UnitsError) as error:
        notes[part] = [str(error)]
        return None


def assembled(
    model: Model,
    kinds: units.Heads | None,
    important: HeadImportance | None,
    shown: Shown | None,
    cards: Cards | None,
    harvest: units.Harvest | None,
    notes: dict[str, list[str]],
    folder: Path,
) -> dict[str, Any]:
    """This is the page's document."""
    tokens = harvest.facts["tokens"] if harvest else 0
    parts = head_parts(model, kinds, important, shown)
    total = sum(parts["heads"])
    labelled = sum(bool(label) for row in parts["labels"] for label in row)
    summary = {
        "layers": [str(model.n_layers), f"width {model.d_model:,}"],
        "heads": [f"{total:,}", f"{labelled:,} of at least one kind"],
    }
    if cards is not None and harvest is not None:
        summary["neurons"] = [f"{cards.of:,}", f"{len(cards.neurons):,} have a card here"]
        summary["text"] = [f"{tokens:,}", "tokens, special ones not counted"]
    choices = dict(kinds.choices) if kinds else {}
    if important is not None:
        choices |= {f"importance: {name}": said for name, said in important.choices.items()}
    if cards is not None and harvest is not None:
        question = harvest.facts["question"]
        choices["neurons"] = cards.about
        choices["sampled examples"] = (
            f"{question['per_range']} kept from each range; the edges are quantiles "
            f"{', '.join(map(str, question['levels']))} of the neuron on the first batch; seed {question['seed']}"
        )
        choices["harvest"] = (
            f"all {cards.of:,} neurons, their {question['k']} highest: ask {folder.name}/harvest by name"
        )
        choices["promotes"] = cards.direct
    verdict = (
        f"{labelled:,} of {total:,} heads are of a kind: their score is above what any head reaches on the control. "
        "A threshold says that a head does this at all, not that it does nothing else; the score says how much."
        if kinds
        else "No kind of head could be measured; see the notes."
    )
    provenance = {**model.provenance(), "versions": store.manifest()}
    if harvest is not None:
        provenance["harvest"] = {k: v for k, v in harvest.facts["question"].items() if k not in ("model", "sites")}
        provenance["harvest"] |= {"tokens": tokens, "seconds": harvest.facts["seconds"]}
    if important is not None:
        provenance["importance"] = {**important.provenance["options"], **important.cost}
    if kinds is not None:
        provenance["heads"] = {**kinds.provenance["call"]["options"], **kinds.cost}
    return {
        "kind": "atlas",
        "version": 1,
        "title": f"An atlas of {model.name}",
        "verdict": verdict,
        "summary": summary,
        **parts,
        "words": cards.words if cards else [],
        "neurons": cards.neurons if cards else [],
        "ranges": range_names(harvest.facts["question"]["levels"]) if harvest else [],
        "notes": notes,
        "choices": choices,
        "provenance": provenance,
    }


def written(document: dict[str, Any], path: Path) -> Path:
    """This writes the page, with fewer prompts where it would be larger than `MOST`; says its size in the summary."""
    document["summary"]["page"] = ["0.0 MB", ""]
    size = len(page_of(to_view(document)))
    dropped = 0
    while size > MOST and len(document["prompts"]) > 1:
        size -= len(json.dumps(document["prompts"].pop(0)))
        dropped += 1
    if size > MOST:
        raise UnitsError(
            f"the page would have {size / 1e6:.0f} MB, of which {MOST / 1e6:.0f} are allowed; give fewer cards, "
            f"--neurons {len(document['neurons']) // 2}"
        )
    said = f"of {MOST / 1e6:.0f} at most" + (f"; {dropped} prompts left out for it" if dropped else "")
    document["summary"]["page"] = [f"{size / 1e6:.1f} MB", said]
    return store.write_text(path, page_of(to_view(document)))


__all__ = ["Atlas", "atlas", "predicted_forwards", "texts_of"]
