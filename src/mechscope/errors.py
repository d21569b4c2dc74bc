"""Every exception that a user of mechscope can meet, as a tree.

    MechscopeError
    ├── LoadError            a model, a tokenizer or weights could not be read
    │   ├── IdentityError    a model's sites could not be proved: names the identity that failed
    │   └── UnsafeFileError  a pickle where safetensors is expected
    ├── SiteError            a site name that does not exist, is absent here, or was never reached
    ├── EditError            an edit that changed nothing, has the wrong shape, or cannot be written down
    ├── GradientError        a gradient that does not exist
    ├── TokenError           text that cannot be tokenised as asked
    ├── TaskError            a task that is empty, malformed, or that the model cannot do
    │   └── AlignmentError   clean and corrupt prompts that do not line up, with a picture of where they part
    ├── CausalError          an intervention that cannot be made, or a table of effects asked for what it lacks
    ├── CircuitError         an edge or a circuit that does not fit the graph, or a method that failed its own check
    ├── LabError             a laboratory that does not exist, or that cannot be run here
    │   └── RaspError        a RASP program that is none, or that no transformer computes
    └── StoreError           a result that cannot be written or read

Each message says what was asked, what exists, and what to type next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MechscopeError(Exception):
    """This is the root of the tree: catch it to catch every error that mechscope raises on purpose."""


class LoadError(MechscopeError):
    """This says that a model, a tokenizer or weights could not be read."""


class IdentityError(LoadError):
    """This says that a model's activations do not obey the named identity, so its sites cannot be trusted."""


class UnsafeFileError(LoadError):
    """This says that a file could run code when opened; only safetensors and JSON are read."""


class SiteError(MechscopeError):
    """This says that a site does not exist, is absent in this architecture, or was not reached by the forward."""


class EditError(MechscopeError):
    """This says that an edit changed nothing, returned the wrong shape, or cannot be written as JSON."""


class GradientError(MechscopeError):
    """This says that a gradient was asked for where none exists."""


class TokenError(MechscopeError):
    """This says that text cannot be tokenised as asked."""


class TaskError(MechscopeError):
    """This says that a task is empty or malformed, or that the model does not do it."""


class AlignmentError(TaskError):
    """This says that a clean and a corrupt prompt do not line up token by token."""


class CausalError(MechscopeError):
    """This says that an intervention cannot be made as asked, or that a table of effects lacks what was asked for."""


class CircuitError(MechscopeError):
    """This says that an edge is not in the graph, or that a method failed its own check."""


class LensError(MechscopeError):
    """This says that a lens cannot look as asked: a site that is no stream, a file of another model, no such token."""


class WeightsError(MechscopeError):
    """This says that a model's matrices cannot be read as asked: a head or layer that is not there, no attention."""


class UnitsError(MechscopeError):
    """This says that heads or neurons cannot be read as asked: no such unit, no text, a folder of another harvest."""


class DictionaryError(MechscopeError):
    """This says that a dictionary, its training or its file is not what was asked for, or that data does not fit it."""


class LabError(MechscopeError):
    """This says that a laboratory does not exist, or cannot be run here."""


class RaspError(LabError):
    """This says that a RASP program is none: which s-op is wrong, how, and what to write instead."""


class StoreError(MechscopeError):
    """This says that a result cannot be written or read."""


def did_you_mean(asked: str, known: Iterable[str], most: int = 3) -> str:
    """This is the clause "did you mean ...?" for the names in `known` nearest to `asked`, or "" when none is near.

    >>> did_you_mean("resid_psot", ["resid_post", "mlp_out"])
    "; did you mean 'resid_post'?"
    """
    near = difflib.get_close_matches(asked, list(known), n=most, cutoff=0.6)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else ""
