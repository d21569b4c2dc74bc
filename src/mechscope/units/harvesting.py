"""A harvest: for any site's units or features, the tokens that each responds to most, and a sample of the rest.

One pass over a corpus. Of every unit are kept the k highest activations, exactly; r tokens drawn at random from each of
several ranges of its activation, whose edges are quantiles on the corpus's first batch; and sums for its mean, spread,
share above zero and greatest value. Memory does not grow with the corpus: the text itself goes to the disk on the way.

    DIR/contexts-*.parquet    every row of text: ids, tokens, and the model's loss on each
    DIR/state.safetensors     what has been kept so far, to go on from, and to join with other shards' when whole
    DIR/examples.parquet      what was kept; DIR/units.parquet: a row a unit; DIR/harvest.json: what made them

A pass that was killed goes on from the last state, and ends with the same table bit for bit. Several processes can take
a share each (`shard=`), and `join` makes one harvest of theirs, the one that a single pass would have made.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope import store
from mechscope.errors import SiteError, UnitsError
from mechscope.models.stream import contexts
from mechscope.units.examples import Harvest, write_contexts, write_tables
from mechscope.units.highest import Highest, counted
from mechscope.units.samples import Samples

if TYPE_CHECKING:
    from mechscope.models.model import Model

Progress = Callable[[str, int, int], None]

STATE, FACTS = "state.safetensors", "harvest.json"


def harvest(
    model: Model,
    texts: Iterable[str] | Tensor,
    out: str | Path,
    at: str = "blocks.*.mlp_post",
    k: int = 20,
    levels: Sequence[float] = (0.5, 0.9, 0.99),
    per_range: int = 5,
    context: int = 128,
    batch: int = 16,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    save_every: float = 30.0,
    progress: Progress | None = None,
) -> Harvest:
    """This runs a corpus through the model once and keeps what each unit of `at` responded to, in the folder `out`.

    texts: texts, or ids [rows, context]; an iterator is read once and never held. at: sites with an axis of positions,
    wildcards allowed; heads stand side by side. k: how many of the highest activations. levels: the quantiles that
    bound the ranges, of which each keeps `per_range` tokens drawn with `seed`; of a dictionary's features the lowest
    range is where they are off, and the quantiles are of their activations where they are on. context, batch: tokens a
    row and rows a run. shard: (i, n) takes every n-th batch, from the i-th. save_every: seconds between savings.
    progress(what, done, of): `of` is 0, for a corpus does not say how long it is.

    Special tokens (BOS, padding ...) are run and not counted. A folder that holds the same question half done is gone
    on with; one that holds it whole is opened. Raises UnitsError for a folder of another question or other texts, for
    a site without positions and for an empty corpus.

    >>> found = harvest(model, open("stories.txt"), "neurons")  # doctest: +SKIP
    >>> print(found.query("neuron 3.217"))  # doctest: +SKIP
    >>> site = model.attach("blocks.3.resid_post", sae)  # doctest: +SKIP
    >>> print(harvest(model, open("stories.txt"), "features", at=site).query("feature 3.1234"))  # doctest: +SKIP
    """
    folder, sites = Path(out), token_sites(model, at)
    question = {
        **{"model": _provenance(model, sites), "sites": sites, "k": k, "levels": list(levels), "per_range": per_range},
        **{"context": context, "batch": batch, "seed": seed, "shard": list(shard)},
    }
    if (folder / FACTS).is_file():
        _same(folder, json.loads((folder / FACTS).read_text(encoding="utf-8"))["question"], question)
        return Harvest(folder)
    started = time.perf_counter()
    work = Pass(model, folder, question)
    saved = time.perf_counter()
    for number, rows in enumerate(batches(contexts(model, texts, context), batch)):
        mine = number % shard[1] == shard[0]
        work.see(number, rows, mine)
        if mine and progress is not None:
            progress("tokens", work.tokens, 0)
        if time.perf_counter() - saved > save_every:
            work.save()
            saved = time.perf_counter()
    if work.done < work.resume_at:
        work.refuse_texts()
    if not work.tokens:
        raise UnitsError("there is no text to harvest from: the corpus is empty, or has nothing but special tokens.")
    return work.finish(time.perf_counter() - started)


class Pass:
    """This is a pass over a corpus that is under way: what has been kept so far, in `folder` from time to time."""

    def __init__(self, model: Model, folder: Path, question: dict[str, Any]):
        self.model, self.folder, self.question = model, folder, question
        self.sites: list[str] = question["sites"]
        self.highest: dict[str, Highest] = {}
        self.samples: dict[str, Samples] = {}
        self.sums: dict[str, Tensor] = {}  # [5 units]: how often, sum, sum of squares, how often above 0, greatest
        self.tokens = self.done = self.resume_at = 0
        self.digest, self.digest_there = hashlib.sha256(), ""
        self.held: list[tuple[int, list[int], list[float]]] = []
        self.special = torch.tensor(sorted(set(getattr(model.tokenizer, "all_special_ids", ()) or ())))
        if (folder / STATE).is_file():
            self._open()

    def see(self, number: int, rows: list[list[int]], mine: bool = True) -> None:
        """This takes in a batch, or passes it by where it was taken in before or belongs to another shard."""
        self.digest.update(json.dumps(rows if mine else []).encode())
        self.done = number + 1
        if self.done == self.resume_at and self.digest.hexdigest() != self.digest_there:
            self.refuse_texts()
        mine = mine and number >= self.resume_at
        first = not self.samples  # the ranges are those of the first batch, whichever shard it belongs to
        if not (mine or first):
            return
        activations, where, loss = self._activations(rows)
        if first and len(where):  # a row may hold nothing but special tokens
            self._calibrate(activations)
        if mine:
            self._take(number * self.question["batch"], rows, activations, where, loss)

    def _calibrate(self, activations: dict[str, Tensor]) -> None:
        """This sets the ranges of every unit's activations, from a first batch."""
        asked, seed = self.question, self.question["seed"]
        for site, acts in activations.items():
            samples = Samples.of_features if _is_features(site) else Samples.of
            self.samples[site] = samples(acts, asked["levels"], asked["per_range"], seed)
            self.highest[site] = Highest(acts.shape[1], asked["k"])
            self.sums[site] = torch.zeros(5, acts.shape[1], dtype=torch.float64)
            self.sums[site][4] = float("-inf")

    def _take(
        self, first: int, rows: list[list[int]], activations: dict[str, Tensor], where: Tensor, loss: list[list[float]]
    ) -> None:
        where = where + first * self.question["context"]
        for site, acts in activations.items() if len(where) else ():
            self.highest[site].add(acts, where)
            self.samples[site].add(acts, where)
            _summed(self.sums[site], acts)
        self.tokens += len(where)
        self.held += [(first + i, row, loss[i]) for i, row in enumerate(rows)]

    def refuse_texts(self) -> None:
        raise UnitsError(f"'{self.folder}' holds a harvest of other texts, half done; delete it or name another folder")

    def _activations(self, rows: list[list[int]]) -> tuple[dict[str, Tensor], Tensor, list[list[float]]]:
        """This is activations [tokens units] by site, those tokens' numbers within the batch, and losses by row."""
        ids = torch.tensor(rows)
        with torch.no_grad():
            out = self.model.run(ids, save=self.sites)
        keep = (~torch.isin(ids, self.special)).flatten()
        every = bool(keep.all())
        found = {}
        for site in self.sites:
            acts = out[site]
            acts = acts.transpose(1, 2).flatten(2) if acts.dim() == 4 else acts
            acts = acts.flatten(0, 1).float().cpu()
            found[site] = acts if every else acts[keep]
        size = self.question["context"]
        where = (torch.arange(len(rows))[:, None] * size + torch.arange(ids.shape[1])).flatten()[keep]
        return found, where, _losses(out, ids)

    def save(self) -> None:
        """This writes the texts since the last time, then what has been kept; a kill in between costs nothing."""
        if not self.samples:
            return
        self._write_contexts()
        tensors = {}
        for site in self.sites:
            high, drawn = self.highest[site], self.samples[site]
            parts = {"values": high.values, "where": high.where, "sums": self.sums[site], "edges": drawn.edges}
            parts |= {"drawn": drawn.values, "drawn_where": drawn.where, "keys": drawn.keys}
            tensors |= {f"{site}/{name}": value for name, value in parts.items()}
        facts = {"question": self.question, "batches": self.done, "tokens": self.tokens}
        store.save(self.folder / STATE, "harvest-state", tensors, {**facts, "texts": self.digest.hexdigest()})

    def _open(self) -> None:
        facts, tensors = store.read(self.folder / STATE)
        _same(self.folder, facts["question"], self.question)
        self.resume_at, self.tokens, self.digest_there = facts["batches"], facts["tokens"], facts["texts"]
        for site in self.sites:
            part = {name: tensors[f"{site}/{name}"] for name in _PARTS}
            self.sums[site] = part["sums"]
            self.highest[site] = Highest(*part["values"].shape)
            self.highest[site].values, self.highest[site].where = part["values"], part["where"]
            drawn = self.samples[site] = Samples(part["edges"], part["drawn"].shape[2], self.question["seed"])
            drawn.values, drawn.where, drawn.keys = part["drawn"], part["drawn_where"], part["keys"]

    def _write_contexts(self) -> None:
        if self.held:
            write_contexts(self.folder, self.held, self.model.strings)
            self.held = []

    def finish(self, seconds: float) -> Harvest:
        """This writes the tables, then the facts, which say that the harvest is whole, and drops the state."""
        self.save()
        write_tables(self.folder, self.highest, self.samples, self.sums, self.question["context"])
        facts = {"question": self.question, "tokens": self.tokens, "contexts": self.done * self.question["batch"]}
        facts |= {"seconds": seconds, "versions": store.manifest()}
        store.write_text(self.folder / FACTS, json.dumps(facts, indent=1) + "\n")
        return Harvest(self.folder)


_PARTS = ("values", "where", "sums", "edges", "drawn", "drawn_where", "keys")


def join(model: Model, folders: Sequence[str | Path], out: str | Path) -> Harvest:
    """This makes one harvest of those of all shards, as a single pass over the corpus would have made it.

    Raises UnitsError where a shard is missing or belongs to another question.

    >>> join(model, ["part-0", "part-1"], "neurons")  # doctest: +SKIP
    """
    passes = []
    for folder in map(Path, folders):
        if not (folder / FACTS).is_file():
            raise UnitsError(f"'{folder}' holds no finished harvest; run harvest(..., out='{folder}') to its end first")
        question = json.loads((folder / FACTS).read_text(encoding="utf-8"))["question"]
        passes.append(Pass(model, folder, question))
    if not passes:
        raise UnitsError("no folders to join; give those of all shards")
    first = passes[0]
    asked = {**first.question, "shard": [0, 1]}
    taken = sorted(work.question["shard"][0] for work in passes)
    if any({**work.question, "shard": [0, 1]} != asked for work in passes):
        raise UnitsError("these harvests answer different questions (another model, site, option or seed)")
    if taken != list(range(first.question["shard"][1])):
        raise UnitsError(f"{first.question['shard'][1]} shards make the whole, and these are the shards {taken}")
    whole = Pass(model, Path(out), asked)
    whole.highest, whole.samples, whole.sums = first.highest, first.samples, first.sums
    for other in passes[1:]:
        for site in whole.sites:
            whole.highest[site].join(other.highest[site])
            whole.samples[site].join(other.samples[site])
            sums = whole.sums[site]
            greatest = torch.maximum(sums[4], other.sums[site][4])
            sums += other.sums[site]
            sums[4] = greatest
    whole.tokens, whole.done = sum(work.tokens for work in passes), max(work.resume_at for work in passes)
    for work in passes:
        for part in work.folder.glob("contexts-*.parquet"):
            content = part.read_bytes()
            store.write_with(whole.folder / part.name, lambda path, content=content: path.write_bytes(content))
    return whole.finish(0.0)


def batches(rows: Iterator[list[int]], size: int) -> Iterator[list[list[int]]]:
    """This is rows, `size` at a time, all of one length; the last, shorter row comes alone."""
    held: list[list[int]] = []
    for row in rows:
        if held and (len(held) == size or len(row) != len(held[0])):
            yield held
            held = []
        held.append(row)
    if held:
        yield held


def _losses(out: Any, ids: Tensor) -> list[list[float]]:
    """This is the model's loss on each token given those before it, in nats; NaN for the first, and without logits."""
    nothing = torch.full(ids.shape, float("nan"))
    try:
        logits = out.logits
    except SiteError:  # a model without a head
        return nothing.tolist()
    if logits.dim() != 3:
        return nothing.tolist()
    for i, (row, right) in enumerate(zip(logits[:, :-1], ids[:, 1:].to(logits.device))):
        # A row at a time: what lies between logits and loss is then small, and need not be as large as the logits.
        row = row.float()
        nothing[i, 1:] = (row.logsumexp(-1) - row.gather(-1, right[:, None]).squeeze(-1)).cpu()
    return nothing.tolist()


def _summed(sums: Tensor, activations: Tensor) -> None:
    """This adds activations [tokens units] to the sums of their units, in pieces that a processor's cache holds."""
    for piece in activations.split(256):
        sums[0] += len(piece)
        sums[1] += piece.sum(0)
        sums[2] += piece.square().sum(0)
        sums[3] += counted(piece > 0)
        sums[4] = torch.maximum(sums[4], piece.amax(0))


def token_sites(model: Model, at: str) -> list[str]:
    requests = model.resolve(at)
    for request in requests:
        if "pos" not in request.row.axes or request.row.axes[-1] == "key" or str(request.selection):
            raise UnitsError(
                f"'{request.key}' has the axes {' '.join(request.row.axes)}; a harvest reads whole sites of one vector "
                "a token, such as blocks.*.mlp_post, blocks.3.resid_post or blocks.*.z"
            )
    return [request.site for request in requests]


def _provenance(model: Model, sites: Sequence[str]) -> dict[str, Any]:
    """This is the model's provenance, with those of its dictionaries that the sites belong to."""
    made = model.provenance()
    used = {site.removesuffix("/error") for site in sites}
    kept = {site: what for site, what in made.pop("dictionaries", {}).items() if site in used}
    return made | ({"dictionaries": kept} if kept else {})


def _is_features(site: str) -> bool:
    return "/" in site and not site.endswith("/error")


def _same(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    asked = json.loads(json.dumps(asked))
    if asked != there:
        name, was, now = _difference(there, asked)
        raise UnitsError(
            f"'{folder}' holds a harvest of another question ({name} is {was!r}, not {now!r}); delete the folder or "
            "name another"
        )


def _difference(there: dict[str, Any], asked: dict[str, Any], name: str = "") -> tuple[str, Any, Any]:
    """This is the first entry that two questions differ in: its name, and what it is in each."""
    key = next(key for key in {**there, **asked} if there.get(key) != asked.get(key))
    was, now, name = there.get(key), asked.get(key), f"{name} {key}".strip()
    return _difference(was, now, name) if isinstance(was, dict) and isinstance(now, dict) else (name, was, now)


__all__ = ["harvest", "join"]
