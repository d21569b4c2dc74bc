"""The command `python -m mechscope.labs.grammar.replacement`: transcoders of all the bundled model's MLPs, compared.

    plain          a transcoder for each layer
    skip           the same with a linear skip connection
    cross-layer    one cross-layer transcoder, whose latents also write later layers

All have as many latents a layer, as many of them active, and saw the same batches. On documents that they did not see
they are judged by what they miss of the MLPs' outputs (FVU), and by what becomes of the model's predictions when every
MLP is replaced at once (KL, in nats a token), each layer reading what the replaced ones before it made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from mechscope import dictionaries
from mechscope.dictionaries import CrossLayerTranscoder, Dictionary
from mechscope.edits import unchanged
from mechscope.labs.grammar import document, folder
from mechscope.models import load

DOCUMENTS, HELD = 2000, 24
"""How many documents are for training, again and again, and for judging."""

Kinds = dict[str, list[Dictionary]]


def texts(seed: int, n: int) -> list[str]:
    """This is n documents of the grammar."""
    random = Random(seed)
    return [" ".join(sentence.text for sentence in document(random, 400)) for _ in range(n)]


def make(n_layers: int, d: int, per_layer: int, k: int, architecture: str = "BatchTopK", seed: int = 0) -> Kinds:
    """This is the dictionaries to be compared, untrained."""
    reads = [f"blocks.{layer}.ln2" for layer in range(n_layers)]
    writes = [f"blocks.{layer}.mlp_out" for layer in range(n_layers)]
    options: dict[str, Any] = {"k": k, "dead_after": 20_000, "aux": 0.25}

    def each(skip: bool) -> list[Dictionary]:
        return [
            dictionaries.transcoder(architecture, d, per_layer, d, skip=skip, reads=r, writes=w, seed=seed, **options)
            for r, w in zip(reads, writes)
        ]

    cross = CrossLayerTranscoder(
        n_layers, d, per_layer, architecture=architecture, reads=reads, writes=writes, seed=seed, **options
    )
    return {"plain": each(False), "skip": each(True), "cross-layer": [cross]}


@torch.no_grad()
def written(kind: list[Dictionary], x: dict[int, Tensor], layer: int) -> Tensor:
    """This is what a kind writes at a layer, of what was read at it and before it."""
    if len(kind) > 1:
        return kind[layer].decode(kind[layer].encode(x[layer]), x[layer])
    whole = torch.stack([x.get(at, torch.zeros_like(x[0])) for at in range(kind[0].n_layers)], dim=-2)  # type: ignore
    return kind[0].decode(kind[0].encode(whole))[..., layer, :]


def replaced(kind: list[Dictionary], n_layers: int) -> dict[str, Any]:
    """This is the edits that put a kind in place of every MLP."""
    x: dict[int, Tensor] = {}

    def read(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda value: x.__setitem__(layer, value) or value

    def write(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda value: written(kind, x, layer).to(value)

    edits: dict[str, Any] = {f"blocks.{layer}.ln2": unchanged(read(layer)) for layer in range(n_layers)}
    return edits | {f"blocks.{layer}.mlp_out": write(layer) for layer in range(n_layers)}


@torch.no_grad()
def judge(model: Any, kinds: Kinds, held: list[str]) -> list[dict[str, Any]]:
    """This is a row for each kind: FVU of each layer, their mean, active latents a token, and KL."""
    sites = [f"blocks.{layer}.{name}" for layer in range(model.n_layers) for name in ("ln2", "mlp_out")]
    sums: dict[str, dict[str, Any]] = {name: {"missed": 0.0, "l0": 0.0, "kl": 0.0} for name in kinds}
    total: Any = 0.0
    tokens = 0
    for text in held:
        out = model.run(text, save=sites)
        before = out.logits.log_softmax(-1)
        reads = {layer: out[f"blocks.{layer}.ln2"][0] for layer in range(model.n_layers)}
        targets = torch.stack([out[f"blocks.{layer}.mlp_out"][0] for layer in range(model.n_layers)])
        total = total + (targets - targets.mean(1, keepdim=True)).square().sum((1, 2))
        tokens += targets.shape[1]
        for name, kind in kinds.items():
            made = torch.stack([written(kind, reads, layer) for layer in range(model.n_layers)])
            sums[name]["missed"] += (targets - made).square().sum((1, 2))
            x = torch.stack([reads[layer] for layer in range(model.n_layers)], dim=1)
            given = [x] if len(kind) == 1 else list(x.unbind(1))
            sums[name]["l0"] += sum(int((d.encode(part) > 0).sum()) for d, part in zip(kind, given))
            after = model.run(text, edits=replaced(kind, model.n_layers)).logits.log_softmax(-1)
            sums[name]["kl"] += float((before.exp() * (before - after)).sum())
    rows = []
    for name, found in sums.items():
        fvu = found["missed"] / total
        rows.append({
            "kind": name, "L0 a layer": found["l0"] / tokens / model.n_layers, "FVU": float(fvu.mean()),
            "FVU by layer": [round(float(v), 4) for v in fvu], "KL": found["kl"] / tokens,
        })  # fmt: skip
    return rows


def run(per_layer: int = 256, k: int = 8, steps: int = 500, vectors: int = 512, seed: int = 0) -> list[dict[str, Any]]:
    """This trains and judges all kinds."""
    model = load(folder())
    kinds = make(model.n_layers, model.d_model, per_layer, k, seed=seed)
    everything = [dictionary for kind in kinds.values() for dictionary in kind]
    sites = [f"blocks.{layer}.{name}" for layer in range(model.n_layers) for name in ("ln2", "mlp_out")]
    stream = model.stream(texts(seed, DOCUMENTS), at=sites, vectors=vectors, loop=True)
    dictionaries.train(everything, stream, steps=steps, lr=2e-3)
    return judge(model, kinds, texts(seed + 1000, HELD))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mechscope.labs.grammar.replacement", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, value in (("per-layer", 256), ("k", 8), ("steps", 500), ("vectors", 512), ("seed", 0), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rows = run(given.per_layer, given.k, given.steps, given.vectors, given.seed)
    print("| kind | L0 a layer | FVU | FVU by layer | KL |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['kind']} | {row['L0 a layer']:.2f} | {row['FVU']:.4f} | {row['FVU by layer']} | {row['KL']:.4f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
