"""Heads and neurons of the GPT-2-small shape: kinds of heads, and a harvest of every neuron, over the plain forward.

Kinds: all that patterns and what heads write tell, on 32 rows of 64 tokens, with the intervals and thresholds; and once
with the untrained twin as a control besides, which copies the weights and takes a second such run.

Harvest: the top 20 of all 36,864 neurons, on batches of 16 rows of 128 tokens. Before the next batch, the plain forward
runs over the same rows, without saving or a loss. A corpus's figure has everything in it, from the first call to the
last file; what it costs to begin is the same for any length, so a longer corpus costs less. A corpus of 20 batches is
harvested with the same widths, 2 layers and 2,000 words: a neuron then has less of a forward to be held against.
Killed: five times at random moments, 12 narrow layers, then gone on with to the end, against a pass that nothing
stopped.

Times are processor time, in turn, on one thread, after a first call that is not counted.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import measure
from measure import Options, Row

from lenses import processor

ROWS, LENGTH = 32, 64
BATCH, CONTEXT, TOP = 16, 128, 20


def measured(options: Options) -> Iterator[Row]:
    import torch

    import mechscope as ms

    torch.set_num_threads(1)
    yield killed(options.rounds(5, 2))
    yield from harvest_rows(ms.load(two_layers()), options.rounds(20, 10))
    model = ms.load(measure.gpt2_small())
    yield from kinds_rows(model, options.rounds(3, 1))
    yield from harvest_rows(model, options.rounds(6, 3))


def kinds_rows(model, rounds: int) -> Iterator[Row]:
    import torch

    from mechscope.units import heads

    ids = measure.random_ids(ROWS, LENGTH)

    def forward() -> None:
        with torch.no_grad():
            model.hf(ids, use_cache=False)

    def kinds(rows: int = ROWS, length: int = LENGTH, twin: bool = False) -> None:
        heads(model, rows=rows, length=length, twin=twin)

    kinds(2, 32)
    plain, found = [], []
    for _ in range(rounds):
        plain.append(processor(forward))
        found.append(processor(kinds))
    yield Row(f"forward of {ROWS} × {LENGTH} tokens", "s", plain)
    yield Row("kinds of heads", "× forward", [mine / base for mine, base in zip(found, plain)], 4.0)
    yield Row("with the untrained twin besides", "× forward", [processor(lambda: kinds(twin=True)) / plain[-1]])


def harvest_rows(model, batches: int) -> Iterator[Row]:
    import torch

    from mechscope.units import harvest

    ids = measure.random_ids(batches * BATCH, CONTEXT) % model.d_vocab
    plain: list[float] = []
    spent: list[float] = []  # on each batch; the last is on the files

    def forward() -> None:
        with torch.no_grad():
            model.hf(ids[len(plain) % batches * BATCH :][:BATCH], use_cache=False)

    def after_a_batch(what: str, done: int, of: int) -> None:
        spent.append(time.process_time() - began[0])
        plain.append(processor(forward))
        began[0] = time.process_time()

    forward()
    began = [time.process_time()]
    with tempfile.TemporaryDirectory() as scratch:
        harvest(model, ids, Path(scratch) / "neurons", k=TOP, context=CONTEXT, batch=BATCH, progress=after_a_batch)
    spent.append(time.process_time() - began[0])
    neurons = sum(block.mlp.c_fc.nf for block in model.hf.transformer.h)
    ratios = [mine / base for mine, base in zip(spent, plain)]
    what = f"harvest of {neurons:,} neurons"
    yield Row(f"plain forward of {BATCH} × {CONTEXT} tokens, {model.n_layers} layers", "s", plain)
    yield Row(f"{what}: a corpus of {batches} batches", "× forward", [sum(spent) / sum(plain)], 1.3)
    yield Row(f"{what}: its first batch, with the ranges", "× forward", ratios[:1])
    yield Row(f"{what}: a batch of its later half", "× forward", ratios[batches // 2 :], 1.3)


def two_layers():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, vocab_size=2000, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def killed(times: int) -> Row:
    """This is how many of the tables differ between a harvest that was killed and one that was not."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import mechscope as ms

    torch.manual_seed(0)
    config = GPT2Config(n_embd=96, vocab_size=2000, n_positions=128, bos_token_id=0, eos_token_id=0)
    model = ms.load(GPT2LMHeadModel(config).eval())
    ids = torch.randint(1, 2000, (64, CONTEXT), generator=torch.Generator().manual_seed(1))
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        whole, stopped = Path(scratch) / "whole", Path(scratch) / "stopped"
        started = time.perf_counter()
        ms.units.harvest(model, ids, whole, k=TOP, context=CONTEXT, batch=4, save_every=0.0)
        each = (time.perf_counter() - started) / times
        done = 0
        while done < times and not (stopped / "harvest.json").exists():
            child = os.fork()
            if not child:
                ms.units.harvest(model, ids, stopped, k=TOP, context=CONTEXT, batch=4, save_every=0.0)
                os._exit(0)
            time.sleep(draw.uniform(0.5, 1.5) * each)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
        ms.units.harvest(model, ids, stopped, k=TOP, context=CONTEXT, batch=4, save_every=0.0)
        names = ("examples.parquet", "units.parquet")
        different = sum((whole / name).read_bytes() != (stopped / name).read_bytes() for name in names)
    return Row("tables that differ after kills", "of 2", [float(different)], 0.0, note=f"killed {done} times")
