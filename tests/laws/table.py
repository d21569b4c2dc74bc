"""The table of `docs/architectures.md`, from a run: `cd tests && python -m laws.table > ../docs/architectures.md`.

It runs the laws of this folder once, in a process of its own (or reads the report that `pytest --junitxml` left, where
one is named), loads every architecture of `architectures.py`, and says
for each which sites it has, which identities were proved with what error, how many laws held, and what is absent.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers

import mechscope as ms
from architectures import ARCHITECTURES, CAUSAL, REFUSED
from mechscope.models.sites import SITES

ROOT = Path(__file__).parents[2]
RARE = ("embed", "pos_embed", "mlp_up", "router", "experts", "expert_weight", "expert_post", "ssm")
COMMON = [site.name for site in SITES if site.name not in RARE and not site.name.startswith("cross_")]

INTRO = """\
# What was checked of which architecture

Printed by `python -m laws.table`, in `tests`, which builds a tiny random model of every architecture (see
`tests/architectures.py`), loads it, and runs the laws of `tests/laws`: reading changes nothing; writing back what was
read changes nothing; writing noise changes the logits, and no other row's; the identities of the site table, computed
anew from what was saved; patching everything restores the clean run; padded equals unpadded on either side; cached
generation equals uncached, with and without edits; gradients are slopes.

{versions}; {count} architectures, {causal} of them causal language models; {passed:,} laws held and {failed} failed.

"Identities" are the ones that `ms.load` proves before it hands out a model (`model.certificate`), with the largest
error on a short input, relative to the largest value; each must be below 1e-5. `*` marks a site that only some of the
blocks have. Every block has `resid_pre` and `resid_post`; the common sites are `{common}`.
"""


def run_laws() -> ElementTree.Element:
    """This runs the laws and is pytest's report of them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "laws.xml"
        command = [sys.executable, "-m", "pytest", "tests/laws", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        return ElementTree.parse(report).getroot()


def count(report: ElementTree.Element) -> tuple[Counter[str], Counter[str]]:
    """This counts, for each architecture, the laws that held and those that did not."""
    held, failed = Counter[str](), Counter[str]()
    for case in report.iter("testcase"):
        of = (case.get("name") or "").partition("[")[2].rstrip("]")
        name = next((n for n in (of, of.rpartition("-")[0]) if n in ARCHITECTURES), "")
        (failed if case.find("failure") is not None or case.find("error") is not None else held)[name] += 1
    return held, failed


def short_names(model: ms.Model) -> dict[str, bool]:
    """This is the short names of a model's sites, and whether every block has each."""
    blocks = len(model.anatomy.blocks)
    count = Counter(site.rsplit(".", 1)[-1] for site in model.sites())
    return {name: n == blocks or name in ("embed", "pos_embed", "final", "logits") for name, n in count.items()}


def row(name: str, model: ms.Model, held: int, failed: int) -> str:
    """This is one architecture's line of the table."""
    names = short_names(model)
    lacks = [f"`{n}`" if n not in names else f"`{n}`*" for n in COMMON if not names.get(n)]
    beyond = [f"`{n}`" if whole else f"`{n}`*" for n, whole in names.items() if n not in COMMON]
    identities = model.certificate.identities
    worst = max((i.error for i in identities), default=0.0)
    laws_held = f"{held} of {held + failed}" if failed else str(held)
    features = " ".join(ARCHITECTURES[name].features)
    return (
        f"| {name} | {features} | {len(model.sites())} | {' '.join(beyond) or '–'} | {' '.join(lacks) or '–'} "
        f"| {len(identities)}, {worst:.0e} | {laws_held} |"
    )


def absences(models: dict[str, ms.Model]) -> list[str]:
    """This is what is absent and why: a line for each reason, with its sites and architectures."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = defaultdict(lambda: ({}, {}))
    for name, model in models.items():
        for site, reason in model.absent.items():
            if "the identity" in reason and name in REFUSED:
                continue  # said under the refusals
            sites, names = found[reason]
            sites[site.rsplit(".", 1)[-1]] = names[name] = None
    lines = []
    for reason, (sites, names) in sorted(found.items(), key=lambda item: -len(item[1][1])):
        who = f"{len(names)} of the {len(models)}" if len(names) > 30 else ", ".join(names)
        lines.append(f"| {reason} | {' '.join(f'`{s}`' for s in sites)} | {who} |")
    return lines


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    held, failed = count(ElementTree.parse(sys.argv[1]).getroot() if len(sys.argv) > 1 else run_laws())
    models = {name: ms.load(a.make(), partial=name in REFUSED) for name, a in ARCHITECTURES.items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    counts = {"count": len(models), "causal": len(CAUSAL), "passed": held.total(), "failed": failed.total()}
    print(INTRO.format(versions=versions, **counts, common=" ".join(COMMON)))
    print("| architecture | features | sites | beyond the common | lacks | identities, worst error | laws |")
    print("|---|---|---|---|---|---|---|")
    for name, model in models.items():
        if name not in REFUSED:
            print(row(name, model, held[name], failed[name]))
    print("\n## Refused, unless loaded with `partial=True`\n")
    print("The laws were checked on the sites that `partial=True` lists.\n")
    print("| architecture | what `ms.load` says | why | laws |\n|---|---|---|---|")
    for name, why in REFUSED.items():
        try:
            ms.load(ARCHITECTURES[name].make())
        except ms.errors.IdentityError as error:
            print(f"| {name} | {str(error).partition(' ms.load(')[0]} | {why} | {held[name]} |")
    print("\n## What is absent, and why\n\n| reason | sites | architectures |\n|---|---|---|")
    print("\n".join(absences(models)))


if __name__ == "__main__":
    main()
