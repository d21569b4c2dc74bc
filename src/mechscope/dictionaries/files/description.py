"""What is known of a dictionary in another package's file before its weights are read, and what had to be assumed.

    Settings       a config's keys: those that are understood, those that are missing, those that nobody knows
    Description    the dictionary that the folder holds: architecture, sizes, sites, options, assumptions

`inspect` prints a description; `read` builds the dictionary from one and the tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechscope.errors import DictionaryError, did_you_mean
from mechscope.models.token_mask import TokenMask

_NEEDED = object()


class Settings:
    """This is a config's keys, with a record of which were asked for.

    `take` gives a value; a missing key gives its default, with a sentence among the assumptions, or raises
    DictionaryError naming the key. `unknown` is the keys that nobody asked for.
    """

    def __init__(self, values: dict[str, Any], path: Path, notes: list[str]) -> None:
        self.values, self.path, self.notes = values, path, notes
        self._known: set[str] = set()

    def take(self, key: str, default: Any = _NEEDED, *, why: str | None = None) -> Any:
        """This is the value of `key`; without it, `default`, with `why` noted where it is given."""
        self._known.add(key)
        if key in self.values and self.values[key] is not None:
            return self.values[key]
        if default is _NEEDED:
            raise DictionaryError(
                f"'{self.path}' lacks '{key}'{did_you_mean(key, self.values) or '.'} "
                f"It has: {', '.join(self.values) or 'nothing'}. Add '{key}' to the file"
            )
        if why is not None:
            self.notes.append(why)
        return default

    def unknown(self, harmless: Iterable[str] = ()) -> list[str]:
        """This is the keys that were not asked for and are not among `harmless`; a warning names them."""
        left = sorted(set(self.values) - self._known - set(harmless))
        if left:
            warnings.warn(
                f"'{self.path}' has keys that mechscope does not know, and leaves alone: {', '.join(left)}",
                stacklevel=4,
            )
        return left


@dataclass
class Description:
    """This is what a folder holds, without its weights.

    layout: whose format it is. architecture: the class of mechscope.dictionaries that it becomes. reads, writes: its
    sites, None where the file does not tell. centred: whether b_dec is taken off the input. skip: whether a linear
    path goes past the features. scale: what inputs are multiplied by, folded into the weights on reading. per_vector:
    the normalisation of each vector by itself, "layer_norm" or "constant_norm_rescale". options: of the architecture.
    dtype: of the stored weights (held as float32). config: the file's own settings. assumptions: a sentence each.
    """

    layout: str
    path: Path
    architecture: str
    d_in: int
    n_latents: int
    d_out: int
    reads: str | list[str] | None
    writes: str | list[str] | None
    centred: bool = False
    skip: bool = False
    scale: float = 1.0
    per_vector: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    model: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    @property
    def is_transcoder(self) -> bool:
        return self.reads != self.writes or self.d_in != self.d_out or self.skip

    def assume(self, *sentences: str) -> None:
        """This notes what was assumed, each sentence once."""
        self.assumptions += [sentence for sentence in sentences if sentence not in self.assumptions]

    def __str__(self) -> str:
        where = _shown(self.reads) + ("" if self.reads == self.writes else f" -> {_shown(self.writes)}")
        sizes = f"{self.d_in} -> {self.n_latents} -> {self.d_out}"
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        lines = [
            f"{self.architecture}({options})  {sizes}  {self.dtype}",
            f"  layout   {self.layout}",
            f"  site     {where}",
            f"  model    {self.model or 'not named'}",
        ]
        lines += [f"  {name:<8} {value}" for name, value in self.facts.items() if name != "mask"]
        if "mask" in self.facts:
            lines.append(f"  tokens   {TokenMask.from_json(self.facts['mask'])}")
        return "\n".join(lines + [f"  assumed: {what}" for what in self.assumptions])


def _shown(sites: str | list[str] | None) -> str:
    if isinstance(sites, list):
        return f"{sites[0]} ... {sites[-1]} ({len(sites)} sites)" if len(sites) > 3 else ", ".join(sites)
    return sites or "not named"
