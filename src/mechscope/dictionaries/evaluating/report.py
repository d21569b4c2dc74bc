"""What an evaluation of a dictionary came to: measures, each with its interval, beside the controls that must fail.

Every metric in this room answers with a `DictionaryReport`, whatever it measures, so that every answer can be read by
name, tabulated, saved and put on a page in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mechscope import store
from mechscope.errors import DictionaryError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

NAN = float("nan")
LISTED = 40
"""How many things are printed of a report; `to_frame()` has all."""

Interval = tuple[float, float, float]
"""A value and the low and high end of its 95 % interval; NaN where there is none."""


@dataclass(frozen=True)
class Measure:
    """This is one number: what it is called, what it is of, its 95 % interval, and whether it is a control.

    of: what it was measured of, such as a concept, a size or "" for the dictionary as a whole. ideal: what a perfect
    dictionary scores, where that is known. about: how it is to be read.
    """

    name: str
    value: float
    low: float = NAN
    high: float = NAN
    of: str = ""
    unit: str = ""
    ideal: float | None = None
    control: bool = False
    about: str = ""

    def __str__(self) -> str:
        return _shown(self)


@dataclass(frozen=True, eq=False)
class DictionaryReport:
    """This is what a metric found of a dictionary.

    question: what was asked of what. verdict: the answer in a sentence. measures: the numbers; `report["fvu"]` is one
    by its name, `report["absorption", "parent 3"]` one that is of a concept. tensors: what they were computed from,
    such as the density of every latent. choices: how it was measured. provenance: of which dictionary, model and data.

    >>> report = DictionaryReport("fidelity", "good", (Measure("fvu", 0.1, 0.05, 0.2),))
    >>> report["fvu"].value, str(report["fvu"])
    (0.1, '0.1 [0.05, 0.2]')
    """

    question: str
    verdict: str
    measures: tuple[Measure, ...]
    choices: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    kind: str = field(default="dictionary-report", init=False)

    def __getitem__(self, key: str | tuple[str, str]) -> Measure:
        """This is a measure by its name, or by its name and what it is of.

        By its name alone it is the one of the whole, or the first where none is. Raises DictionaryError where there is
        none.
        """
        name, of = (key, None) if isinstance(key, str) else key
        named = [measure for measure in self.measures if measure.name == name]
        if not named:
            names = list(dict.fromkeys(measure.name for measure in self.measures))
            raise DictionaryError(
                f"no measure {name!r} in '{self.question}'{did_you_mean(name, names)}. Measures: {', '.join(names)}"
            )
        if of is None:
            return next((measure for measure in named if not measure.of), named[0])
        for measure in named:
            if measure.of == of:
                return measure
        known = [measure.of for measure in named]
        raise DictionaryError(
            f"{name!r} was not measured of {of!r}{did_you_mean(of, known)}. It was of: {', '.join(map(repr, known))}"
        )

    def of(self, name: str) -> dict[str, float]:
        """This is a measure's values by what they are of, controls left out."""
        return {m.of: m.value for m in self.measures if m.name == name and m.of and not m.control}

    def to_frame(self) -> pd.DataFrame:
        """This is a row for every measure: name, of, value, low, high, unit, ideal, control, about."""
        import pandas as pd

        names = ["name", "of", "value", "low", "high", "unit", "ideal", "control", "about"]
        return pd.DataFrame([asdict(measure) for measure in self.measures], columns=names)

    def save(self, path: str | Path) -> Path:
        """This writes the report to one file, which `ms.open` reads back."""
        return store.save(path, self.kind, *self.to_parts())

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This is the report as tensors and a JSON header; `from_parts` is the inverse."""
        facts = {name: getattr(self, name) for name in ("question", "verdict", "choices", "provenance")}
        return self.tensors, facts | {"measures": [asdict(measure) for measure in self.measures]}

    @classmethod
    def from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> DictionaryReport:
        facts = {name: header[name] for name in ("question", "verdict", "choices", "provenance")}
        return cls(**facts, measures=tuple(Measure(**measure) for measure in header["measures"]), tensors=tensors)

    def to_document(self) -> dict[str, Any]:
        """This is the document that the page's panel draws: a table of scores for the whole, and one for its parts."""
        whole = [measure for measure in self.measures if not measure.of]
        tables = [_listing(self.question, whole)] if whole else []
        parts = [measure for measure in self.measures if measure.of]
        if parts:
            tables.append(_table(self.question, parts))
        return {
            "kind": "score-table",
            "version": 1,
            "title": self.question,
            "verdict": self.verdict,
            "tables": tables,
            "notes": {},
            "choices": self.choices,
            "provenance": self.provenance,
            "cost": {},
        }

    def __str__(self) -> str:
        lines = [f"{self.question}: {self.verdict}"]
        whole = [measure for measure in self.measures if not measure.of]
        if whole:
            cells = [
                [
                    m.name + " (control)" * m.control,
                    _shown(m),
                    m.unit,
                    m.about if len(m.about) < 90 else m.about[:89] + "…",
                ]
                for m in whole
            ]
            lines += ["", *_aligned(cells)]
        parts = [measure for measure in self.measures if measure.of]
        if parts:
            names = list(dict.fromkeys(m.name for m in parts))
            things = list(dict.fromkeys((m.of, m.control) for m in parts))
            held = {(m.name, m.of, m.control): _shown(m) for m in parts}
            cells = [["", *names]]
            cells += [
                [of + " (control)" * control, *(held.get((name, of, control), "–") for name in names)]
                for of, control in things[:LISTED]
            ]
            lines += ["", *_aligned(cells)]
            if len(things) > LISTED:
                lines.append(f"… and {len(things) - LISTED} more, in to_frame()")
        return "\n".join([*lines, *([""] if self.choices else []), *(f"{k}: {v}" for k, v in self.choices.items())])

    def __repr__(self) -> str:
        return f"DictionaryReport({self.question}: {self.verdict})"


def described(dictionary: Any) -> dict[str, Any]:
    """This is what a report records of a dictionary: class, sizes and sites, and what its facts say of the model."""
    facts = getattr(dictionary, "facts", None) or {}
    plain = {name: facts[name] for name in ("name", "model", "weights", "mask") if name in facts}
    sizes = {name: getattr(dictionary, name, None) for name in ("d_in", "d_out", "n_latents", "reads", "writes")}
    return {"dictionary": type(dictionary).__name__, **{k: v for k, v in sizes.items() if v is not None}, **plain}


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]


def _shown(measure: Measure) -> str:
    if measure.low == measure.low:
        return f"{_number(measure.value)} [{_number(measure.low)}, {_number(measure.high)}]"
    return _number(measure.value)


def _number(value: float) -> str:
    return f"{int(value):,}" if abs(value) >= 1000 else f"{value:.3g}"


def _scored(measure: Measure) -> tuple[float, float, float]:
    return measure.value, measure.low, measure.high


def _listing(title: str, measures: Sequence[Measure]) -> dict[str, Any]:
    """This is a table with a row for each measure, as the page's panel of scores takes it."""
    rows = [
        {"label": m.name, "scores": [_scored(m)], "group": m.unit, "control": m.control, "note": m.about}
        for m in measures
    ]
    return {"title": title, "columns": [_column("value", "")], "rows": rows, "about": ""}


def _table(title: str, measures: Sequence[Measure]) -> dict[str, Any]:
    """This is a table with a row for each thing that was measured and a column for each measure."""
    names = {measure.name: measure.unit for measure in measures}
    held: dict[tuple[str, bool], dict[str, Measure]] = {}
    for measure in measures:
        held.setdefault((measure.of, measure.control), {})[measure.name] = measure
    rows = [
        {
            "label": of,
            "scores": [_scored(by_name[name]) if name in by_name else None for name in names],
            "group": "",
            "control": control,
            "note": "; ".join(dict.fromkeys(m.about for m in by_name.values() if m.about)),
        }
        for (of, control), by_name in held.items()
    ]
    return {"title": title, "columns": [_column(*pair) for pair in names.items()], "rows": rows, "about": ""}


def _column(name: str, unit: str, lines: Mapping[str, float] | None = None) -> dict[str, Any]:
    return {"name": name, "unit": unit, "about": "", "lines": dict(lines or {})}
