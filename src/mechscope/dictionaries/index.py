"""The index of an activation store: one JSON file that says what made its shards, written when all are there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mechscope import store
from mechscope.dictionaries import shards
from mechscope.errors import StoreError

INDEX = "index.json"


def write(
    folder: Path, provenance: dict[str, Any], mask: dict[str, Any], widths: dict[str, int], done: list[dict[str, Any]]
) -> None:
    """This writes the index of shards, given their facts, with the norms of all vectors and a checksum of its own."""
    question = done[0]["question"]
    total = sum(facts["vectors"] for facts in done)
    norms = {}
    for site in question["sites"]:
        sums = [facts["sums"][site] for facts in done]
        mean, square = sum(s[0] for s in sums) / total, sum(s[1] for s in sums) / total
        norms[site] = {"mean": mean, "rms": square**0.5, "largest": max(s[2] for s in sums)}
    entries = [
        {
            "file": shards.name_of(facts["shard"]),
            "bytes": (folder / shards.name_of(facts["shard"])).stat().st_size,
            **{name: facts[name] for name in ("vectors", "crc32", "begin")},
        }
        for facts in done
    ]
    facts = {
        **{"format": shards.FORMAT, "kind": "activations", "vectors": total, "question": question, "mask": mask},
        **{"widths": widths, "norms": norms, "shards": entries},
        **{"provenance": provenance, "threads": torch.get_num_threads(), "versions": store.manifest()},
    }
    store.write_text(folder / INDEX, json.dumps({**facts, "sha256": _digest(facts)}, indent=1, sort_keys=True) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """This is what the index says; raises StoreError where it is not there, was changed, or is of a later format."""
    path = folder / INDEX
    if not path.is_file():
        half = len(list(folder.glob("shard-*.safetensors")))
        why = f"it is not full yet ({half} shards); call store_activations(...) with the same arguments to go on"
        nothing = "it holds no activations; fill it: store_activations(model, texts, site, folder)"
        raise StoreError(f"'{folder}' cannot be read: {why if half else nothing}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("sha256") != _digest(facts):
            raise ValueError("it does not match its checksum")
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise StoreError(
            f"'{path}' is damaged: {error}. Delete it and call store_activations(...) with the same arguments: whole "
            "shards are kept, and it is written anew"
        ) from error
    if facts["format"] > shards.FORMAT:
        raise StoreError(f"'{path}' has format {facts['format']}; {shards.FORMAT} is the latest read here; upgrade")
    return facts


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
