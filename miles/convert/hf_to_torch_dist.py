"""A Hugging Face folder to a torch_dist checkpoint, without a model and without a GPU."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.config.exits import UserError
from miles.convert.durable import write_durable
from miles.convert.hf_source import NAMES, HfSource
from miles.convert.model_files import config_files, examine, source_mtp_layers
from miles.convert.progress import Progress
from miles.convert.torch_dist_writer import COMMON, COMMON_STATE, write_metadata, write_object, write_tensor, write_tracker
from miles.convert.units import Rank, Units
from miles.models.maps.find import Known, known_folder
from miles.models.maps.pieces import Piece, padded_vocabulary, pieces
from miles.precision.fp8_blocks import BLOCK

CHUNK_BYTES = 32 << 20
FILE_BYTES = 1 << 30
SOURCE = "miles_source.json"
FOLDER = "release"


@dataclass(frozen=True)
class Options:
    """mtp_layers: MTP layers to include. init_mtp: how to make them up where the source has none (copy-last, random). dtype: of the
    checkpoint (None: the source's). strict: refuse NaN instead of warning."""

    mtp_layers: int = 0
    init_mtp: str | None = None
    make_vocab_size_divisible_by: int = 1
    tensor_parallel: int = 1
    dtype: str | None = None
    strict: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """Rows [first, last) of a piece: a chunk of the checkpoint."""

    piece: Piece
    first: int
    last: int


@dataclass
class Report:
    """What a conversion did."""

    output: str
    tensors: int
    bytes: int
    files: int
    resumed_files: int = 0
    warnings: list[str] = field(default_factory=list)


def hf_to_torch_dist(source: str | Path, output: str | Path, options: Options | None = None, me: Rank | None = None, quiet: bool = True) -> Report:
    """Write OUTPUT/release and the tracker file from a Hugging Face folder. Collective over `me.world` processes.

    UserError, one line, for a source that is not whole or not understood and for a destination that holds something else; nothing then
    looks like a checkpoint. Running it again after an interruption goes on.
    """
    options, me = options or Options(), me or Rank()
    known, hf, root = known_folder(source), HfSource(source), Path(output)
    work = Conversion(known, hf, options)
    units = Units(root / FOLDER, work.fingerprint, work.names, work.write, lambda records: work.finish(root, records))
    progress = Progress(work.bytes, quiet or me.rank != 0)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # four times as fast; readers don't check it, conversions have a better checksum
    try:
        resumed = units.run(me, progress)
    finally:
        torch.serialization.set_crc32_options(before)
        progress.end()
    if me.rank == 0 and not (root / "latest_checkpointed_iteration.txt").is_file():
        write_tracker(root)
    return Report(str(root), len(work.shapes), work.bytes, len(work.names), resumed, work.warnings)


class Conversion:
    """The plan of a conversion: chunks of at most 32 MB, files of about 1 GB, the same for any number of ranks."""

    def __init__(self, known: Known, hf: HfSource, options: Options) -> None:
        self.known, self.hf, self.options = known, hf, options
        _check_quantised(known, hf)
        self.warnings: list[str] = []
        rows = padded_vocabulary(known.config.number("vocab_size"), options.make_vocab_size_divisible_by, options.tensor_parallel)
        self.made = _made_up(known, hf, options)
        self.pieces = list(pieces(known, mtp_layers=options.mtp_layers, rows=rows))
        found = examine(known, hf, [piece for piece in self.pieces if not self._is_made(piece)], options.mtp_layers)
        self.copies = found.copies
        if found.mtp_layers > options.mtp_layers:
            self.warnings.append(f"{found.mtp_layers - options.mtp_layers} MTP layers of the source are left out; --mtp-num-layers {found.mtp_layers} includes them")
        others = [name for name in found.left_out if ".layers." not in name]
        if others:
            self.warnings.append(f"{len(others)} tensors beside the text model are left out, such as {others[0]}")
        self.shapes = {piece.key: piece.whole for piece in self.pieces}
        self.dtypes = {piece.key: self._dtype(piece) for piece in self.pieces}
        self.files = list(self._plan())
        self.names = [f"__{i}_0.distcp" for i in range(len(self.files))]
        self.bytes = sum(self._bytes(part) for parts in self.files for part in parts)

    @property
    def fingerprint(self) -> str:
        """Of all that decides the files' content: config, source files with sizes and times, options."""
        files = sorted({stored.file for stored in self.hf.stored.values()})
        seen = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        told = [self.known.config.fields, seen, sorted(self.hf.stored), vars(self.options), CHUNK_BYTES, FILE_BYTES]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def write(self, i: int, file: Any) -> dict[str, Any]:
        """One file; returns where its chunks lie."""
        chunks, nan = [], []
        for part in self.files[i]:
            piece = part.piece
            tensor = self.rows(part)
            if tensor.numel() and tensor.is_floating_point() and bool(torch.isnan(tensor.max())):
                nan.append(piece.key)
                if self.options.strict:
                    raise UserError(f"{self.hf.folder}: NaN in {piece.blocks[0].name} ({piece.key}); restore the source, or leave --strict out")
            begin, length = write_tensor(file, tensor)
            offsets = (*piece.lead, part.first, *(0 for _ in piece.shape[1:]))
            sizes = (*(1 for _ in piece.lead), part.last - part.first, *piece.shape[1:])
            chunks.append([piece.key, offsets, sizes, self.names[i], begin, length])
            del tensor
        objects = []
        if i == 0:
            begin, length = write_object(file, None)  # every module's _extra_state is the same nothing
            objects = [[name, self.names[0], begin, length] for piece in self.pieces for name in piece.objects]
            begin, length = write_object(file, COMMON_STATE)
            objects.append([COMMON, self.names[0], begin, length])
        return {"chunks": chunks, "objects": objects, "nan": nan}

    def rows(self, part: Part) -> Tensor:
        """A chunk's values [1 for each leading axis, rows, columns]: a view of the source where one block covers it, else put together."""
        piece, dtype = part.piece, self.dtypes[part.piece.key]
        shape = (*(1 for _ in piece.lead), part.last - part.first, *piece.shape[1:])
        if self._is_made(piece) and (self.made == "random" or self._name(piece.blocks[0].name) not in self.hf):
            return self._random(part, dtype).view(shape)
        overlaps = [block for block in piece.blocks if block.at < part.last and part.first < block.at + block.rows]
        if len(overlaps) == 1:
            block = overlaps[0]
            if not block.transposed and block.at <= part.first and part.last <= block.at + block.rows:
                first = block.start + part.first - block.at
                return self.hf.values(self._name(block.name), first, first + part.last - part.first).to(dtype).view(shape)
        out = torch.zeros((part.last - part.first, *piece.shape[1:]), dtype=dtype)
        for block in overlaps:
            a, b = max(part.first, block.at), min(part.last, block.at + block.rows)
            first, last, target = block.start + a - block.at, block.start + b - block.at, out[a - part.first : b - part.first]
            if block.transposed:
                assert block.expert is not None, "matrices of experts alone are transposed"
                target.copy_(self.hf.values(block.name, block.expert, block.expert + 1)[0][:, first:last].T)
            else:
                target.copy_(self.hf.values(self._name(block.name), first, last))
        return out.view(shape)

    def finish(self, root: Path, records: list[dict[str, Any]]) -> None:
        """Metadata, what is needed for the way back, and the tracker file last."""
        folder = root / FOLDER
        nan = sorted({key for record in records for key in record["nan"]})
        if nan:
            self.warnings.append(f"NaN in {nan[0]} ({len(nan)} such tensors)")
        for file in config_files(self.hf.folder):
            (folder / "hf").mkdir(exist_ok=True)
            shutil.copyfile(file, folder / "hf" / file.name)
        write_durable(folder / SOURCE, json.dumps(self._origin(), indent=1).encode())
        chunks = [chunk for record in records for chunk in record["chunks"]]
        write_metadata(folder, self.shapes, self.dtypes, chunks, [item for record in records for item in record["objects"]])
        write_tracker(root)

    def _origin(self) -> dict[str, Any]:
        dtypes = {}
        for piece in self.pieces:
            for block in piece.blocks:
                if block.name in self.hf and self.hf.dtype(block.name) != self.dtypes[piece.key]:
                    dtypes[block.name] = NAMES[self.hf.dtype(block.name)]
        return {"schema": "miles.source/1", "mtp_layers": self.options.mtp_layers, "copies": self.copies, "dtypes": dtypes}

    def _plan(self) -> Iterator[list[Part]]:
        parts: list[Part] = []
        size = 0
        for piece in self.pieces:
            width = self.dtypes[piece.key].itemsize
            for count in piece.shape[1:]:
                width *= count
            step = max(1, CHUNK_BYTES // max(1, width))
            if step >= 128:
                step -= step % 128  # whole FP8 blocks
            for first in range(0, piece.shape[0], step):
                part = Part(piece, first, min(piece.shape[0], first + step))
                amount = self._bytes(part)
                if parts and size + amount > FILE_BYTES:
                    yield parts
                    parts, size = [], 0
                parts.append(part)
                size += amount
        if parts:
            yield parts

    def _bytes(self, part: Part) -> int:
        product = (part.last - part.first) * self.dtypes[part.piece.key].itemsize
        for count in part.piece.shape[1:]:
            product *= count
        return product

    def _dtype(self, piece: Piece) -> torch.dtype:
        if piece.dtype is not None:
            return torch.float32
        if self.options.dtype is not None:
            return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[self.options.dtype]
        name = self._name(piece.blocks[0].name)
        return self.hf.dtype(name if name in self.hf else self.pieces[0].blocks[0].name)

    def _is_made(self, piece: Piece) -> bool:
        return self.made is not None and piece.key.startswith("mtp.")

    def _name(self, name: str) -> str:
        """The source's tensor, or the one that is copied in place of a missing MTP layer's."""
        first = f"{self.known.prefix}model.layers."
        last = self.known.config.layers - 1
        if self.made != "copy-last" or not name.startswith(first):
            return name
        number, _, rest = name.removeprefix(first).partition(".")
        return f"{first}{last}.{rest}" if int(number) > last else name

    def _random(self, part: Part, dtype: torch.dtype) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.options.seed} {part.piece.key} {part.piece.lead} {part.first}".encode()).digest()[:7], "big")
        size = (part.last - part.first, *part.piece.shape[1:])
        if len(size) == 1:
            return torch.full(size, 0.0 if part.piece.dtype else 1.0).to(dtype)
        return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * float(self.known.config.get("initializer_range", 0.02))).to(dtype)


def _check_quantised(known: Known, hf: HfSource) -> None:
    """FP8 in blocks of 128 × 128 is dequantised on the way; anything else would be misread."""
    quantised = known.config.get("quantization_config") or known.config.get("compression_config")
    if not quantised:
        return
    method, block = quantised.get("quant_method"), quantised.get("weight_block_size")
    if method != "fp8" or list(block or []) != [BLOCK, BLOCK]:
        raise UserError(
            f"{hf.folder}: quantised by {method!r} with weight_block_size {block!r}; FP8 in blocks of {BLOCK} × {BLOCK} is read directly, "
            f"turn others into bf16 first (tools/convert/quantize.py --method bf16)"
        )


def _made_up(known: Known, hf: HfSource, options: Options) -> str | None:
    """How MTP layers are made up; None where the source has them or none are asked for."""
    if not options.mtp_layers:
        return None
    if not known.family.mtp:
        raise UserError(f"{hf.folder}: model_type {known.config.get('model_type')!r} has no MTP layers that this tool knows; leave --mtp-num-layers out")
    there = source_mtp_layers(known, hf.stored)
    if there >= options.mtp_layers:
        return None
    if there or options.init_mtp is None:
        mend = f"ask for {there}" if there else "leave --mtp-num-layers out, or make them up with --init-mtp copy-last or random"
        raise UserError(f"{hf.folder}: {options.mtp_layers} MTP layers asked for, the source has {there}; {mend}")
    return options.init_mtp
