"""`miles-submit inspect`: what lies at a path, as tables on a terminal, as plain lines in a pipe, as JSON for scripts."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from miles.config.exits import OK, WRONG, UserError
from miles.config.stdout import printable
from miles.data.inspect.check import check
from miles.data.inspect.page import Page, Table, counted
from miles.data.inspect.recognise import describe, recognise
from miles.data.inspect.recognise import rows as find_rows
from miles.data.inspect.sequences import sample_tokens
from miles.data.sample import Sample
from miles.report.records import read_run
from miles.report.scales import number
from miles.report.token_text import TokenText, load_token_text

COUNTS = ("status", "sources", "engines", "dropped")  # objects that count what they name
TEXTS = ("prompt", "response", "label", "text")
TIMES = ("time", "start", "end")  # seconds since 1970, which have more digits than f32
HUGE = 10**19  # beyond every 64-bit number: nobody's count, and as wide as a page if it were written out
SIZES = ("B", "KB", "MB", "GB", "TB", "PB")


def inspect(path: Path, rows: str | None, verify: bool, as_json: bool) -> int:
    """Print what lies at a path; returns OK, or WRONG when verify found damage. UserError for what can't be inspected."""
    logging.getLogger("miles.data.store.journal").setLevel(logging.ERROR)  # a torn tail is on the page
    if verify:
        return _verify(path, as_json)
    if rows is not None:
        _rows(path, rows, as_json)
        return OK
    page = describe(path)
    if as_json:
        print(_json(page.as_dict()))
    else:
        _show(page)
    return OK


# Words.


def words(name: str, value: Any) -> str:
    """A value as a person reads it; sizes by their name."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return number(value) if abs(value) >= HUGE else size(value) if name.endswith("bytes") else str(value)
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        if name in COUNTS:
            return counted(value)
        return ", ".join(f"{key} {words(str(key), each)}" for key, each in value.items() if each not in (None, [], {}, ""))
    if isinstance(value, list):
        return ", ".join(words(name, each) for each in value)
    return printable(str(value))


def exact(name: str, value: Any) -> str:
    """A value of one row: floats to the digits that f32 has, text in quotes."""
    if isinstance(value, float):
        return f"{value:.3f}" if name in TIMES else f"{value:.9g}"
    return f'"{printable(value)}"' if isinstance(value, str) and name in TEXTS else words(name, value)


def size(count: int) -> str:
    """1234 → 1.23 KB (powers of 1000)."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(SIZES) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.3g} {SIZES[unit]}"


# The page.


def _show(page: Page) -> None:
    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    pretty = out.is_terminal
    head = Text(f"{page.path}: {page.what}" + (f" ({page.schema})" if page.schema else ""), style="bold" if pretty else "")
    out.print(head)
    _facts(out, page.facts)
    for table in page.tables:
        if table.rows:
            _table(out, table)
    for note in page.notes:
        out.print(Text(f"note: {note}", style="yellow" if pretty else ""))


def _facts(out: Console, facts: dict[str, Any], words: Callable[[str, Any], str] = words) -> None:
    told = {name: words(name, value) for name, value in facts.items() if value not in ({}, [], None, "")}
    width = max((len(name) for name in told), default=0)
    if out.is_terminal:
        grid = RichTable.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in told.items():
            grid.add_row(name, Text(value))
        out.print(grid, soft_wrap=False)
        return
    for name, value in told.items():
        out.print(f"{name:<{width}}  {value}")


def _table(out: Console, table: Table, words: Callable[[str, Any], str] = words) -> None:
    cells = [[words(name, cell) for name, cell in zip(table.columns, row, strict=True)] for row in table.rows]
    right = [all(isinstance(row[at], int | float | None) for row in table.rows) for at in range(len(table.columns))]
    if out.is_terminal:
        shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name, is_number in zip(table.columns, right, strict=True):
            shown.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for row in cells:
            shown.add_row(*map(Text, row))
        out.print()
        out.print(shown, soft_wrap=False)
        return
    widths = [max(len(name), *(len(row[at]) for row in cells)) for at, name in enumerate(table.columns)]
    out.print(f"\n{table.title}")
    for row in (table.columns, *cells):
        out.print("  ".join(cell.rjust(width) if is_number else cell.ljust(width) for cell, width, is_number in zip(row, widths, right, strict=True)).rstrip())


# Rows.


def _rows(path: Path, wanted: str, as_json: bool) -> None:
    first, last = _range(wanted)
    found = find_rows(path, first, last)
    text = _token_text(path)
    if as_json:
        for facts, content in found:
            table = sample_tokens(content, text.pieces) if isinstance(content, Sample) else content
            tokens = None if table is None else [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            print(_json({**facts, "tokens": tokens} if tokens is not None else facts, indent=None))
        return
    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for index, (facts, content) in enumerate(found):
        if index:
            out.print()
        table = sample_tokens(content, text.pieces) if isinstance(content, Sample) else content
        _facts(out, facts, exact)
        if table is not None:
            _table(out, table, exact)
    if text.note and recognise(path).kind in ("batch", "rollout", "journal"):
        out.print(f"\nnote: {text.note}")


def _range(wanted: str) -> tuple[int | None, int | None]:
    """3:5, 3, :4, -2: as a slice. UserError for anything else."""
    match = re.fullmatch(r"(-?\d+)?(:(-?\d+)?)?", wanted.strip())
    if match is None or not wanted.strip():
        raise UserError(f"--rows {wanted}: write FIRST:LAST, such as 3:5 for the rows 3 and 4, or one number")
    first = None if match[1] is None else int(match[1])
    if match[2] is None:
        assert first is not None, "one number"
        return first, None if first == -1 else first + 1
    return first, None if match[3] is None else int(match[3])


def _token_text(path: Path) -> TokenText:
    """The tokenizer of the run that a path lies in; ids without one."""
    run = next((parent for parent in (path.absolute(), *path.absolute().parents) if (parent / "run.yaml").is_file()), None)
    if run is None:
        return TokenText(None, "tokens are shown as ids: the file lies in no run directory, whose tokenizer would be taken")
    return load_token_text(read_run(run))


# Checksums.


def _verify(path: Path, as_json: bool) -> int:
    found = list(check(path))
    bad = [verdict for verdict in found if not verdict.good]
    serious = [verdict for verdict in bad if not verdict.aside]
    if as_json:
        print(_json({"ok": not serious, "files": [{"path": str(each.path), "good": each.good, "message": each.message, "aside": each.aside} for each in found]}))
        return WRONG if serious else OK
    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for verdict in found:
        if not verdict.good:
            where = "damaged (set aside, so it harms nothing): " if verdict.aside else "damaged: "
            out.print(Text(where + verdict.message, style="yellow" if verdict.aside else "bold red"))
        elif verdict.message:
            out.print(Text(f"note: {verdict.path}: {verdict.message}", style="dim"))
    good = len(found) - len(bad)
    out.print(f"{good} of {len(found)} file{'s' if len(found) != 1 else ''} as sealed" if bad else f"all {_count(found)} as sealed")
    return WRONG if serious else OK


def _count(found: Sequence[Any]) -> str:
    return "1 file is" if len(found) == 1 else f"{len(found)} files are"


def _json(value: Any, indent: int | None = 1) -> str:
    """Strict JSON: NaN and infinities are null."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
