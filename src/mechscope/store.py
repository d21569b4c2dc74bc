"""Results on disk: one safetensors file that carries one JSON header.

A result is tensors plus facts about them. `save` writes both into one file: the tensors as safetensors, the facts as
JSON under the key "mechscope" of the file's metadata. Every header says the format's version, the result's kind, the
version of mechscope that wrote it and two checksums, of the tensors and of the header itself, so that any changed
byte is noticed. The same parts give the same bytes. Files appear whole or not at all: they are written under another
name, flushed to the disk, then renamed. Nothing is ever unpickled.

    save(path, kind, tensors, header)      a result's parts to a file        read(path) is the inverse
    open(path)                             the result itself, as the class that owns its kind makes it
    header(path)                           the facts alone, without touching the tensors
    write_text(path, text)                 the same care for a page or a JSON file
    write_with(path, write)                the same care for what another library writes
    manifest()                             which versions made a result
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from mechscope._version import __version__
from mechscope.errors import StoreError, UnsafeFileError, did_you_mean

FORMAT = 1
"""The version of the file format that this module writes; it reads this one and older."""

KINDS: dict[str, str | Callable[[dict, dict[str, torch.Tensor]], Any]] = {
    "alignment-report": "mechscope.causal.alignment:AlignmentReport",
    "illusion-check": "mechscope.causal.illusion_report:Illusion",
    "causalgym-report": "mechscope.causal.gym:GymReport",
    "ravel-report": "mechscope.causal.ravel_scores:RavelReport",
    "scrub-report": "mechscope.causal.scrub_report:ScrubReport",
    "separability": "mechscope.causal.separability:Separability",
    "fidelity": "mechscope.causal.simplification:Fidelity",
    "subspace": "mechscope.causal.interchange:Subspace",
    "interventions": "mechscope.causal.interventions:Interventions",
    "edge-scores": "mechscope.circuits.scores:EdgeScores",
    "node-scores": "mechscope.circuits.node_scores:NodeScores",
    "circuit": "mechscope.circuits.scores:Circuit",
    "circuit-report": "mechscope.circuits.report:CircuitReport",
    "evidence": "mechscope.causal.evidence:Evidence",
    "affine-map": "mechscope.lenses.mapping:AffineMap",
    "logit-attribution": "mechscope.lenses.attributed:LogitAttribution",
    "flow-routes": "mechscope.circuits.information_flow:Routes",
    "attribution-patching": "mechscope.causal.attribution_patching:Attribution",
    "effect-table": "mechscope.causal.table:EffectTable",
    "lens-table": "mechscope.lenses.trajectory:Trajectory",
    "tuned-lens": "mechscope.lenses.tuned_lens:TunedLens",
    "heads": "mechscope.units.kinds:Heads",
    "head-importance": "mechscope.units.ablating:HeadImportance",
    "responses": "mechscope.units.responding:Responses",
    "universal-units": "mechscope.units.universality:Universal",
    "composition": "mechscope.weights.composition:Composition",
    "dictionary": "mechscope.dictionaries.dictionary:Dictionary",
    "decomposition": "mechscope.dictionaries.steering_vectors:Decomposition",
    "dictionary-report": "mechscope.dictionaries.evaluating.report:DictionaryReport",
    "run": "mechscope.models.result:Run",
}
"""Who makes a result of each kind: "module:Class" whose `from_parts(header, tensors)` is called, or a function."""


# Writing and reading results


def save(path: str | Path, kind: str, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> Path:
    """This writes `tensors` and `header` as one result of `kind`, whole or not at all, and returns the path.

    Missing folders on the way are made. `header` is any JSON: NaN and infinity are kept, as Python's json writes
    them; NumPy numbers and one-element tensors become plain numbers. The fields "format", "kind", "mechscope", "sha256"
    and "header_sha256" are the store's own and replace the caller's.

    Raises StoreError when the header is not JSON, when a value is not a dense tensor, or when the disk refuses; a
    file that was there before is then untouched.

    >>> path = save("scores.safetensors", "edge-scores", {"scores": torch.zeros(3)}, {"method": "eap"})
    >>> read(path)[0]["method"]
    'eap'
    """
    packed = _packed(tensors)
    own = {"format": FORMAT, "kind": kind, "mechscope": __version__, "sha256": _tensors_digest(packed)}
    try:
        facts = json.loads(json.dumps({**header, **own}, default=_plain))
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"the header of this {kind} is not plain JSON ({error}); give numbers, strings, lists and dicts"
        ) from error
    facts["header_sha256"] = _header_digest(facts)
    head = {"mechscope": json.dumps(facts)}

    def write(temporary: Path) -> None:
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(packed, temporary, metadata=head)
        except safetensors.SafetensorError as error:
            raise _as_os_error(error) from error
        temporary.chmod(mode)  # safetensors renames a file of its own, readable by the owner alone, over ours

    return write_with(Path(path), write)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """This returns the header and the tensors of a result (on the CPU), after checking both against their checksums.

    Raises StoreError for a file that is missing, damaged, newer than this mechscope or not a result, and
    UnsafeFileError for a pickle.
    """
    path = Path(path)
    facts = header(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if _tensors_digest(tensors) != facts.get("sha256"):
        raise _damaged(path, "the tensors do not match their checksum")
    return facts, tensors


def header(path: str | Path) -> dict[str, Any]:
    """This returns the header of a result without reading its tensors; the header's own checksum is verified.

    Raises as `read` does, except for damage that lies in the tensors alone.
    """
    path = Path(path)
    refuse_unsafe(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if "mechscope" not in head:
        raise StoreError(
            f"'{path}' is safetensors but not a mechscope result (no header). "
            "If it holds a model's weights, give its folder to ms.load(...)"
        )
    try:
        facts = json.loads(head["mechscope"])
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(facts, dict) or facts.get("header_sha256") != _header_digest(facts):
        raise _damaged(path, "the header does not match its checksum")
    if facts["format"] > FORMAT:
        raise StoreError(
            f"'{path}' has format {facts['format']}, written by mechscope {facts['mechscope']}; mechscope "
            f"{__version__} reads formats up to {FORMAT}. Upgrade: pip install -U mechscope"
        )
    return facts


def open(path: str | Path) -> Any:
    """This returns the result that a `.save(path)` wrote, as an object of the same class: the exact inverse.

    Raises StoreError for an unknown kind or a result with parts missing, and whatever `read` raises.

    >>> register("note", lambda header, tensors: header["text"])
    >>> open(save("note.safetensors", "note", {}, {"text": "a result of my own"}))
    'a result of my own'
    """
    facts, tensors = read(path)
    kind = facts["kind"]
    if kind not in KINDS:
        raise StoreError(
            f"'{path}' holds a result of kind '{kind}', which mechscope {__version__} does not know"
            f"{did_you_mean(kind, KINDS) or '.'} Kinds: {', '.join(sorted(KINDS))}. "
            "If it is your own, call mechscope.store.register(kind, from_parts) first"
        )
    owner = KINDS[kind]
    if isinstance(owner, str):
        module, name = owner.split(":")
        owner = getattr(import_module(module), name).from_parts
    try:
        return owner(facts, tensors)
    except KeyError as missing:
        raise StoreError(
            f"'{path}' is a {kind} without {missing}, which mechscope {__version__} needs; it was written by "
            f"mechscope {facts['mechscope']}. mechscope.store.read(path) still gives its header and tensors"
        ) from missing


def register(kind: str, from_parts: Callable[[dict, dict[str, torch.Tensor]], Any]) -> None:
    """This teaches `open` a new kind of result: `from_parts(header, tensors)` makes the object.

    Raises StoreError if another function already owns the kind.

    >>> register("my-result", lambda header, tensors: (header["note"], tensors["values"]))
    """
    if KINDS.get(kind, from_parts) != from_parts:
        raise StoreError(f"kind '{kind}' is already registered; choose another name. Kinds: {', '.join(sorted(KINDS))}")
    KINDS[kind] = from_parts


def write_text(path: str | Path, text: str) -> Path:
    """This writes a page or a JSON file in UTF-8, whole or not at all, and returns the path.

    Missing folders on the way are made. Raises StoreError when the disk refuses; a file that was there before is
    then untouched.
    """
    return write_with(Path(path), lambda temporary: temporary.write_bytes(text.encode()))


def manifest() -> dict[str, str]:
    """This is the versions that made a result (python, torch, transformers, mechscope); no machine, no path."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": metadata.version("transformers"),
        "mechscope": __version__,
    }


# What a file is, from its first bytes

_PICKLE_SUFFIXES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}


def refuse_unsafe(path: str | Path) -> None:
    """This returns only if `path` begins like a whole safetensors file, judged by its first bytes, not by its name.

    Raises UnsafeFileError for a pickle or a zip (what torch.save writes), and StoreError for a file that is missing,
    cut short or something else.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise _missing(path) from None
    except IsADirectoryError:
        raise StoreError(f"'{path}' is a folder, not a result's file. {_files_in(path)}") from None
    except OSError as error:
        raise StoreError(f"'{path}' cannot be read: {error.strerror}") from error

    # Safetensors opens with the length of a JSON object in 8 bytes; the length may look like a pickle's first bytes.
    if start[8:] == b"{":
        if 8 + int.from_bytes(start[:8], "little") > size:
            raise _damaged(path, "it ends inside its header")
        return
    looks_pickled = start[:1] == b"\x80" and len(start) > 1 and 2 <= start[1] <= 5
    if start[:2] == b"PK" or looks_pickled or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise UnsafeFileError(
            f"'{path}' is a pickle or a zip of one (as torch.save writes), and opening it can run code; only "
            "safetensors is read. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    if size < 9:
        raise _damaged(path, f"it has only {size} bytes")
    raise StoreError(f"'{path}' is not a safetensors file; results are written by their .save(path)")


def _missing(path: Path) -> StoreError:
    if not path.parent.is_dir():
        return StoreError(f"no file '{path}': there is no folder '{path.parent}'")
    names = [entry.name for entry in path.parent.iterdir()]
    return StoreError(f"no file '{path}'{did_you_mean(path.name, names) or '.'} {_files_in(path.parent)}")


def _files_in(folder: Path, most: int = 5) -> str:
    """This is a sentence naming the results that a folder holds, or saying that it holds none."""
    names = sorted(entry.name for entry in folder.glob("*.safetensors"))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"Files there: {', '.join(names[:most])}{more}." if names else "No safetensors file is there."


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"'{path}' is damaged: {why}. Make it again (its header, if readable, says how) or copy it anew")


# Whole or not at all


def write_with(path: Path, write: Callable[[Path], Any]) -> Path:
    """This lets `write` fill a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    Missing folders on the way are made. Raises StoreError when the disk refuses; a file that was there before is
    then untouched.
    """
    if path.name in ("", ".."):
        raise StoreError(f"cannot write '{path}': it is a folder; give the name of a file in it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"cannot write '{path}': {_advice(error, path)}. Nothing was changed") from error
    finally:  # also on Ctrl-C; after a successful rename there is nothing left to remove
        with contextlib.suppress(OSError):  # when the folder is out of reach, the file was never made
            temporary.unlink(missing_ok=True)
    return path


def _advice(error: OSError, path: Path) -> str:
    """This says what stopped a write and what to do about it."""
    folder = path.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space is left ({os.strerror(error.errno)}); free some, or give a path on another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write in '{folder}'; give a path in a folder of yours"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        file = next((part for part in [folder, *folder.parents] if part.exists() and not part.is_dir()), folder)
        return f"'{file}' is a file, not a folder; give another path"
    if error.errno == errno.EISDIR:
        return "it is a folder; give the name of a file in it"
    return f"{error.strerror or error}; give another path"


def _as_os_error(error: safetensors.SafetensorError) -> OSError:
    """This turns what safetensors says in words ("... (os error 28)") into the error that the system gave."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


# Checksums


def _packed(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """This is the tensors as safetensors wants them: dense, contiguous, on the CPU, each in memory of its own."""
    packed: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            what = f"a {tensor.layout} tensor" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise StoreError(f"'{name}' is {what}; results hold dense torch tensors, other facts go into the header")
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        packed[name] = tensor
    return packed


def _tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """This is the SHA-256 of every tensor's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header_digest(facts: dict[str, Any]) -> str:
    """This is the SHA-256 of the header's JSON, keys sorted, without the field that holds this very checksum."""
    rest = {name: fact for name, fact in facts.items() if name != "header_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """This is a NumPy number or a one-element tensor as a Python number, for JSON."""
    if getattr(value, "size", None) == 1 or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r:.60}")
