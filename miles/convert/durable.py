"""Files that are whole or absent, also after a power failure."""

from __future__ import annotations

import os
from pathlib import Path


def write_durable(path: Path, content: bytes, writer: str = "") -> None:
    """Write a small file under its name in one step. writer: who writes it, where several may do so at once; what one leaves unfinished, its next
    attempt overwrites."""
    draft = path.with_name(f"{path.name}.part{writer}")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    publish(draft, path)


def copy_durable(source: Path, path: Path) -> None:
    """Copy a small file."""
    write_durable(path, source.read_bytes())


def publish(draft: Path, path: Path) -> None:
    """Give a synced file its name."""
    os.replace(draft, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
