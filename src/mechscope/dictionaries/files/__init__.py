"""Dictionaries in other packages' files, from local folders: inspected, read, checked on activations, written.

    inspect("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")     what it is, and what is assumed
    sae = read("saes/blocks.8.hook_resid_pre")                            the dictionary, in the site's own units
    print(check(sae, activations))                                        does it reconstruct? if not, what would
    write(sae, "out", layout="sparsify")

Layouts: SAELens, sparsify, dictionary_learning, Gemma Scope, Gemma Scope 2, circuit-tracer, and our own file. None of
those packages is needed, nothing is downloaded, and no pickle is opened unless you ask (`convert`).
"""

from mechscope.dictionaries.files.building import fold_gain
from mechscope.dictionaries.files.checking import Check, check
from mechscope.dictionaries.files.description import Description
from mechscope.dictionaries.files.dictionary_learning import convert
from mechscope.dictionaries.files.layouts import LAYOUTS, inspect, read, recognise, write
from mechscope.dictionaries.files.normed import Normed

__all__ = [
    "LAYOUTS",
    "Check",
    "Description",
    "Normed",
    "check",
    "convert",
    "fold_gain",
    "inspect",
    "read",
    "recognise",
    "write",
]
