"""What lies in a folder that another package wrote: JSON, YAML, and tensors by name, with or without reading them.

`Tensors` gives the shape and dtype of every tensor of a safetensors or npz file from its header alone, and a tensor
when it is asked for. A pickle is never opened here: `convert` is the one place that does, and only on request.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from mechscope.errors import DictionaryError, UnsafeFileError, did_you_mean
from mechscope.store import refuse_unsafe

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors' header calls the dtypes of torch."""


class Tensors(Mapping[str, Tensor]):
    """This is the tensors of one safetensors or npz file by name; each is read when it is asked for.

    `shape(name)` and `dtype(name)` come from the file's header. Asking for a tensor that is not there raises
    DictionaryError with the names that are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DictionaryError(f"no file '{path}'. {names_in(path.parent)}")
        self._npz = path.suffix == ".npz"
        self._heads = _npz_heads(path) if self._npz else _safetensors_heads(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __contains__(self, name: object) -> bool:
        return name in self._heads

    def __getitem__(self, name: str) -> Tensor:
        self.shape(name)
        if self._npz:
            with np.load(self.path, allow_pickle=False) as arrays:
                return torch.from_numpy(np.ascontiguousarray(arrays[name]))
        with safetensors.safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def all(self) -> dict[str, Tensor]:
        """This is every tensor of the file, read at once."""
        return {name: self[name] for name in self} if self._npz else load_file(self.path)

    def shape(self, name: str) -> tuple[int, ...]:
        """This is a tensor's shape, from the header."""
        if name not in self._heads:
            raise DictionaryError(
                f"'{self.path}' has no tensor '{name}'{did_you_mean(name, self._heads) or '.'} "
                f"It holds: {', '.join(f'{n} {list(s)}' for n, (s, _) in sorted(self._heads.items()))}"
            )
        return self._heads[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """This is a tensor's dtype, from the header."""
        self.shape(name)
        return self._heads[name][1]


def json_of(path: Path) -> dict[str, Any]:
    """This is a JSON object from a file. Raises DictionaryError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DictionaryError(f"no file '{path}'. {names_in(path.parent)}") from None
    except (ValueError, OSError) as error:
        raise DictionaryError(f"'{path}' is not JSON that can be read ({error})") from error
    if not isinstance(value, dict):
        raise DictionaryError(f"'{path}' holds a JSON {type(value).__name__}, where an object of settings is expected")
    return value


def yaml_of(path: Path) -> dict[str, Any]:
    """This is a YAML mapping from a file, read by PyYAML's safe loader (transformers brings it along)."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DictionaryError(f"no file '{path}'. {names_in(path.parent)}") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise DictionaryError(f"'{path}' is not YAML that can be read ({error})") from error
    if not isinstance(value, dict):
        raise DictionaryError(f"'{path}' holds a YAML {type(value).__name__}, where a mapping of settings is expected")
    return value


def names_in(folder: Path, most: int = 8) -> str:
    """This is a sentence naming what a folder holds, for an error's end."""
    if not folder.is_dir():
        return f"There is no folder '{folder}'."
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"'{folder}' holds: {', '.join(names[:most])}{more}." if names else f"'{folder}' is empty."


def _safetensors_heads(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    refuse_unsafe(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {name: (tuple(part.get_shape()), DTYPES[part.get_dtype()]) for name, part in parts.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise DictionaryError(f"'{path}' is damaged: {error}. Copy or download it anew") from error


def _npz_heads(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """This reads each array's header and leaves its data; an array of Python objects (a pickle) is refused."""
    heads = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    old = version == (1, 0)
                    header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = header(file)
                if dtype.hasobject:
                    raise UnsafeFileError(
                        f"'{path}' holds '{entry}', an array of Python objects, and opening it can run code; "
                        "only plain arrays are read"
                    )
                heads[entry.removesuffix(".npy")] = shape, torch.from_numpy(np.empty(0, dtype)).dtype
    except (zipfile.BadZipFile, ValueError, OSError, TypeError) as error:
        raise DictionaryError(
            f"'{path}' is no npz file that can be read ({error}). Copy or download it anew"
        ) from error
    return heads
