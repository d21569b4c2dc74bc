"""The picture of a run: the losses of two models by copy, the in-context score, and what the heads become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechscope.labs import plot
from mechscope.labs.induction.measures import Row, crossing, ranked


def draw(rows: Sequence[Row], control: Sequence[Row], smeared: Sequence[Row], path: Path) -> Path:
    """This draws the rows of the two-layer run beside those of the one-layer runs, the last with smeared keys."""

    def over(of: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
        return [row["step"] for row in of], [row[name] for row in of]

    last = rows[-1]
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {
        "loss, nats": {
            "first copy": over(rows, "loss, first copy"),
            "second copy": over(rows, "loss, second copy"),
            "second copy, one layer": over(control, "loss, second copy"),
            "second copy, one layer, smeared keys": over(smeared, "loss, second copy"),
        },
        "in-context score, nats": {
            "two layers": over(rows, "in-context score"),
            "one layer": over(control, "in-context score"),
            "one layer, smeared keys": over(smeared, "in-context score"),
        },
        "score of each head": {
            **{f"previous token, {head}": over(rows, f"previous token {head}") for head, _ in heads(last)[:2]},
            **{f"induction, {head}": over(rows, f"induction {head}") for head, _ in heads(last)[2:]},
            "induction, one layer, smeared keys": over(smeared, f"induction {ranked(smeared[-1], 'induction')[0][0]}"),
            "induction, one layer": over(control, f"induction {ranked(control[-1], 'induction')[0][0]}"),
        },
        "K-composition of pairs": {
            pair.replace(" ", " to "): over(rows, f"K-composition {pair}")
            for pair, _ in ranked(last, "K-composition")[:5]
        },
    }
    figure = plot.lines(panels, x="step")
    top = ranked(last, "induction")[0][0]
    for share in (0.1, 0.9):
        # On every panel.
        figure.add_vline(x=crossing(rows, f"induction {top}", share), line_dash="dot", line_color="#777")
    figure.update_layout(
        title="Between the dotted lines the induction score goes from a tenth to nine tenths of its way",
        legend_groupclick="toggleitem",
        margin_t=90,
        height=600,
    )
    return plot.write(figure, path)


def heads(row: Row) -> list[tuple[str, float]]:
    """This is the two best previous-token heads of layer 0 and the two best induction heads of layer 1."""
    before = [item for item in ranked(row, "previous token") if item[0].startswith("0.")]
    after = [item for item in ranked(row, "induction") if item[0].startswith("1.")]
    return before[:2] + after[:2]
