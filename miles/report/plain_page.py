"""A page for any tool's result: verdict first, then sections of words, tables and plots, in one self-contained HTML file.

    page = plain_page(
        title="runs/quickstart", kind="log-prob mismatch", facts="40 steps, 1 280 sequences",
        verdict=Verdict("noise", "good", ["k3 is 2e-5"], "nothing to do"),
        tiles=[Tile("k3", "2.0e-05", "95 %: 1.9e-05 to 2.1e-05")],
        sections=[Section("By step", [line, Table(["step", "mean |d|"], [[1, 0.1], [2, 0.2]])], note="...")],
    )
    write_page(page, Path("mismatch.html"))

The look is that of a run's report (light and dark, narrow and wide, no script, nothing loaded). Plots come from miles.report.svg and
miles.report.plots, wrapped in miles.report.figures.Placed; their names must differ within a page. Words are escaped; a cell may be markupsafe.Markup.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from miles.config.exits import UserError
from miles.data.store.files import check_target, writing
from miles.report.figures import Placed
from miles.report.scales import number
from miles.report.templates import GENERATOR, fill, put
from miles.report.tiles import Tile

LONG = 40  # letters: a longer cell takes lines, and is given room on a narrow page


@dataclass
class Verdict:
    """What comes first. word is shown as a badge; tone: good, warn, bad or nothing."""

    word: str
    tone: str = ""
    why: list[str] = field(default_factory=list)
    advice: str = ""


@dataclass
class Toned:
    """A cell with a tone: good, warn, bad."""

    value: Any
    tone: str


@dataclass
class Table:
    """rows[i][j]: str, int, float, None (shown as –), Toned or Markup. Columns of numbers are set right, others left.

    folded: closed until its title is clicked, which it needs then.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""
    folded: bool = False

    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers alone."""
        return [all(isinstance(_bare(row[at]), int | float | None) for row in self.rows) for at in range(len(self.columns))]


@dataclass
class Section:
    """parts in order; neighbouring plots stand side by side. A str is a paragraph, Markup stands as it is."""

    title: str
    parts: Sequence[Table | Placed | str]
    note: str = ""


def plain_page(title: str, kind: str, facts: str, verdict: Verdict | None, sections: Sequence[Section], tiles: Sequence[Tile] = (), source: str = "") -> str:
    """The page as text. kind stands above the title, facts below it; source says in the footer what it was made from. Empty sections are left out."""
    return fill(
        "plain_page.html.j2",
        title=title,
        kind=kind,
        facts=facts,
        verdict=verdict,
        tiles=list(tiles),
        sections=[(section, _grouped(section.parts)) for section in sections if section.parts],
        shown=_shown,
        is_long=lambda cell: isinstance(cell, str) and len(cell) > LONG,
        tone_of=lambda cell: cell.tone if isinstance(cell, Toned) else "",
        made=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        source=source,
    )


def write_page(page: str, target: Path) -> None:
    """Write it. An older page of ours is replaced; UserError for any other file, which is not touched."""
    refuse_other_files(target)
    with writing(target):
        put(page, target)


def refuse_other_files(target: Path) -> None:
    """UserError where no page can be written: long work asks first."""
    check_target(target, "an HTML file")
    if target.exists():
        with target.open("rb") as old:
            start = old.read(1024)
        if f'<meta name="generator" content="{GENERATOR}">'.encode() not in start:
            raise UserError(f"{target}: is there already, and is no page that miles made; give another name")


def _grouped(parts: Sequence[Table | Placed | str]) -> list[tuple[str, list[Any]]]:
    """(kind, neighbours of it): figures, table or text."""
    kinds = {Table: "table", str: "text", Markup: "markup"}
    return [(kind, list(some)) for kind, some in groupby(parts, lambda part: kinds.get(type(part), "figures"))]


def _bare(cell: Any) -> Any:
    return cell.value if isinstance(cell, Toned) else cell


def _shown(cell: Any) -> Any:
    value = _bare(cell)
    if value is None:
        return "–"
    if isinstance(value, float):
        return number(value, 4) if abs(value - 1) > 1e-3 or value == 1 else f"{value:.7g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return number(value)
    return value
