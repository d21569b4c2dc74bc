"""The command line: each command calls one function of the library and prints what it returns.

Results go to standard output, progress and warnings to standard error. With `--json`, standard output is one JSON
object and nothing else. A mistake gives one message and exit code 2; Ctrl-C says what was saved and exits with 130.
Nothing heavy is imported before a command needs it, so that help is there at once.

A command is a function in one of the modules here, in the order in which help lists them.
"""

from __future__ import annotations

import os
import sys
import warnings

from mechscope.cli.program import app

from mechscope.cli import circuits, questions, readings, atlas, dictionaries, models, results, known  # isort: skip  # help lists them in this order

__all__ = ["app", "atlas", "circuits", "dictionaries", "known", "main", "models", "questions", "readings", "results"]


def quiet() -> None:
    """This keeps other libraries' chatter out of the terminal; mechscope's own warnings become one line each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|scipy|numpy)(\.|$)")
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def main() -> None:
    """This runs the command line."""
    quiet()
    app()


if __name__ == "__main__":
    main()
