"""Dictionaries: a TopK training step against its arithmetic and the peers; four at once; the store's shuffled reading.

A step is of 4,096 vectors of width 768, 16,384 latents, k = 32: forward, backward, Adam, unit decoder rows, the count
of idle latents. Its bound is the encoder's product and the selection of the 32 greatest, which nothing can leave out.
The dense reference keeps features as [4,096, 16,384] tensors and uses the same fused Adam. Peers run in environments
of their own, in turn with the same dense reference, so that ratios to it compare across processes; each does its own
trainer's step (eai-sparsify's is its coder's, with plain Adam). Memory is the peak of tensors in a step above weights
and optimiser.

Four dictionaries on four sites of the GPT-2-small shape: one stream and four steps a batch, against the forward alone
and the four steps alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import measure
from attribution import environment
from dense_topk import Dense, data
from measure import Options, Row

D, LATENTS, K, BATCH = 768, 16_384, 32, 4096
SMALL = {"d": 256, "latents": 4096, "k": 32, "batch": 1024}
PEERS = {
    "sae-lens": ["torch==2.13.0", "sae-lens==6.54.12"],
    "eai-sparsify": ["torch==2.13.0", "eai-sparsify==1.3.3"],
    "dictionary-learning": [
        *("torch==2.13.0", "numpy", "einops", "tqdm", "datasets", "transformers"),
        "dictionary-learning==0.1.0 --no-deps",
    ],
}


def measured(options: Options) -> Iterator[Row]:
    rounds = options.rounds(7, 3)
    yield from step_rows(rounds)
    yield from memory_rows()
    yield from several_rows(options.rounds(5, 2))
    from dictionaries_store import measured as store_rows

    yield from store_rows(options)
    if options.peers:
        yield from peer_rows(rounds)


# ---------------------------------------------------------------------------------------- one step


def steps(d: int = D, latents: int = LATENTS, k: int = K, batch: int = BATCH) -> dict[str, Callable[[], object]]:
    """This is the bound, the dense reference and ours, on the same vectors."""
    import torch

    from mechscope.dictionaries import TopK
    from mechscope.dictionaries.training import adam, one_step

    x = data(d, batch)
    ours = TopK(d, latents, k=k)
    ours.begin(x, None)
    optimiser = adam(ours, 3e-4)
    dense = alike(ours)
    product = torch.empty(batch, latents)

    def bound() -> None:
        with torch.no_grad():
            torch.mm(x, ours.W_enc.T, out=product).topk(k, dim=1, sorted=False)

    return {
        "encoder product and selection": bound,
        "dense reference": lambda: dense.step(x),
        "TopK": lambda: one_step(ours, optimiser, x, 0.5),
    }


def alike(ours) -> Dense:
    """This is the dense reference with our weights."""
    made = Dense(ours.d_in, ours.n_latents, ours.k, float(ours.scale_in))
    return made.like([ours.W_enc, ours.b_enc, ours.W_dec, ours.b_dec])


def step_rows(rounds: int) -> Iterator[Row]:
    calls = steps()
    seconds = measure.in_turn(calls, rounds)
    bound, dense, ours = calls
    yield Row(f"{bound}", "s", seconds[bound])
    yield Row("TopK step", "× encoder product and selection", measure.ratios(seconds, ours, bound), 2.0)
    yield Row("TopK step", "× dense reference", measure.ratios(seconds, ours, dense), 0.38)
    yield Row("loss after those steps, less the dense reference's", "share", [loss_gap()], 0.01)


def loss_gap(many: int = 60) -> float:
    """This is how far apart the losses are after some steps on the same batches, at a smaller size."""
    from mechscope.dictionaries import TopK
    from mechscope.dictionaries.training import adam, one_step

    d, latents, k, batch = SMALL.values()
    ours = TopK(d, latents, k=k)
    x = data(d, batch * 4)
    ours.begin(x, None)
    dense, optimiser = alike(ours), adam(ours, 3e-4)
    mine = theirs = 0.0
    for number in range(many):
        rows = x[number % 4 * batch :][:batch]
        theirs = dense.step(rows)
        mine = one_step(ours, optimiser, rows, 0.5).loss.item()
    return abs(mine - theirs) / theirs


def memory_rows() -> Iterator[Row]:
    peaks = {name: measure.in_a_process("dictionaries.py", "memory", name) for name in ("dense reference", "TopK")}
    for name, peak in peaks.items():
        yield Row(f"peak of tensors in a step, {name}", "MB", [peak])
    yield Row("peak, TopK over the dense reference", "×", [peaks["TopK"] / peaks["dense reference"]], 0.26)


# ---------------------------------------------------------------------------------------- several at once


def several_rows(rounds: int, sites: int = 4, context: int = 128, rows: int = 16) -> Iterator[Row]:
    """This is one pass that feeds four dictionaries, against the model's forward and the four steps by themselves."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import mechscope as ms
    from mechscope.dictionaries import TopK
    from mechscope.dictionaries.training import adam, one_step

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    model = ms.load(hf)
    at = [f"blocks.{layer}.resid_post" for layer in (2, 5, 8, 11)][:sites]
    coders = [TopK(D, LATENTS // 4, k=K, reads=site) for site in at]
    optimisers = [adam(coder, 3e-4) for coder in coders]
    ids = measure.random_ids(rows * (rounds + 2), context)
    first = next(iter(model.stream(ids, at=at, context=context, batch=rows, vectors=rows * context)))
    for coder in coders:
        coder.begin(*coder.parts(first))

    def forward() -> None:
        with torch.no_grad():
            hf(ids[:rows], use_cache=False)

    def four(batch=first) -> None:
        for coder, optimiser in zip(coders, optimisers):
            one_step(coder, optimiser, batch, 0.5)

    stream = model.stream(ids, at=at, context=context, batch=rows, vectors=rows * context, loop=True)
    seconds = measure.in_turn({"forward": forward, "steps": four, "together": lambda: four(next(stream))}, rounds)
    alone = [f + s for f, s in zip(seconds["forward"], seconds["steps"])]
    shares = [together / both for together, both in zip(seconds["together"], alone)]
    yield Row(f"{sites} dictionaries on {sites} sites", "× forward and the steps alone", shares, 1.4)


# ---------------------------------------------------------------------------------------- peers


def peer_rows(rounds: int) -> Iterator[Row]:
    import torch

    threads = str(torch.get_num_threads())
    for name, packages in PEERS.items():
        try:
            python = environment(name, packages)
            found = measure.in_a_process(
                "peers/topk_step.py", name, str(rounds), python=python, timeout=1800, OMP_NUM_THREADS=threads
            )
        except (RuntimeError, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        shares = [theirs / dense for theirs, dense in zip(found["peer"], found["dense"])]
        yield Row(f"{name} step", "× dense reference", shares, note=found["version"])


if __name__ == "__main__":
    step = steps()[sys.argv[2]]
    step()  # the optimiser's state is there before what is measured
    print(json.dumps(measure.peak_of_tensors(step)))
