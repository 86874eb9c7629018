"""What a tool found, once for all ways of telling it: the same tables on a terminal and on a page, the figures as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from miles.analysis.tables import Terminal, print_table
from miles.config.exits import OK
from miles.config.stdout import put
from miles.report.plain_page import Section, Table, plain_page, refuse_other_files, write_page
from miles.report.tiles import Tile


@dataclass
class Findings:
    """kind: what the tool is about; facts: one line; data: all figures as plain values, for --json."""

    kind: str
    title: str
    facts: str
    sections: Sequence[Section]
    data: dict[str, Any]
    tiles: list[Tile] = field(default_factory=list)


def add_options(options: argparse.ArgumentParser) -> None:
    """What every tool takes: --html, --first, --last."""
    options.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, self-contained")
    options.add_argument("--first", type=int, metavar="STEP", help="first step (default: the first there is)")
    options.add_argument("--last", type=int, metavar="STEP", help="last step, itself included")


def chosen(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as they were given. UserError where the page can't be written: before the long work."""
    given = options.parse_args()
    if given.html is not None:
        refuse_other_files(given.html)
    return given


def tell(found: Findings, as_json: bool, html: Path | None) -> int:
    """Print what was found, as JSON or as tables, and write the page where one is wanted. UserError where its file can't be."""
    if html is not None:
        write_page(plain_page(found.title, found.kind, found.facts, None, found.sections, found.tiles, source=found.title), html)
    if as_json:
        put(json.dumps(found.data, indent=1, allow_nan=False))
        return OK
    out = Terminal()
    out.print(Text(f"{found.title}: {found.facts}", style="bold"), soft_wrap=True)
    for section in found.sections:
        for part in section.parts:
            if isinstance(part, Table):
                print_table(out, part.title or section.title, list(part.columns), [list(row) for row in part.rows])
        for part in section.parts:
            if isinstance(part, str):
                out.print(Text(part), soft_wrap=True)
    if html is not None:
        out.print(Text(f"\npage: {html}"), soft_wrap=True)
    return OK
