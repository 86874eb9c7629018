"""Numbers and tables for a terminal, alike in every tool."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles.config.stdout import hush, printable

HEADING, TEXT = 13, 28  # letters of a heading's line; the least that a column of texts gets


class Terminal(Console):
    """stdout for people. Its reader may leave before the end (head, less): the exit code stays that of what was found."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        hush()


def word(value: Any) -> str:
    """A cell: four digits of a number, seven of one close to 1; a dash for the unknown."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) and abs(value - 1) > 1e-3 else f"{value:.7g}"
    return printable(str(value))


def print_table(out: Console, title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Rows of plain values under their columns; columns of numbers to the right. Wider than the terminal rather than with numbers cut off."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    least = 0
    for at, name in enumerate(columns):
        numbers = all(isinstance(row[at], int | float | None) for row in rows)
        heading = "\n".join(textwrap.wrap(name, HEADING, break_long_words=False)) if numbers else name
        cells = max([len(word(row[at])) for row in rows] + [len(line) for line in heading.splitlines()], default=1)
        cells = cells if numbers else min(cells, TEXT)
        table.add_column(Text(heading), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold", min_width=cells)
        least += cells + 2
    for row in rows:
        table.add_row(*(Text(word(cell)) for cell in row))
    out.print()
    out.print(Text(title, style="bold"), soft_wrap=True)
    width, out.width = out.width, max(out.width, least)
    out.print(table)
    out.width = width
