"""Run the benchmarks: a table each in the terminal, everything in one JSON file.

    OMP_NUM_THREADS=1 python benchmarks/run.py                      all of them
    python benchmarks/run.py --only forward --quick                 one of them, with few rounds
    python benchmarks/run.py --check                                exit status 1 where a target is missed

Times depend on the machine, ratios much less. No test asserts them.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from measure import Options, Row, machine, table

NAMES = (
    "imports",
    "forward",
    "attribution",
    "discovery",
    "sweep",
    "agreement",
    "lenses",
    "weights",
    "units",
    "atlas",
    "dictionaries",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure mechscope against its targets and its peers.")
    parser.add_argument("--only", choices=NAMES, action="append", help="one benchmark; may be given again")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--no-peers", action="store_true", help="install and run no other tools")
    parser.add_argument("--eap-ig-env", type=Path, help="a virtual environment that has EAP-IG's own code")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="the JSON file (benchmarks.json)")
    parser.add_argument("--page", type=Path, help="also write the tables as a Markdown page")
    return parser.parse_args()


def main() -> int:
    import json

    from rich.console import Console

    asked = arguments()
    options = Options(asked.quick, not asked.no_peers, asked.eap_ig_env)
    console = Console(width=None if sys.stdout.isatty() else 140)
    # What was not asked for this time keeps its figures, with the machine that they were measured on.
    found = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    for name in asked.only or NAMES:
        module = import_module(name)
        about, rows = module.__doc__ or "", list[Row]()
        found[name] = {"about": about, "machine": machine(), "rows": []}
        for row in module.measured(options):
            rows.append(row)
            found[name]["rows"].append(row.to_dict())
            written(asked.out, found)  # a benchmark that is stopped keeps the rows that it had
        console.print(table(rows, f"{name}: {about.splitlines()[0]}"), "")
    console.print(f"written to {asked.out}")
    if asked.page is not None:
        from page import page

        before = asked.page.read_text() if asked.page.is_file() else ""
        asked.page.write_text(page(found, before))
    missed = [row["what"] for name in asked.only or NAMES for row in found[name]["rows"] if row["met"] is False]
    if missed:
        console.print(f"missed: {'; '.join(missed)}")
    return 1 if missed and asked.check else 0


def written(path: Path, found: dict) -> None:
    """This writes all of a file or nothing."""
    import json

    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1))
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
