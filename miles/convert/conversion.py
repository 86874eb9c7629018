"""The plan of a conversion to torch_dist, and its files: chunks of at most 32 MB, filled in strips, the same for any number of ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.config.exits import UserError
from miles.convert.contradictions import mtp_contradiction
from miles.convert.durable import copy_durable, write_durable
from miles.convert.hf_source import HfSource
from miles.convert.model_files import check_quantised, config_files, examine
from miles.convert.nan import NanWatch, nan_warnings
from miles.convert.options import DTYPES, MtpLayers, Options
from miles.convert.output import Output
from miles.convert.safetensors_file import NAMES, size_of
from miles.convert.torch_dist_writer import COMMON, COMMON_STATE, begin_tensor, write_metadata, write_object, write_tracker
from miles.models.maps.entry import Block
from miles.models.maps.find import Known
from miles.models.maps.pieces import Piece, padded_vocabulary, pieces

CHUNK_BYTES = 32 << 20
STRIP_BYTES = 2 << 20  # filled at once: small enough to be hashed and looked through while it is in the cache
FILE_BYTES = 1 << 30  # at most; of a small model there are FILES, so that all workers have something to do
FILES, SMALLEST_FILE = 16, 64 << 20
SOURCE = "miles_source.json"
FOLDER = "release"


@dataclass(frozen=True)
class Part:
    """Rows [first, last) of a piece: a chunk of the checkpoint."""

    piece: Piece
    first: int
    last: int


class Conversion:
    """Of one source with one set of options. UserError, one line, for a source that is not whole or not understood."""

    def __init__(self, known: Known, hf: HfSource, options: Options) -> None:
        self.known, self.hf, self.options = known, hf, options
        check_quantised(known, hf)
        rows = padded_vocabulary(known.config.number("vocab_size"), options.make_vocab_size_divisible_by, options.tensor_parallel)
        self.mtp = MtpLayers(known, hf, options)
        self.pieces = list(pieces(known, mtp_layers=options.mtp_layers, rows=rows))
        found = examine(known, hf, [piece for piece in self.pieces if not self.mtp.is_made(piece)], options.mtp_layers)
        self.copies = found.copies
        self.warnings: list[str] = []
        contradiction = mtp_contradiction(known, hf.stored, found.mtp_layers)
        if contradiction:
            if options.strict:
                raise UserError(f"{contradiction}; correct config.json, or leave --strict out")
            self.warnings.append(contradiction)
        if found.mtp_layers > options.mtp_layers:
            self.warnings.append(f"{found.mtp_layers - options.mtp_layers} MTP layers of the source are left out; --mtp-num-layers {found.mtp_layers} includes them")
        others = [name for name in found.left_out if ".layers." not in name]
        if others:
            self.warnings.append(f"{len(others)} tensors beside the text model are left out, such as {others[0]}")
        self.shapes = {piece.key: piece.whole for piece in self.pieces}
        self.dtypes = self._dtypes()
        self.bytes = sum(size_of((self.dtypes[piece.key], piece.shape)) for piece in self.pieces)
        self.file_bytes = min(FILE_BYTES, max(SMALLEST_FILE, self.bytes // FILES))
        self.files = list(self._plan())
        self.names = [f"__{i}_0.distcp" for i in range(len(self.files))]

    @property
    def fingerprint(self) -> str:
        """Of all that decides the files' content: config, source files with sizes and times, options."""
        files = sorted({stored.file for stored in self.hf.stored.values()})
        seen = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        told = [self.known.config.fields, seen, sorted(self.hf.stored), vars(self.options), CHUNK_BYTES, STRIP_BYTES, self.file_bytes]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def write(self, i: int, file: Output) -> dict[str, Any]:
        """One file; returns where its chunks lie, and the source's tensors with NaN in them."""
        chunks, nan = [], NanWatch(self.hf.folder, self.options.strict)
        for part in self.files[i]:
            piece, dtype = part.piece, self.dtypes[part.piece.key]
            sizes = (*(1 for _ in piece.lead), part.last - part.first, *piece.shape[1:])
            begin, tail = begin_tensor(file, dtype, sizes)
            for strip, name in self._strips(part, file):
                nan.look(strip, name)
            file.write(tail)
            chunks.append([piece.key, (*piece.lead, part.first, *(0 for _ in piece.shape[1:])), sizes, self.names[i], begin, file.tell() - begin])
        objects = []
        if i == 0:
            begin, length = write_object(file, None)  # every module's _extra_state is the same nothing
            objects = [[name, self.names[0], begin, length] for piece in self.pieces for name in piece.objects]
            begin, length = write_object(file, COMMON_STATE)
            objects.append([COMMON, self.names[0], begin, length])
        return {"chunks": chunks, "objects": objects, "nan": sorted(nan.names)}

    def finish(self, root: Path, records: list[dict[str, Any]]) -> None:
        """Metadata, what is needed for the way back, and the tracker file last."""
        folder = root / FOLDER
        self.warnings += nan_warnings(records)
        (folder / "hf").mkdir(exist_ok=True)
        for file in config_files(self.hf.folder):
            copy_durable(file, folder / "hf" / file.name)
        write_durable(folder / SOURCE, json.dumps(self._origin(), indent=1).encode())
        chunks = [chunk for record in records for chunk in record["chunks"]]
        write_metadata(folder, self.shapes, self.dtypes, chunks, [item for record in records for item in record["objects"]])
        write_tracker(root)

    def _strips(self, part: Part, file: Output) -> Iterator[tuple[Tensor, str]]:
        """A chunk's rows in order, each strip in its place in the file, and the name of the tensor that it comes from."""
        piece, dtype = part.piece, self.dtypes[part.piece.key]
        step = strip_rows(dtype, piece.shape)
        for block, first, last in _runs(part):
            for a in range(first, last, step):
                b = min(last, a + step)
                strip = file.space(dtype, b - a, *piece.shape[1:])
                if self.mtp.is_random(piece):
                    strip.copy_(self.mtp.random(piece, a, b, dtype))
                elif block is None:
                    strip.zero_()
                else:
                    self._fill(strip, block, block.start + a - block.at, block.start + b - block.at)
                if dtype == torch.float16 and block and bool(strip.isinf().any()):
                    raise UserError(f"{self.hf.folder}: {block.name} has numbers beyond float16's largest, 65504; choose --dtype bfloat16 or float32")
                yield strip, block.name if block else piece.key

    def _fill(self, strip: Tensor, block: Block, first: int, last: int) -> None:
        name = self.mtp.source_of(block.name)
        if block.transposed:
            assert block.expert is not None, "matrices of experts alone are transposed"
            strip.copy_(self.hf.rows(name, block.expert, block.expert + 1)[0][:, first:last].T)
        else:
            self.hf.read(name, first, last, strip)

    def _origin(self) -> dict[str, Any]:
        dtypes = {}
        for piece in self.pieces:
            for block in piece.blocks:
                if block.name in self.hf and _widens(self.hf.dtype(block.name), self.dtypes[piece.key]):
                    dtypes[block.name] = NAMES[self.hf.dtype(block.name)]
        return {"schema": "miles.source/1", "mtp_layers": self.options.mtp_layers, "copies": self.copies, "dtypes": dtypes}

    def _plan(self) -> Iterator[list[Part]]:
        parts: list[Part] = []
        size = 0
        for piece in self.pieces:
            dtype = self.dtypes[piece.key]
            step = strip_rows(dtype, piece.shape, CHUNK_BYTES)
            for first in range(0, piece.shape[0], step):
                part = Part(piece, first, min(piece.shape[0], first + step))
                amount = size_of((dtype, (part.last - part.first, *piece.shape[1:])))
                if parts and size + amount > self.file_bytes:
                    yield parts
                    parts, size = [], 0
                parts.append(part)
                size += amount
        if parts:
            yield parts

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Of each tensor: its own, the one asked for, or one that holds all numbers of the source's tensors that it is made of."""
        found: dict[str, torch.dtype] = {}
        for piece in self.pieces:
            if piece.dtype is not None:
                found[piece.key] = torch.float32
            elif self.options.dtype is not None:
                found[piece.key] = DTYPES[self.options.dtype]
            else:
                for name in {self.mtp.source_of(block.name) for block in piece.blocks}:
                    dtype = self.hf.dtype(name if name in self.hf else self.pieces[0].blocks[0].name)
                    found[piece.key] = torch.promote_types(found.get(piece.key, dtype), dtype)
        return found


def _widens(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a tensor was given another dtype that holds all its numbers."""
    return source != target and torch.promote_types(source, target) == target


def strip_rows(dtype: torch.dtype, shape: tuple[int, ...], most: int | None = None) -> int:
    """Rows of at most so many bytes (STRIP_BYTES), at least one; whole FP8 blocks where there are several."""
    step = max(1, (STRIP_BYTES if most is None else most) // max(1, size_of((dtype, shape[1:]))))
    return step - step % 128 if step >= 128 else step


def _runs(part: Part) -> Iterator[tuple[Block | None, int, int]]:
    """The chunk's rows as runs of one block each, None for the padding that no block covers."""
    at = part.first
    for block in sorted(part.piece.blocks, key=lambda block: block.at):
        first, last = max(part.first, block.at), min(part.last, block.at + block.rows)
        if first < last:
            if at < first:
                yield None, at, first
            yield block, first, last
            at = last
    if at < part.last:
        yield None, at, part.last
