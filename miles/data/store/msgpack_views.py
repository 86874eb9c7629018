"""msgpack of journal records without copies: large arrays are written from where they lie, and read as views of the record.

Written are the bytes that msgpack.packb gives for the same values.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np

Piece = bytes | memoryview

_FIXED: dict[int, struct.Struct] = {
    0xCA: struct.Struct(">f"), 0xCB: struct.Struct(">d"), 0xCC: struct.Struct(">B"), 0xCD: struct.Struct(">H"), 0xCE: struct.Struct(">I"),
    0xCF: struct.Struct(">Q"), 0xD0: struct.Struct(">b"), 0xD1: struct.Struct(">h"), 0xD2: struct.Struct(">i"), 0xD3: struct.Struct(">q"),
}  # fmt: skip
_SIZES = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def pack(value: Any) -> list[Piece]:
    """The value (of objects, lists, text, numbers, None and contiguous arrays, which become their raw bytes) as pieces to write one after another."""
    pieces: list[Piece] = []
    _pack(value, msgpack.Packer(use_bin_type=True, unicode_errors="surrogatepass"), pieces)
    return pieces


def _pack(value: Any, packer: Any, pieces: list[Piece]) -> None:
    if isinstance(value, np.ndarray):
        raw = value.reshape(-1).view(np.uint8).data
        pieces += [_bin_header(len(raw)), raw]
    elif isinstance(value, dict):
        pieces.append(packer.pack_map_header(len(value)))
        for key, each in value.items():
            pieces.append(packer.pack(key))
            _pack(each, packer, pieces)
    elif isinstance(value, list | tuple) and any(isinstance(each, np.ndarray | dict | list | tuple) for each in value):
        pieces.append(packer.pack_array_header(len(value)))
        for each in value:
            _pack(each, packer, pieces)
    else:
        pieces.append(packer.pack(value))


def _bin_header(size: int) -> bytes:
    if size < 1 << 8:
        return struct.pack(">BB", 0xC4, size)
    if size < 1 << 16:
        return struct.pack(">BH", 0xC5, size)
    return struct.pack(">BI", 0xC6, size)


def unpack(content: Piece) -> Any:
    """The value packed in content; raw bytes come as views of it. ValueError for what pack() doesn't write or more than one value."""
    view = memoryview(content)
    try:
        value, end = _unpack(view, 0)
    except (IndexError, struct.error) as error:
        raise ValueError(f"msgpack: cut off ({error})") from None
    if end != len(view):
        raise ValueError(f"msgpack: {len(view) - end} bytes after the value")
    return value


def _unpack(view: memoryview, at: int) -> tuple[Any, int]:
    tag = view[at]
    at += 1
    if tag < 0x80:
        return tag, at
    if tag >= 0xE0:
        return tag - 0x100, at
    if tag < 0x90:
        return _map(view, at, tag & 0x0F)
    if tag < 0xA0:
        return _list(view, at, tag & 0x0F)
    if tag < 0xC0:
        return _text(view, at, tag & 0x1F)
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at
    if tag in _FIXED:
        return _FIXED[tag].unpack_from(view, at)[0], at + _FIXED[tag].size
    if 0xC4 <= tag <= 0xC6:
        size, at = _size(view, at, 1 << tag - 0xC4)
        return _bytes(view, at, size), at + size
    if 0xD9 <= tag <= 0xDB:
        size, at = _size(view, at, 1 << tag - 0xD9)
        return _text(view, at, size)
    if tag in (0xDC, 0xDD):
        return _list(view, *reversed(_size(view, at, 2 << tag - 0xDC)))
    if tag in (0xDE, 0xDF):
        return _map(view, *reversed(_size(view, at, 2 << tag - 0xDE)))
    raise ValueError(f"msgpack: type {tag:#x}, which no record has")


def _size(view: memoryview, at: int, width: int) -> tuple[int, int]:
    return int(_SIZES[width].unpack_from(view, at)[0]), at + width


def _bytes(view: memoryview, at: int, size: int) -> memoryview:
    if at + size > len(view):
        raise IndexError(f"{size} bytes expected")
    return view[at : at + size]


def _text(view: memoryview, at: int, size: int) -> tuple[str, int]:
    return str(_bytes(view, at, size), "utf-8", "surrogatepass"), at + size


def _list(view: memoryview, at: int, count: int) -> tuple[list[Any], int]:
    found = []
    for _ in range(count):
        value, at = _unpack(view, at)
        found.append(value)
    return found, at


def _map(view: memoryview, at: int, count: int) -> tuple[dict[Any, Any], int]:
    found = {}
    for _ in range(count):
        key, at = _unpack(view, at)
        found[key], at = _unpack(view, at)
    return found, at
