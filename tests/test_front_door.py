"""The front door is short, pinned and cheap: its names are the written list, and opening it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import mechscope

NAMES = [
    "Model",
    "Run",
    "__version__",
    "add",
    "causal",
    "circuits",
    "dictionaries",
    "edits",
    "errors",
    "freeze",
    "labs",
    "lenses",
    "load",
    "mean",
    "models",
    "open",
    "patch",
    "patch_sweep",
    "project",
    "resample",
    "scale",
    "set",
    "store",
    "tasks",
    "unchanged",
    "units",
    "view",
    "viz",
    "weights",
    "zero",
]

HEAVY = {"transformers", "pandas", "sklearn", "plotly", "matplotlib", "scipy", "networkx", "rich", "typer"}


def modules_after(statement: str) -> set[str]:
    """The modules that a new interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_names_are_the_written_list():
    assert sorted(mechscope.__all__) == NAMES
    assert dir(mechscope) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name):
    assert getattr(mechscope, name) is getattr(mechscope, name)


def test_it_defines_nothing():
    own = {
        name
        for name, value in vars(mechscope).items()
        if isinstance(value, types.FunctionType | type) and value.__module__ == "mechscope"
    }
    assert own == {"__getattr__", "__dir__"}


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = mechscope.laod


def test_import_brings_one_module_and_no_torch():
    before, after = modules_after("import importlib, typing, __future__"), modules_after("import mechscope")
    assert after - before == {"mechscope", "mechscope._version"}


@pytest.mark.parametrize("statement", ["mechscope.errors", "mechscope.store", "mechscope.models", "mechscope.edits"])
def test_rooms_that_every_user_opens_stay_light(statement):
    loaded = {name.split(".")[0] for name in modules_after(f"import {statement}")}
    assert not loaded & HEAVY


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert mechscope.__version__ == version("mechscope")


def test_no_name_of_the_causal_room_is_hidden_by_a_module():
    """Importing a module puts its name on the package, where it would hide a function of the same name."""
    from pathlib import Path

    from mechscope import causal

    modules = {path.stem for path in Path(causal.__path__[0]).glob("*.py")}
    assert not modules & set(causal.__all__)
    assert all(getattr(causal, name) is not None for name in causal.__all__)
