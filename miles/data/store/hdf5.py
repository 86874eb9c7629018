"""HDF5 without surprises: strings, attributes, contiguous arrays, the schema check. Shared by shards, routes and train records."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from miles.config.exits import UserError
from miles.data.store.epoch import Fence
from miles.data.store.files import Damaged, Sealed, checksum, plain, schema_kind, seal

STRING = h5py.string_dtype("utf-8")
BLOCK_BYTES = 4 << 20
USER_BLOCK = 512  # bytes before the HDF5 part, which the format leaves to others
SIGNATURE = b"\x89HDF\r\n\x1a\n"  # what an HDF5 file without a user block begins with
OWN = b"miles xxh3 "  # what a user block with a checksum begins with
UNREADABLE = (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError, OSError)


def seal_hdf5(
    path: Path, schema: str, attributes: dict[str, Any], fill: Callable[[h5py.File], None], fence: Fence | None = None, *, own_checksum: bool = False
) -> Sealed:
    """Write an HDF5 file once and seal it. Raises OSError with its errno when the disk is full; nothing is left then.

    own_checksum: the file's user block vouches for the rest of it (verify_own), where no other file does.
    """

    def write(temporary: Path) -> None:
        try:
            with h5py.File(temporary, "x", libver=("v110", "v110"), userblock_size=USER_BLOCK if own_checksum else 0) as file:
                file.attrs["schema"] = schema
                for name, value in attributes.items():
                    set_attribute(file, name, value)
                fill(file)
            if own_checksum:
                with open(temporary, "r+b") as sealed:
                    sealed.write(_user_block(temporary))
        except (OSError, RuntimeError) as error:
            raise _with_errno(error, path) from error

    return seal(path, write, fence)


def verify_own(path: Path) -> bool:
    """Hold a file against the checksum in its user block: Damaged when they differ, False for a file without one."""
    with open(path, "rb") as file:
        block = file.read(USER_BLOCK)
    if block.startswith(SIGNATURE):
        return False
    if block != (found := _user_block(path)):
        raise Damaged(f"{path}: {_shown(block)} expected by its first {USER_BLOCK} bytes, {_shown(found)} found")
    return True


def has_own_checksum(path: Path) -> bool:
    """Whether a user block that vouches for the file begins it."""
    with open(path, "rb") as file:
        return file.read(len(OWN)) == OWN


def _user_block(path: Path) -> bytes:
    """xxh3_64 of everything after the user block, as a line of text filled up with zeros."""
    return (OWN + f"{checksum(path, USER_BLOCK)}\n".encode()).ljust(USER_BLOCK, b"\0")


def _shown(block: bytes) -> str:
    return repr(block.rstrip(b"\0").decode("ascii", "backslashreplace"))


def open_hdf5(path: Path, schema: str) -> h5py.File:
    """Open for reading, without locks. Damaged for what is no HDF5, ValueError for another kind or major number."""
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in (None, 0):
            raise
        raise Damaged(f"{path}: an HDF5 file expected; {error}") from None
    try:
        with reading(path):
            found = file.attrs.get("schema")
        schema_kind(found, schema, path)
    except ValueError:
        file.close()
        raise
    return file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever h5py and numpy raise over bytes that are not as they were written becomes Damaged. OSError with an errno is the disk's, and passes."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno:
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise Damaged(f"{path}: damaged: what it should hold can't be read ({why}); inspect --verify holds it against its checksum") from error


def set_attribute(target: h5py.File | h5py.Group | h5py.Dataset, name: str, value: Any) -> None:
    """Numbers and text as they are, lists of text as arrays of text, other lists and objects as JSON text."""
    if isinstance(value, (bool, int, float, np.generic)):
        target.attrs[name] = value
    elif isinstance(value, str):
        target.attrs[name] = text(value)
    elif isinstance(value, list) and all(isinstance(each, str) for each in value):
        target.attrs.create(name, np.array([text(each) for each in value], dtype=object), (len(value),), STRING)
    else:
        target.attrs[name] = json.dumps(value, default=plain)


def attributes(target: h5py.File) -> dict[str, Any]:
    """All attributes as plain values; JSON text stays text (its reader knows which is which)."""
    return {name: value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value for name, value in target.attrs.items()}


def text(value: str) -> str:
    """Text that HDF5 can hold: NUL becomes U+2400 (the symbol for it), a lone surrogate a question mark."""
    return value.replace("\0", "\u2400").encode("utf-8", "replace").decode()


def put_strings(group: h5py.Group, name: str, values: Sequence[str]) -> None:
    """A [len] dataset of variable-length UTF-8."""
    data = group.create_dataset(name, (len(values),), STRING)
    if values:
        data[:] = np.array([text(value) for value in values], dtype=object)


def get_strings(group: h5py.Group, name: str, first: int, last: int) -> list[str]:
    """Strings of rows first to last (exclusive)."""
    return [str(value) for value in group[name].asstr()[first:last]] if last > first else []


def put_blocks(data: h5py.Dataset, pieces: Iterable[np.ndarray], start: int = 0) -> int:
    """Write pieces one after another along the first axis, joined to writes of some megabytes; returns the row after the last."""
    waiting: list[np.ndarray] = []
    held = 0
    for piece in pieces:
        waiting.append(piece)
        held += piece.nbytes
        if held >= BLOCK_BYTES:
            start, held = _put(data, waiting, start), 0
            waiting = []
    return _put(data, waiting, start)


def _put(data: h5py.Dataset, pieces: list[np.ndarray], start: int) -> int:
    rows = sum(len(piece) for piece in pieces)
    if rows:
        data[start : start + rows] = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    return start + rows


def _with_errno(error: OSError | RuntimeError, path: Path) -> OSError:
    """HDF5 tells the cause of a failed write in its text only; callers decide by errno."""
    if isinstance(error, OSError) and error.errno:
        return error
    found = re.search(r"errno = (\d+)", str(error))
    number = int(found.group(1)) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else " ".join(str(error).split()), str(path))
