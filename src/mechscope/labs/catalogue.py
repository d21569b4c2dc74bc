"""Every laboratory: listed at once from an index, imported when one is wanted.

    entries()             what there is: name, kind, size, what is known
    find("rasp-reverse")  the `Lab` itself, whose `check` gives the evidence and whose `run` ends in a plot

The index, `catalogue.json`, is what the rooms in ROOMS say of themselves, so that a list needs no torch;
`python -m mechscope.labs.catalogue` writes it again, and a test holds it to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from mechscope import errors
from mechscope.labs.lab import Kind, Lab, others

ROOMS = (
    "rasp",
    "planted",
    "siit",
    "modular_addition",
    "induction",
    "docstring",
    "dyck",
    "iteration",
    "addition",
    "superposition",
    "sparse",
    "facts",
    "lessons",
    "grammar",
    "published",
)
"""The packages of laboratories, in the order of the list; each has a module `lab` with its `LABS`."""

INDEX = Path(__file__).with_name("catalogue.json")


@dataclass(frozen=True)
class Entry:
    """This is what the list says of a laboratory; `room` is where it is, `file` what it needs of other people's."""

    name: str
    kind: Kind
    size: str
    known: str
    room: str
    file: str = ""

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "kind": self.kind, "size": self.size, "known": self.known}


def entries() -> list[Entry]:
    """This is every laboratory that can be run here: one that needs a file of others is left out where it is not."""
    return [entry for entry in _index() if not entry.file or (others() / entry.file).is_file()]


def find(name: str) -> Lab:
    """This is a laboratory by its name. Raises LabError, with the nearest names, where there is none.

    >>> find("and-gate").kind
    'planted'
    """
    known = {entry.name: entry for entry in _index()}
    if name not in known:
        near = errors.did_you_mean(name, [entry.name for entry in entries()])
        raise errors.LabError(f"no laboratory {name!r}{near or '.'} `mechscope lab list` lists them")
    return next(lab for lab in _labs(known[name].room) if lab.name == name)


def built() -> list[Entry]:
    """This is the index as the rooms themselves have it."""
    return [Entry(lab.name, lab.kind, lab.size, lab.known, room, lab.file) for room in ROOMS for lab in _labs(room)]


def _labs(room: str) -> tuple[Lab, ...]:
    return import_module(f"mechscope.labs.{room}.lab").LABS


def _index() -> Iterator[Entry]:
    return (Entry(**row) for row in json.loads(INDEX.read_text()))


if __name__ == "__main__":
    from mechscope import store

    store.write_text(INDEX, json.dumps([asdict(entry) for entry in built()], indent=1, ensure_ascii=False) + "\n")
    print(f"{len(built())} laboratories in {INDEX.name}")
