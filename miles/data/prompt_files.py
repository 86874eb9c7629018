"""Rows of prompt files: JSONL and Parquet, whole or sliced by `path@[a:b]`. Every error is one line with the file and the row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from miles.config.exits import UserError

SLICE = re.compile(r"^(?P<path>.*)@\[(?P<first>-?\d+|):(?P<last>-?\d+|)\]$")


def split_slice(text: str) -> tuple[Path, slice]:
    """`path@[a:b]` as a path and a slice of rows; a plain path takes all. Raises UserError for a malformed slice."""
    match = SLICE.match(text)
    if match is None:
        if text.endswith("]") and "@[" in text:
            raise UserError(f"{text}: not a slice of rows; write path@[a:b] with whole numbers, such as train.jsonl@[0:1000]")
        return Path(text), slice(None)
    first, last = match["first"], match["last"]
    return Path(match["path"]), slice(int(first) if first else None, int(last) if last else None)


def read_rows(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of every row that `text` names; place is `file:line` for JSONL and `file:row` for Parquet, as users count (from 1).

    Raises UserError: missing file, unknown kind, a line that is not a JSON object, an unreadable Parquet file, no rows.
    """
    path, part = split_slice(text)
    if not path.exists():
        raise UserError(f"{path}: no such file{_near_file(path)}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a .jsonl or .parquet file in it")
    if path.suffix == ".parquet":
        rows = list(_parquet(path))
    elif path.suffix in (".jsonl", ".json"):
        rows = list(_jsonl(path))
    else:
        raise UserError(f"{path}: unknown kind of file {path.suffix or '(no suffix)'}; prompts come from .jsonl or .parquet")
    if not rows:
        raise UserError(f"{path}: no rows; a data set needs at least one prompt")
    chosen = rows[part]
    if not chosen:
        raise UserError(f"{text}: the slice holds no rows; the file has {len(rows)}")
    return chosen


def field(row: dict[str, Any], key: str, place: str, option: str) -> Any:
    """row[key], or a UserError that names the nearest key and the option to change."""
    if key in row:
        return row[key]
    near = difflib.get_close_matches(key, row, n=1, cutoff=0.5)
    mend = f"did you mean {near[0]!r}?" if near else f"the row has {', '.join(map(repr, row)) or 'no keys'};"
    raise UserError(f"{place}: no key {key!r}; {mend} set {option}")


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not a JSON object ({error}); mend or remove the line") from None
            if not isinstance(row, dict):
                raise UserError(f'{path}:{number}: expected a JSON object such as {{"input": "…"}}, found a {type(row).__name__}')
            yield f"{path}:{number}", row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:200]})") from None
    number = 0
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:row {number}", row


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=1, cutoff=0.6)
    return f"; did you mean {folder / near[0]}?" if near else ""
