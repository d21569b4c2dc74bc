"""Other packages' files, read and written without those packages: which layout a folder has, and what is in it.

    inspect(path)                    what a folder or file holds, without its weights
    read(path)                       the dictionary; a dict of them where a folder holds several
    write(dictionary, path, layout)  the other way
    LAYOUTS                          the layouts by name

A layout is a module with `recognise`, `describe`, `read` and `write`. Nothing is downloaded and nothing unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mechscope import store
from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.files import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    saelens,
    sparsify,
)
from mechscope.dictionaries.files.description import Description
from mechscope.dictionaries.files.raw import names_in
from mechscope.errors import DictionaryError, StoreError, UnsafeFileError, did_you_mean

OWN = "mechscope"
LAYOUTS: dict[str, Any] = {
    layout.NAME: layout
    for layout in (saelens, sparsify, dictionary_learning, gemma_scope, gemma_scope_2, circuit_tracer)
}
"""The layouts by name, in the order in which they are tried; our own files are "mechscope"."""


def inspect(path: str | Path, *, layout: str | None = None, site: str | None = None) -> Any:
    """This is what a folder or file holds, told from its settings and its weights' headers alone: print it.

    Returns a Description, or a dict of them where there are several. No tensor is read. Raises as `read` does.
    """
    path = Path(path)
    named = recognise(path) if layout is None else layout
    if named == OWN:
        return _own(path)
    if named is None:
        return {name: inspect(folder, site=site) for name, folder in _below(path).items()}
    described = _layout(named).describe(path)
    if isinstance(described, Description) and site is not None:
        _place(described, site)
    return described


def read(
    path: str | Path, *, layout: str | None = None, site: str | None = None, scale: float | None = None
) -> Dictionary | dict[str, Dictionary]:
    """This is the dictionary that a local folder or file holds, in the site's own units and ready for use.

    layout: one of LAYOUTS; told from the folder's files by default. site: where it reads and writes, "reads -> writes"
    for a transcoder, where the file does not tell or tells wrongly. scale: what inputs are multiplied by before
    encoding, where the file should hold it and does not (see `check`).

    A folder with the transcoders of every layer gives a dict, by the site that each writes; a folder of folders gives
    one by their names. What was assumed stands in `dictionary.facts["assumptions"]`, and in its repr. Keys of a config
    that nobody knows give a warning.

    Raises DictionaryError for a folder of no known layout, a missing key (named) or tensors of the wrong shape, and
    UnsafeFileError for a pickle.
    """
    path = Path(path)
    named = recognise(path) if layout is None else layout
    if named == OWN:
        return store.open(path)
    if named is None:
        return {name: read(folder, site=site, scale=scale) for name, folder in _below(path).items()}  # type: ignore[misc]
    owner = _layout(named)
    described = owner.describe(path)
    if not isinstance(described, Description):
        return {name: _one(owner, one.path, one, None, scale) for name, one in described.items()}
    return _one(owner, path, described, site, scale)


def _one(owner: Any, path: Path, described: Description, site: str | None, scale: float | None) -> Dictionary:
    if site is not None:
        _place(described, site)
    if scale is not None:
        described.scale = scale
        described.assume(f"inputs are multiplied by {scale:.6g}, as was asked")
    if described.dtype != "float32":
        described.assume(f"the weights are stored as {described.dtype}, and held as float32")
    return owner.read(path, described)


def _place(described: Description, site: str) -> None:
    reads, _, writes = (part.strip() for part in site.partition("->"))
    described.reads, described.writes = reads, writes or reads
    described.assumptions = [what for what in described.assumptions if "give site=" not in what]
    described.assume(f"the site is {site}, as was asked")


def write(dictionary: Dictionary | dict[str, Dictionary], path: str | Path, *, layout: str) -> Path:
    """This writes a dictionary as another package's folder, and returns the folder.

    The scales are folded into the weights. Raises DictionaryError where the layout cannot hold the dictionary, with one
    that can.
    """
    path = Path(path)
    if layout == OWN:
        if isinstance(dictionary, dict):
            raise DictionaryError("mechscope's own file holds one dictionary; save each: dictionary.save(path)")
        return dictionary.save(path)
    owner = _layout(layout)
    if isinstance(dictionary, dict) and owner is not circuit_tracer:
        for name, one in dictionary.items():
            owner.write(one, path / name)
        return path
    return owner.write(dictionary, path)


def recognise(path: str | Path) -> str | None:
    """This is the name of the layout of a folder or file, or None.

    Raises UnsafeFileError for a pickle, and DictionaryError where nothing is there.
    """
    path = Path(path)
    if not path.exists():
        raise DictionaryError(f"there is no '{path}'. {names_in(path.parent)}")
    if path.suffix in (".pt", ".pth", ".pkl", ".bin"):
        raise UnsafeFileError(
            f"'{path}' is a pickle, and opening one can run code. If you trust it: "
            f"mechscope.dictionaries.convert({str(path)!r}) writes the same tensors as safetensors; "
            "an SAELens file from before 3.0 holds Python objects besides: save it again with that version"
        )
    named = next((name for name, layout in LAYOUTS.items() if layout.recognise(path)), None)
    if named is None and path.is_file():
        try:
            if store.header(path)["kind"] == "dictionary":
                return OWN
        except StoreError as error:
            raise DictionaryError(f"'{path}' is no dictionary that is known ({error}). {_known()}") from error
        raise DictionaryError(f"'{path}' is a mechscope file of another kind. {_known()}")
    return named


def _layout(name: str) -> Any:
    if name not in LAYOUTS:
        raise DictionaryError(f"no layout '{name}'{did_you_mean(name, [*LAYOUTS, OWN])}. {_known()}")
    return LAYOUTS[name]


def _known() -> str:
    return f"Layouts: {', '.join([*LAYOUTS, OWN])}"


def _below(path: Path) -> dict[str, Path]:
    """This is the folders of known layouts somewhere below a folder, by their names relative to it."""
    found: dict[str, Path] = {}
    for folder in sorted(entry for entry in path.rglob("*") if entry.is_dir()):
        if not any(folder.is_relative_to(above) for above in found.values()) and recognise(folder) is not None:
            found[folder.relative_to(path).as_posix()] = folder
    if not found:
        raise DictionaryError(f"'{path}' holds no dictionary of a layout that is known. {names_in(path)} {_known()}")
    return found


def _own(path: Path) -> Description:
    """This describes our own file, from its header."""
    head = store.header(path)
    options = dict(head["options"])
    inner = options.get("coder", {}).get("options", options)
    d_in = inner.get("d_in", inner.get("d", 0))
    n_latents = inner.get("n_latents") or inner.get("n_layers", 0) * inner.get("per_layer", 0)
    facts = dict(head["facts"])
    assumptions = facts.pop("assumptions", [])
    return Description(
        OWN, path, head["architecture"], d_in, n_latents, inner.get("d_out") or d_in, head["reads"],
        head["writes"], options={n: v for n, v in options.items() if n not in ("d_in", "n_latents", "d_out", "coder")},
        model=facts.get("model"), facts={n: v for n, v in facts.items() if n not in ("config", "model")},
        assumptions=assumptions,
    )  # fmt: skip
