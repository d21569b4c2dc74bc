"""The activation store of a GPT-2-small shape: a shuffled epoch over filling it, and filling over the bare forward.

Vectors of one site, after block 5 of 12, in contexts of 128 tokens, 8 at a time, float32, in shards of 8 MB. An epoch
is read in batches of 4,096 by a permutation of all vectors; once from a store just opened, which checks every shard's
checksum first, and once from one that has been checked. Files were just written, so the disk's cache holds them: what
is measured is the reading itself. Wall times, and processor times, which neighbours on the machine do not change.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
from measure import Options, Row

ROWS, CONTEXT, BATCH, SITE, BLOCKS = 96, 128, 8, "blocks.5.resid_post", 6
READ = 4096


def measured(options: Options) -> Iterator[Row]:
    import mechscope as ms

    model = ms.load(measure.gpt2_small())
    model.weights_hash()
    ids = measure.random_ids(ROWS // 3 if options.quick else ROWS, CONTEXT)
    yield from rows_of(model, ids, options.rounds(3, 2))


def rows_of(model, ids, rounds: int) -> list[Row]:
    """This is the figures of a model's store over ids [rows, context]; the first reading of each is not counted."""
    from mechscope.dictionaries.activations import Activations, store_activations

    seconds: dict[str, list[tuple[float, float]]] = {}

    def spent(name: str, call: Callable[[], object]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        call()
        taken = time.perf_counter() - wall, time.process_time() - processor
        seconds.setdefault(name, []).append(taken)

    def epoch(store: Activations) -> None:
        read = sum(len(x) for x in store.batches(READ, epochs=1))
        assert read == len(store)

    def forward() -> None:
        for rows in ids.split(BATCH):
            model.run(rows, save=SITE, stop_at=SITE)

    model.run(ids[:BATCH], save=SITE, stop_at=SITE)
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "store"

            def fill(folder: Path = folder) -> None:
                store_activations(model, ids, SITE, folder, batch=BATCH, shard_bytes="8 MB")

            for name, call in (("forward", forward), ("fill", fill))[:: 1 if number % 2 == 0 else -1]:
                spent(name, call)
            store = Activations(folder)
            spent("epoch, checked first", lambda: epoch(store))  # noqa: B023 (called here)
            spent("epoch", lambda: epoch(store))  # noqa: B023
    rows = []
    for clock, unit in enumerate(("wall time", "processor time")):
        times = {name: [taken[clock] for taken in found] for name, found in seconds.items()}
        if clock == 0:
            rows.append(Row(f"filling a store of {len(store):,} vectors of 768", "s", times["fill"]))
        filling, first, again = (
            measure.ratios(times, *names)
            for names in (("fill", "forward"), ("epoch, checked first", "fill"), ("epoch", "fill"))
        )
        rows += [
            Row(f"shuffled epoch, {unit}", "× filling", again, 0.05),
            Row(f"shuffled epoch with every checksum, {unit}", "× filling", first, 0.05),
            Row(f"filling, {unit}", f"× the {BLOCKS} blocks' forward", filling),
        ]
    return rows


if __name__ == "__main__":
    for row in measured(Options()):
        print(row.what, row.unit, row.values, row.met)
