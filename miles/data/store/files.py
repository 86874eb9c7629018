"""Sealed files: written once, complete or absent. Checksums that name the damaged file.

A sealed file is written under a temporary name, synced, renamed, and its folder is synced. With a fence, the temporary
lies in the attempt's staging folder, which a newer attempt takes away: the older attempt's rename then fails in the
kernel, however long it was stopped between its last check and the rename.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from miles.config.exits import FULL, UserError

if TYPE_CHECKING:
    from miles.data.store.epoch import Fence

BLOCK = 4 << 20
TEMPORARY_SUFFIX = ".tmp"


class Damaged(UserError):
    """A file is not what was sealed. The message names the file, what was expected and what was found."""


class OtherSchema(UserError):
    """A file of another kind or another major number of its format."""


@dataclass(frozen=True)
class Sealed:
    """What a manifest says of a sealed file: its name, its size [bytes] and its xxh3_64 (16 hex digits)."""

    name: str
    bytes: int
    xxh3: str


def checksum(path: Path, start: int = 0) -> str:
    """xxh3_64 of a file's bytes from `start` on, 16 hex digits."""
    digest = xxhash.xxh3_64()
    buffer = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def verify(path: Path, size: int, xxh3: str) -> None:
    """Raise Damaged unless the file has this size [bytes] and this xxh3_64 [hex]."""
    try:
        found_size = path.stat().st_size
    except FileNotFoundError:
        raise Damaged(f"{path}: missing; {size} bytes with xxh3 {xxh3} expected") from None
    if found_size != size:
        raise Damaged(f"{path}: {size} bytes expected, {found_size} found")
    found = checksum(path)
    if found != xxh3:
        raise Damaged(f"{path}: xxh3 {xxh3} expected, {found} found")


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that names in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> Path:
    """Make a folder and its parents durably; returns it."""
    missing = []
    current = folder
    while not current.is_dir():
        missing.append(current)
        current = current.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)
    return folder


def seal(path: Path, write: Callable[[Path], None], fence: Fence | None = None) -> Sealed:
    """Write a file so that it is there complete or not at all.

    `write` gets a temporary path and leaves a closed file there. Whatever goes wrong, disk full included, the temporary
    is removed, the exception passes unchanged, and an older file of this name stays as it was.
    With a fence: raises Fenced instead of writing when a newer attempt exists.
    """
    if fence is not None:
        fence.check()
    make_folder(path.parent)
    folder = path.parent if fence is None else fence.staging
    temporary = folder / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        sealed = Sealed(path.name, temporary.stat().st_size, checksum(temporary))
        if fence is not None:
            fence.check()
        os.replace(temporary, path)
    except FileNotFoundError:
        if fence is not None:
            fence.check()  # the staging folder went away: a newer attempt took it
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return sealed


def check_target(target: Path, what: str) -> None:
    """UserError where a file that a person named can't be written: long work asks first. what: a kind of file, as "an HTML file"."""
    folder = target.absolute().parent
    if target.is_dir() or not folder.is_dir():
        raise UserError(f"{target}: {'is a folder' if target.is_dir() else f'there is no folder {target.parent}'}; give the name of {what}")
    if target.exists() and not target.is_file():
        raise UserError(f"{target}: is no plain file; give the name of {what}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{target}: nothing can be written to {folder}; choose another folder")


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """While a file that a person named is written: UserError where it can't be. A full disk passes as it comes."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(f"{target}: can't be written ({(error.strerror or type(error).__name__).lower()}); choose another place") from None


def seal_bytes(path: Path, content: bytes, fence: Fence | None = None) -> Sealed:
    """Seal a file of these bytes."""
    return seal(path, lambda temporary: _write_bytes(temporary, content), fence)


def seal_json(path: Path, value: Any, fence: Fence | None = None) -> Sealed:
    """Seal a JSON file (UTF-8, indented, keys in the order given)."""
    return seal_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, default=plain) + "\n").encode(), fence)


def read_json(path: Path) -> Any:
    """Read a JSON file; Damaged names it when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise Damaged(f"{path}: not JSON ({error})") from None


def seal_listing(path: Path, value: dict[str, Any], fence: Fence | None = None) -> Sealed:
    """seal_json of an object that vouches for other files, and for itself: its own checksum goes with it as "xxh3"."""
    return seal_json(path, {**value, "xxh3": own_checksum(value)}, fence)


def read_listing(path: Path) -> dict[str, Any]:
    """Read what seal_listing wrote. Damaged when it is not an object, or not what was sealed."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise Damaged(f"{path}: an object expected, {type(content).__name__} found")
    expected = content.pop("xxh3", None)
    if expected is not None and expected != (found := own_checksum(content)):
        raise Damaged(f"{path}: xxh3 {expected} expected of its content, {found} found")
    return content


def own_checksum(value: dict[str, Any]) -> str:
    """xxh3_64 of an object as JSON with sorted keys, no spaces, ASCII [hex]."""
    content = json.loads(json.dumps(value, default=plain))
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def schema_kind(found: Any, expected: str, path: Path | str) -> None:
    """Refuse another kind or another major number by name: OtherSchema."""
    if not isinstance(found, str) or "/" not in found:
        raise OtherSchema(f"{path}: carries no schema; expected {expected}")
    if found.split("/")[0] != expected.split("/")[0]:
        raise OtherSchema(f"{path}: is a {found} file; expected {expected}")
    if found.split("/")[1].split(".")[0] != expected.split("/")[1]:
        raise OtherSchema(f"{path}: is {found}, and this miles reads {expected}; use the miles version that wrote it")


def plain(value: Any) -> Any:
    """For json.dumps(default=...): numpy scalars and arrays and paths as plain values; anything else is a TypeError by name."""
    numpy = sys.modules.get("numpy")  # commands that hold none of its values need not wait for its import
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} can't be written as JSON; use text, numbers, lists and objects")


def metadata_text(metadata: dict[str, Any]) -> str:
    """Metadata as ASCII JSON: any Unicode, lone surrogates and NUL included, comes back as it was. ValueError names what can't."""
    try:
        return json.dumps(metadata, default=plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sample metadata: {error}") from None


def _write_bytes(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
