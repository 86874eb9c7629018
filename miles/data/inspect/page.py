"""What inspection says of a file or folder: plain values, for a terminal, for a pipe and for JSON alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Table:
    """Rows under named columns; a cell is text, a number or None."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass
class Page:
    """what: the kind in words. facts: name → value, in reading order; sizes are ints under names that end in `bytes`."""

    path: Path
    what: str
    schema: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: tables as lists of objects."""
        tables = {table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in self.tables}
        return {"path": str(self.path), "what": self.what, "schema": self.schema, **self.facts, "tables": tables, "notes": self.notes}


def spread(name: str, values: np.ndarray) -> list[Any]:
    """A row of a table of distributions: name, count, mean, least, median, greatest, of the finite values; how many others there are."""
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    others = len(values) - len(known)
    if not len(known):
        return [name, 0, None, None, None, None, others]
    return [name, len(known), float(known.mean(dtype=np.float64)), known.min().item(), float(np.median(known)), known.max().item(), others]


SPREAD = ["value", "count", "mean", "min", "median", "max", "not finite"]


def ranges(numbers: list[int]) -> str:
    """1 to 4, 6, 9 to 12; a dash for none."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    words = [f"{first}" if first == last else f"{first} to {last}" for first, last in parts]
    return ", ".join([*words[:8], "…"] if len(words) > 8 else words) or "–"


def counted(values: dict[str, int]) -> str:
    """3 completed, 1 truncated."""
    return ", ".join(f"{count} {name}" for name, count in values.items() if count) or "none"
