"""What a harvest found: a folder of tables, asked by a unit's name or in SQL.

found = Harvest("neurons")
found.query("neuron 3.217")           its examples, highest first, with their text; also "feature 3.1234"
found.sql("SELECT ... FROM examples") anything else; the views are examples, units and contexts
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.errors import UnitsError, did_you_mean
from mechscope.units.highest import Highest
from mechscope.units.samples import Samples

if TYPE_CHECKING:
    import pandas as pd

BEFORE, AFTER = 24, 8
"""How many tokens around an example its text shows."""

_VIEWS = f"""
CREATE VIEW contexts AS SELECT * FROM read_parquet('$/contexts-*.parquet');
CREATE VIEW units AS SELECT * FROM read_parquet('$/units.parquet');
CREATE VIEW kept AS SELECT * FROM read_parquet('$/examples.parquet');
CREATE VIEW examples AS
    SELECT kept.*, tokens[position + 1] AS token, loss[position + 1] AS loss,
        array_to_string(tokens[greatest(1, position + 1 - {BEFORE}):position + 1 + {AFTER}], '') AS text
    FROM kept JOIN contexts USING (context);
"""


@dataclass(frozen=True)
class Example:
    """This is a token that a unit responded to: its activation there, the text around it, the model's loss on it.

    range: 0 for one of the highest; else which range of activations it was drawn from, the lowest being 1.
    """

    activation: float
    range: int
    context: int
    position: int
    token: str
    before: str
    after: str
    loss: float

    def __str__(self) -> str:
        return f"{self.activation:8.3f}  {_line(self.before)[-60:]}[{_line(self.token)}]{_line(self.after)[:24]}"


@dataclass(frozen=True)
class Examples:
    """This is all that a harvest keeps of one unit. `facts` holds its mean, spread, share above 0 and greatest value.

    `highest` are its highest activations, highest first; `drawn` those drawn at random, by range, highest range first.
    """

    site: str
    unit: int
    facts: dict[str, float]
    highest: tuple[Example, ...]
    drawn: tuple[Example, ...]

    def to_frame(self) -> pd.DataFrame:
        """This is a row for every example."""
        import pandas as pd

        return pd.DataFrame([asdict(example) for example in (*self.highest, *self.drawn)])

    def __str__(self) -> str:
        facts = self.facts
        lines = [
            f"{self.site}[{self.unit}]: above 0 on {facts['above_zero']:.1%} of {facts['tokens']:,.0f} tokens, mean "
            f"{facts['mean']:.3f}, greatest {facts['greatest']:.3f}",
            *map(str, self.highest),
        ]
        for number in sorted({example.range for example in self.drawn}, reverse=True):
            lines += [f"drawn at random from range {number}"]
            lines += [str(example) for example in self.drawn if example.range == number]
        return "\n".join(lines)


class Harvest:
    """This is a finished harvest, in its folder. Raises UnitsError where there is none."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        facts = self.folder / "harvest.json"
        if not facts.is_file():
            half = (self.folder / "state.safetensors").is_file()
            why = "holds a harvest that is half done; run it again to go on" if half else "holds no harvest"
            raise UnitsError(f"'{self.folder}' {why}")
        self.facts: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))

    @property
    def sites(self) -> list[str]:
        return self.facts["question"]["sites"]

    def query(self, unit: str) -> Examples:
        """This is what was kept of one unit: "neuron 3.217", "3.217", or "blocks.3.resid_post[217]" for any site.

        "feature 3.1234" is that of the dictionary at block 3, "blocks.3.resid_post/sae[1234]" where there are several.
        Raises UnitsError for a unit that the harvest does not have, and where several have that name.
        """
        named = self._named(unit)
        is_it = "WHERE site = ? AND unit = ?"
        found = self.connection.execute(f"SELECT * EXCLUDE (site, unit) FROM units {is_it}", named)
        names, rows = [column[0] for column in found.description], found.fetchall()
        if not rows:
            (size,) = self.connection.execute("SELECT count(*) FROM units WHERE site = ?", named[:1]).fetchone()
            raise UnitsError(f"{named[0]} has {size:,} units, 0 to {size - 1}; there is no {named[1]}")
        found = self.connection.execute(
            "SELECT activation, range, context, position, tokens, loss[position + 1] FROM kept JOIN contexts "
            f"USING (context) {is_it} ORDER BY range, rank",
            named,
        ).fetchall()
        examples = [_example(*row) for row in found]
        drawn = sorted((e for e in examples if e.range), key=lambda e: (-e.range, -e.activation))
        facts = dict(zip(names, map(float, rows[0])))
        return Examples(*named, facts, tuple(e for e in examples if not e.range), tuple(drawn))

    def sql(self, question: str) -> pd.DataFrame:
        """This asks the views `examples`, `units` and `contexts` in DuckDB's SQL.

        >>> found.sql("SELECT unit, greatest FROM units ORDER BY greatest DESC LIMIT 5")  # doctest: +SKIP
        """
        import duckdb

        try:
            return self.connection.execute(question).df()
        except duckdb.Error as error:
            columns = {view: self.connection.execute(f"DESCRIBE {view}").fetchall() for view in _NAMES}
            shown = "; ".join(f"{view} ({', '.join(row[0] for row in rows)})" for view, rows in columns.items())
            raise UnitsError(f"{error}\nThe views and their columns: {shown}") from error

    @cached_property
    def connection(self) -> Any:
        """This is a DuckDB connection in memory with the three views, which read the folder's files."""
        try:
            import duckdb
        except ImportError as error:
            raise UnitsError("a harvest is read with duckdb; type: pip install 'mechscope[harvest]'") from error
        connection = duckdb.connect(":memory:")
        connection.execute(_VIEWS.replace("$", str(self.folder).replace("'", "''")))
        return connection

    def _named(self, unit: str) -> tuple[str, int]:
        neuron = re.fullmatch(r"(?:neuron\s+)?(\d+)\.(\d+)", unit.strip())
        feature = re.fullmatch(r"feature\s+(\d+)\.(\d+)", unit.strip())
        other = re.fullmatch(r"(.+)\[(\d+)\]", unit.strip())
        if feature:
            site, index = self._features(int(feature[1]), int(feature[2])), int(feature[2])
        elif neuron:
            site, index = f"blocks.{neuron[1]}.mlp_post", int(neuron[2])
        elif other:
            site, index = other[1], int(other[2])
        else:
            raise UnitsError(f"{unit!r} names no unit; type 'neuron 3.217' or '{self.sites[0]}[217]'")
        if site not in self.sites:
            near = did_you_mean(site, self.sites) or "."
            raise UnitsError(f"this harvest has no site {site!r}{near} It has {_few(self.sites)}")
        return site, index

    def _features(self, block: int, latent: int) -> str:
        """This is the site of the one dictionary that was harvested at a block."""
        every = [site for site in self.sites if "/" in site and not site.endswith("/error")]
        here = [site for site in every if re.search(rf"(^|\.)blocks\.{block}\.", site)]
        if len(here) == 1:
            return here[0]
        if here:
            names = " or ".join(f"'{site}[{latent}]'" for site in here)
            raise UnitsError(f"block {block} has {len(here)} dictionaries; type {names}")
        raise UnitsError(f"this harvest has no features of block {block}; it has {_few(self.sites)}")

    def __repr__(self) -> str:
        return f"Harvest('{self.folder}': {_few(self.sites)}, {self.facts['tokens']:,} tokens)"


_NAMES = ("examples", "units", "contexts")


def write_contexts(
    folder: Path, held: Sequence[tuple[int, list[int], list[float]]], strings: Callable[[Sequence[int]], list[str]]
) -> None:
    """This writes rows of text (number, ids, losses) to one parquet file, named by the first."""
    pa = _arrow()
    texts = {number: strings(row) for number, row, _ in held}
    table = pa.table(
        {
            "context": pa.array([number for number, _, _ in held], pa.int64()),
            "ids": pa.array([row for _, row, _ in held], pa.list_(pa.int32())),
            "tokens": pa.array([texts[number] for number, _, _ in held], pa.list_(pa.string())),
            "loss": pa.array([loss for _, _, loss in held], pa.list_(pa.float32())),
        }
    )
    _write(folder / f"contexts-{held[0][0]:09d}.parquet", table)


def write_tables(
    folder: Path, highest: Mapping[str, Highest], samples: Mapping[str, Samples], sums: Mapping[str, Tensor], size: int
) -> None:
    """This writes examples.parquet and units.parquet."""
    pa = _arrow()
    kept, units = [], []
    for site, high in highest.items():
        drawn = samples[site]
        ranges = [(0, high.values, high.where)]
        ranges += [(i + 1, drawn.values[:, i], drawn.where[:, i]) for i in range(drawn.values.shape[1])]
        for number, values, where in ranges:
            unit, rank = (where >= 0).nonzero(as_tuple=True)
            token = where[unit, rank]
            columns = {"unit": unit, "range": torch.full_like(unit, number), "rank": rank}
            columns |= {"activation": values[unit, rank], "context": token // size, "position": token % size}
            kept.append(_table(pa, site, columns))
        count, total, squares, above, greatest = sums[site]
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0).sqrt()
        columns = {"unit": torch.arange(len(count)), "tokens": count.long(), "mean": mean, "spread": spread}
        columns |= {"above_zero": above / count, "greatest": greatest}
        units.append(_table(pa, site, columns))
    _write(folder / "examples.parquet", pa.concat_tables(kept))
    _write(folder / "units.parquet", pa.concat_tables(units))


def _table(pa: Any, site: str, columns: Mapping[str, Tensor]) -> Any:
    """This is a pyarrow table of one site's rows; small whole numbers take 32 bits."""
    arrays = {name: pa.array(value.numpy()) for name, value in columns.items()}
    names = pa.DictionaryArray.from_arrays(pa.array([0] * len(columns["unit"]), pa.int32()), pa.array([site]))
    return pa.table({"site": names.cast(pa.string()), **arrays})


def _write(path: Path, table: Any) -> None:
    import pyarrow.parquet as parquet

    from mechscope import store

    store.write_with(path, lambda temporary: parquet.write_table(table, temporary, compression="zstd"))


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UnitsError("a harvest is written with pyarrow; type: pip install 'mechscope[harvest]'") from error
    return pyarrow


def _example(activation: float, number: int, context: int, position: int, tokens: list[str], loss: float) -> Example:
    before, after = tokens[max(0, position - BEFORE) : position], tokens[position + 1 : position + 1 + AFTER]
    return Example(activation, number, context, position, tokens[position], "".join(before), "".join(after), loss)


def _line(text: str) -> str:
    return text.replace("\n", "↵")


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


__all__ = ["Example", "Examples", "Harvest"]
