"""The sparse lab's picture: which atoms go together, and how much of each dictionary references recover."""

from __future__ import annotations

from pathlib import Path

from mechscope.dictionaries.evaluating.recovery import chance, cosines, matched_cosine
from mechscope.dictionaries.evaluating.report import DictionaryReport
from mechscope.labs import plot
from mechscope.labs.lab import Report, silent
from mechscope.labs.sparse.generator import STRUCTURES
from mechscope.labs.sparse.lab import SAMPLES, correlation, example
from mechscope.labs.sparse.reference import online

SHOWN = 16
"""How many atoms the maps of co-activity show."""


def picture(path: Path, report: Report = silent) -> Path:
    """This learns each structure's dictionary by online learning and draws it: above, which atoms are active together;
    below, the cosine of every true atom with its partner, sorted, and what chance gives. Composed data gets as many
    atoms as it has sums, and finds them."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    columns, named = len(STRUCTURES), set()
    figure = make_subplots(
        rows=2,
        cols=columns,
        subplot_titles=[*STRUCTURES, *[""] * columns],
        vertical_spacing=0.14,
        horizontal_spacing=0.04,
    )
    for column, structure in enumerate(STRUCTURES, start=1):
        report(structure, column - 1, columns)
        data = example(structure)
        together = correlation(data.batch(0, SAMPLES).codes)[:SHOWN, :SHOWN].nan_to_num()
        together.fill_diagonal_(0.0)  # every atom goes with itself; the colours are for the others
        heat = go.Heatmap(
            z=together.tolist(), colorscale="RdBu_r", zmid=0, zmin=-0.7, zmax=0.7, showscale=column == columns
        )
        heat.update(colorbar=dict(title="correlation", len=0.42, y=0.8))
        figure.add_trace(heat, row=1, col=column)
        n_atoms = len(data.composites) if structure == "composed" else data.n_atoms
        found = online(data.batch(1, 4000).x, n_atoms)
        match = matched_cosine(found, data.atoms).cosine.sort(descending=True).values
        control = chance(found, data.atoms)
        curves = {"true atoms, each with a found one": (match, plot.COLOURS[0])}
        if structure == "composed":
            sums = cosines(found, data.composites).amax(0).sort(descending=True).values
            curves["found atoms, each with its nearest sum of two true ones"] = (sums, plot.COLOURS[1])
        for name, (values, colour) in curves.items():
            at = [(i + 0.5) / len(values) for i in range(len(values))]
            line = go.Scatter(x=at, y=values.tolist(), name=name, mode="lines", line=dict(color=colour, width=2.5))
            line.update(legendgroup=name, showlegend=name not in named)
            named.add(name)
            figure.add_trace(line, row=2, col=column)
        flat = go.Scatter(x=[0, 1], y=[control, control], name="chance: entries shuffled", mode="lines")
        flat.update(line=dict(color="#777", dash="dot"), legendgroup="chance", showlegend=column == 1)
        figure.add_trace(flat, row=2, col=column)
        figure.update_xaxes(title_text="atom", row=1, col=column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
        figure.update_xaxes(title_text="share of atoms", row=2, col=column)
        figure.update_yaxes(range=[0, 1.02], row=2, col=column)
    figure.update_yaxes(title_text="atom", row=1, col=1)
    figure.update_yaxes(title_text="cosine", row=2, col=1)
    title = "Which atoms are active together (above), and what online dictionary learning recovers of them (below)"
    figure.update_layout(
        template="plotly_white", height=620, width=1500, title=title, legend=dict(orientation="h", y=-0.12)
    )
    return plot.write(figure, path)


def heat_map(report: DictionaryReport, path: Path) -> Path:
    """This draws what `recovery_sweep` found: a map for each score, sizes upwards, penalties to the right."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = {"matched": "matched with true atoms", "mmcs": "mean max cosine", "between": "with the next larger"}
    shown = {title: report.tensors[name] for name, title in names.items() if name in report.tensors}
    sizes, penalties = ([f"{value:g}" for value in report.tensors[name].tolist()] for name in ("sizes", "penalties"))
    figure = make_subplots(rows=1, cols=len(shown), subplot_titles=list(shown))
    for column, table in enumerate(shown.values(), start=1):
        heat = go.Heatmap(z=table.tolist(), x=penalties, y=sizes[: len(table)], zmin=0, zmax=1, colorscale="Viridis")
        heat.update(texttemplate="%{z:.2f}", showscale=column == len(shown))
        figure.add_trace(heat, row=1, col=column)
        figure.update_xaxes(type="category", title_text="penalty", row=1, col=column)
        figure.update_yaxes(type="category", row=1, col=column)
    figure.update_yaxes(title_text="latents", row=1, col=1)
    figure.update_layout(template="plotly_white", height=420, width=120 + 420 * len(shown), title=report.verdict)
    return plot.write(figure, path)
