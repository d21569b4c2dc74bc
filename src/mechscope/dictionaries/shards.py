"""One shard of an activation store: a safetensors file with the vectors of each site, and where they came from.

A shard stands by itself. Its header says what was asked, from which place in the texts its vectors were made and where
the next shard begins, the sums that norms are computed from, and a checksum of every vector's bytes; another one guards
the header. The same vectors give the same bytes. It is written whole or not at all, and read as a memory map.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mechscope import store
from mechscope.errors import DictionaryError, StoreError, UnsafeFileError

if TYPE_CHECKING:
    from mechscope.models.stream import Stream

HEADER = "activations"
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def name_of(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def as_kept(vectors: dict[str, Tensor], dtype: torch.dtype, most: int | None) -> dict[str, Tensor]:
    """This is a shard's vectors as they are kept; raises DictionaryError where the dtype cannot hold them."""
    kept = {site: x[:most].to(dtype).cpu().contiguous() for site, x in vectors.items()}
    for site, x in kept.items():
        if not x.isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise DictionaryError(
                f"{site} has values that {name} cannot hold (or the model gave none that are finite); store them as "
                "dtype='bfloat16' or 'float32', or leave out outliers: mask=TokenMask(outliers=10)"
            )
    return kept


def facts_about(number: int, vectors: dict[str, Tensor], stream: Stream, question: dict[str, Any]) -> dict[str, Any]:
    """This is what a shard says of itself: what was asked, sums of its norms, where it and the next one begin."""
    sums = {}
    for site, x in vectors.items():
        norms = torch.cat([torch.linalg.vector_norm(some.float(), dim=1) for some in x.split(2**14)]).double()
        sums[site] = [norms.sum().item(), norms.square().sum().item(), norms.max().item()]
    size = len(next(iter(vectors.values())))
    places = {"begin": stream.window(), "end": stream.state()}
    return {"format": FORMAT, "shard": number, "vectors": size, "sums": sums, "question": question, **places}


def checksum(vectors: dict[str, Tensor]) -> int:
    """This is the CRC-32 of every tensor's name, type, shape and bytes, in the order of the names."""
    crc = 0
    for name, x in sorted(vectors.items()):
        crc = zlib.crc32(f"{name}\0{x.dtype}\0{tuple(x.shape)}\0".encode(), crc)
        crc = zlib.crc32(x.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc


def write(path: Path, vectors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
    """This writes a shard, whole or not at all, and returns its facts with the checksum of the vectors in them."""
    facts = {**facts, "crc32": checksum(vectors)}
    # One entry: safetensors writes several in an order that is not always the same.
    head = {HEADER: json.dumps({**facts, "header_crc32": _of_header(facts)}, sort_keys=True)}

    def save(temporary: Path) -> None:
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(vectors, temporary, metadata=head)
        temporary.chmod(mode)  # safetensors renames a file of its own, readable by the owner alone, over ours

    store.write_with(path, save)
    return facts


def facts_of(path: Path) -> dict[str, Any]:
    """This is what a shard's header says; raises StoreError where it is missing, cut short or changed."""
    with _opened(path) as file:
        try:
            facts = json.loads((file.metadata() or {})[HEADER])
            if facts.pop("header_crc32") != _of_header(facts):
                raise ValueError("its header does not match its checksum")
        except (KeyError, ValueError, AttributeError) as error:
            raise StoreError(f"'{path}' is damaged: {error}") from error
    return facts


def mapped(path: Path, crc32: int | None = None) -> dict[str, Tensor]:
    """This is the vectors of a shard as a memory map, checked against `crc32` where it is given.

    Raises StoreError where the file is missing, cut short or changed.
    """
    with _opened(path) as file:
        vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    if crc32 is not None and checksum(vectors) != crc32:
        raise StoreError(f"'{path}' is damaged: its vectors do not match their checksum")
    return vectors


def whole(path: Path) -> dict[str, Any] | None:
    """This is the facts of a shard whose header and vectors match their checksums; None of any other, or of none."""
    if not path.exists():
        return None
    try:
        facts = facts_of(path)
        mapped(path, facts["crc32"])
    except (StoreError, KeyError):
        return None
    return facts


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        store.refuse_unsafe(path)
    except UnsafeFileError:  # a changed first byte may look like a pickle's
        raise StoreError(f"'{path}' is damaged: it does not begin like a safetensors file") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, UnicodeError) as error:
        raise StoreError(f"'{path}' is damaged: {error}") from error


def _of_header(facts: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())
