"""Checkpoint folders as files: state.json, COMPLETE, and whether every file is as it was sealed. What is in them is the trainer's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.data.store.files import Damaged, Sealed, read_json, read_listing, schema_kind, verify
from miles.data.store.run_dir import COMPLETE

SCHEMA = "miles.checkpoint/1"
STATE = "state.json"


@dataclass(frozen=True)
class Listing:
    """COMPLETE: the step, and every other file of the checkpoint (names relative to its folder, with slashes)."""

    step: int | None
    files: list[Sealed]


def read_complete(folder: Path) -> Listing:
    """COMPLETE of a checkpoint. Damaged where it is missing or not what was sealed; another schema is refused by name."""
    mark = folder / COMPLETE
    if not mark.is_file():
        raise Damaged(f"{folder}: unfinished ({COMPLETE} is missing)")
    listing = read_listing(mark)
    schema_kind(listing.get("schema"), SCHEMA, mark)
    try:
        return Listing(listing.get("step"), [Sealed(str(entry["name"]), int(entry["bytes"]), str(entry["xxh3"])) for entry in listing["files"]])
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{mark}: a list of files with name, bytes and xxh3 expected ({type(error).__name__}: {error})") from None


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Compare every file with COMPLETE; returns state.json. Damaged says in one line what is wrong."""
    files = read_complete(folder).files
    for file in files:
        verify(folder / file.name, file.bytes, file.xxh3)
    if STATE not in {file.name for file in files}:
        raise Damaged(f"{folder / COMPLETE}: names no {STATE}")
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Another kind or major version is refused by name."""
    state = read_json(folder / STATE)
    if not isinstance(state, dict):
        raise Damaged(f"{folder / STATE}: an object expected")
    schema_kind(state.get("schema"), SCHEMA, folder / STATE)
    return state
