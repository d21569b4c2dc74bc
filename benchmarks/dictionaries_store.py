"""The activation store of a GPT-2-small shape: a shuffled epoch over filling it, and filling over the bare forward.

Filling: vectors of one site, after block 5 of 12, in contexts of 128 tokens, 8 at a time, float32. Reading: a store of
40,960 vectors of the same width in shards of 16 MB (of the embedding, which is quick to make; reading is the same), in
batches of 4,096 by a permutation of all vectors; once from a store just opened, which checks every shard's checksum
first, and once from one that has been checked. Both are held against each other by vector. The disk's cache holds what
was just written, so the reading itself is measured. Wall times, and processor times, which neighbours change less.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
from measure import Options, Row

CONTEXT, BATCH, SITE, BLOCKS = 128, 8, "blocks.5.resid_post", 6
FILLED, READ, SIZE = 32, 320, 4096


def measured(options: Options) -> Iterator[Row]:
    import mechscope as ms

    model = ms.load(measure.gpt2_small())
    model.weights_hash()
    yield from rows_of(model, FILLED // 2 if options.quick else FILLED, options.rounds(5, 2))


def rows_of(model, contexts: int, rounds: int) -> list[Row]:
    """This is the figures of a model's store: filling with so many contexts, reading one of READ."""
    from mechscope.dictionaries.activations import Activations, store_activations

    ids = measure.random_ids(READ, CONTEXT)
    few = ids[:contexts]
    seconds: dict[str, list[tuple[float, float]]] = {}

    def spent(name: str, call: Callable[[], object], vectors: int) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        call()
        taken = time.perf_counter() - wall, time.process_time() - processor
        seconds.setdefault(name, []).append((taken[0] / vectors, taken[1] / vectors))

    def epoch(store: Activations) -> None:
        read = sum(len(x) for x in store.batches(SIZE, epochs=1))
        assert read == len(store)

    def forward() -> None:
        for rows in few.split(BATCH):
            model.run(rows, save=SITE, stop_at=SITE)

    def fill() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            store_activations(model, few, SITE, scratch, batch=BATCH, shard_bytes="16 MB")

    model.run(ids[:BATCH], save=SITE, stop_at=SITE)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "read"
        store_activations(model, ids, "embed", folder, shard_bytes="16 MB")
        epoch(Activations(folder))
        for number in range(rounds):
            for name, call in (("forward", forward), ("fill", fill))[:: 1 if number % 2 == 0 else -1]:
                spent(name, call, few.numel())
            store = Activations(folder)
            for name in ("epoch, checked first", "epoch"):
                spent(name, lambda store=store: epoch(store), len(store))
    rows = []
    for clock, unit in enumerate(("wall time", "processor time")):
        times = {name: [taken[clock] for taken in found] for name, found in seconds.items()}
        filling, first, again = (
            measure.ratios(times, *names)
            for names in (("fill", "forward"), ("epoch, checked first", "fill"), ("epoch", "fill"))
        )
        rows += [
            Row(f"filling, {unit}", "µs a vector", [1e6 * each for each in times["fill"]]),
            Row(f"shuffled epoch, {unit}", "× filling", again, 0.05),
            Row(f"shuffled epoch with every checksum, {unit}", "× filling", first, 0.05),
            Row(f"filling, {unit}", f"× the {BLOCKS} blocks' forward", filling),
        ]
    return rows
