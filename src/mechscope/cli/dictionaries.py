"""The command that trains dictionaries: autoencoders and transcoders for any sites of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechscope.cli.program import Json, ModelName, Seed, app, plainly, print_json
from mechscope.cli.progress import progressing


@app.command(short_help="Train sparse autoencoders and transcoders for a model's sites.")
@plainly
def dictionaries(
    model: ModelName,
    text: Annotated[Path, typer.Option(help="A text file; texts are divided by <|endoftext|>, else by empty lines.")],
    out: Annotated[Path, typer.Option(help="Folder for the dictionaries.")] = Path("mechscope-out/dictionaries"),
    at: Annotated[
        list[str] | None,
        typer.Option(help="A site or a wildcard; 'A->B' is a transcoder from A to B. [all streams, all MLPs]"),
    ] = None,
    architecture: Annotated[str, typer.Option(help="TopK, BatchTopK, JumpReLU, Matryoshka, Gated, ReLU ...")] = "TopK",
    latents: Annotated[
        int | None, typer.Option(min=1, help="Latents of each; 16 times the width unless given.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Active latents, for architectures that take k.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Steps.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Vectors in a step.")] = 2048,
    context: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 128,
    n: Annotated[int | None, typer.Option(min=10, help="Only the first texts of the file.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a dictionary for each site, all from one pass of the model, and measure them on text kept aside.

    Ctrl-C, or a kill, loses at most 100 steps; the same command goes on from there. The last line is the page to open.
    """
    with progressing() as progress:
        from mechscope import jobs
        from mechscope.jobs.dictionaries import SITES, takes

        options = {"k": k} if takes(architecture, "k") else {}
        made = jobs.train_dictionaries(
            model, text, out, at or SITES, architecture, latents, steps, batch, context, n=n, seed=seed,
            progress=progress, **options,
        )  # fmt: skip
    if as_json:
        print_json({"report": made.report.to_document(), "page": str(made.page)})
        return
    print(_table(made.report))
    print(f"\n{made.report.verdict}\n\ndictionaries  {made.folder}\n\nopen this page in a browser:\n{made.page}")


def _table(report: Any) -> str:
    """This is a line for each dictionary, what its untrained twin reaches in brackets."""
    labels = list(dict.fromkeys(measure.of for measure in report.measures if not measure.control))
    names = list(dict.fromkeys(measure.name for measure in report.measures))
    width = max(map(len, labels))
    lines = ["dictionary".ljust(width) + "".join(name.rjust(24 if name in TWINS else 9) for name in names)]
    for label in labels:
        line = label.ljust(width)
        for name in names:
            found = report[name, label]
            value = f"{found.value:.3g}"
            if name in TWINS:
                twin = report[name, f"{label} (untrained)"].value
                spread = max(found.high - found.value, found.value - found.low)
                value = f"{found.value:.3f} ± {spread:.3f} ({twin:.2f})"
            line += value.rjust(24 if name in TWINS else 9)
        lines.append(line)
    return "\n".join(lines) + "\n\n± 95 %, over rows of text; in brackets: the untrained twin"


TWINS = ("FVU", "loss recovered")
