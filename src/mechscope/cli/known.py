"""Commands about what is known beforehand: tasks, and models whose mechanism is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechscope.cli.program import Json, ModelArg, Prompts, Seed, app, console, opened, plainly, print_json
from mechscope.cli.progress import progressing

tasks = typer.Typer(no_args_is_help=True, help="Tasks: check one on a model, or list them.")
app.add_typer(tasks, name="task")
labs = typer.Typer(no_args_is_help=True, help="Models whose mechanism is known: list, check, run them.")
app.add_typer(labs, name="lab")


@tasks.command("check", short_help="Say how well a model does a task.")
@plainly
def task_check(
    task: Annotated[str, typer.Argument(help="A task's name (see 'mechscope task list') or a JSONL file.")],
    model: ModelArg = "grammar",
    n: Prompts = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say how well a model does a task, before anyone explains it; the exit code is 1 where it does not."""
    loaded = opened(model)
    with progressing() as progress:
        from mechscope import jobs

        progress(f"checking {task}", 0, 0)
        found = jobs.task_for(loaded, task, n, seed).check(loaded)
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)
    if not found.ok:
        raise typer.Exit(1)


@tasks.command("list", short_help="List the tasks that have a name.")
@plainly
def task_list() -> None:
    """List the tasks that can be built by name, for any model whose tokenizer has the words."""
    from mechscope.tasks import TASKS

    width = max(map(len, TASKS)) + 2
    for name, builder in TASKS.items():
        about = (builder.__doc__ or "").splitlines()[0].replace("This is `n` pairs", "pairs")
        about = about.split(";")[0].split(",")[0].rstrip(".")
        print(f"{name:<{width}}{about}")


@labs.command("list", short_help="List the laboratories.")
@plainly
def lab_list(as_json: Json = False) -> None:
    """List the laboratories: models whose mechanism is known, how each came about, and what is known of it."""
    from mechscope.labs.catalogue import entries

    if as_json:
        print_json([entry.to_json() for entry in entries()])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, whole in (("name", True), ("kind", True), ("size", False), ("known", False)):
        table.add_column(column, no_wrap=whole, overflow="fold")
    for entry in entries():
        table.add_row(entry.name, entry.kind, entry.size, entry.known)
    console().print(table)


@labs.command("check", short_help="Verify a laboratory's model against its truth.")
@plainly
def lab_check(
    name: Annotated[str, typer.Argument(help="A laboratory (see 'mechscope lab list').")], as_json: Json = False
) -> None:
    """Verify a laboratory's model against its truth and print the evidence; the exit code is 1 where any fact fails."""
    found = []
    with progressing() as progress:
        progress(f"checking {name}", 0, 0)
        from mechscope.labs.catalogue import find

        for fact in find(name).check():
            found.append(fact)
            if not as_json:
                print(fact, flush=True)
    bad = [fact for fact in found if not fact.holds]
    if as_json:
        facts = [
            {"text": f.text, "value": f.value, "at_least": f.at_least, "at_most": f.at_most, "holds": f.holds}
            for f in found
        ]
        print_json({"lab": name, "holds": not bad, "facts": facts})
    else:
        print(f"\n{len(bad)} of {len(found)} FAIL" if bad else f"\nall {len(found)} hold")
    if bad:
        raise typer.Exit(1)


@labs.command("run", short_help="Run a laboratory: make its model anew, and a plot.")
@plainly
def lab_run(
    name: Annotated[str, typer.Argument(help="A laboratory (see 'mechscope lab list').")],
    out: Annotated[Path, typer.Option(help="Folder for the plot and what is made.")] = Path("mechscope-out"),
) -> None:
    """Run a laboratory: make its model anew, which may take long where it is trained, and draw what is known of it.

    A run that was stopped continues when the command is given again. The last line printed is the plot to open.
    """
    with progressing() as progress:
        progress(f"running {name}", 0, 0)
        from mechscope.labs.catalogue import find

        plot = find(name).run(out, progress)
    print(f"open this plot in a browser:\n{plot}")
