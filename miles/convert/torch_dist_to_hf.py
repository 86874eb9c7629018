"""A torch_dist checkpoint to a Hugging Face folder: ours, or what megatron-core saved in training (its optimizer state is passed over)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from miles.config.exits import UserError
from miles.config.json_file import read_object
from miles.convert.conversion import SOURCE, strip_rows
from miles.convert.durable import copy_durable, write_durable
from miles.convert.model_files import config_files
from miles.convert.nan import NanWatch, nan_warnings
from miles.convert.output import Output
from miles.convert.progress import Progress
from miles.convert.report import Report
from miles.convert.safetensors_file import DTYPES, INDEX, header, index, size_of, widest_first
from miles.convert.torch_dist_source import TorchDistSource, is_model
from miles.convert.units import Rank, Units
from miles.models.hf_folder import SHARD_BYTES
from miles.models.maps.entry import Block
from miles.models.maps.find import Known, known_folder
from miles.models.maps.pieces import EMBEDDING, OUTPUT, Piece, mtp_copies, pieces

FILES, SMALLEST_SHARD = 16, 1 << 30  # of a small model so many files, that all workers have something to do
Place = tuple[str, tuple[int, ...]]  # tensor of the checkpoint, index on its leading axes


def torch_dist_to_hf(
    source: str | Path, output: str | Path, hf: str | Path | None = None, me: Rank | None = None, quiet: bool = True, strict: bool = False
) -> Report:
    """Write a Hugging Face folder. hf: a folder with the model's config.json and tokenizer (None: the one kept in the checkpoint).

    strict: refuse NaN instead of warning. MTP layers are written where the checkpoint has them. UserError, one line, where tensors are missing or of another shape.
    """
    me, dist = me or Rank(), TorchDistSource(source)
    folder = Path(hf) if hf is not None else dist.folder / "hf"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: config.json is missing; give the model's Hugging Face folder with --hf")
    work = Export(known_folder(folder), dist, folder, strict)
    out = Path(output)
    units = Units(out, work.fingerprint, work.names, work.write, lambda records: work.finish(out, records))
    progress = Progress(work.bytes, quiet or me.rank != 0)
    try:
        resumed = units.run(me, progress)
    finally:
        progress.end()
    return Report(str(out), len(work.tensors), work.bytes, len(work.names), resumed, work.warnings)


class Export:
    """The plan: which files hold which tensors, and which pieces of the checkpoint a tensor comes from."""

    def __init__(self, known: Known, dist: TorchDistSource, folder: Path, strict: bool = False) -> None:
        self.known, self.dist, self.folder, self.strict = known, dist, folder, strict
        self.warnings: list[str] = []
        self.origin = read_object(dist.folder / SOURCE) if (dist.folder / SOURCE).is_file() else {}
        self.mtp_layers = 0
        while f"mtp.layers.{self.mtp_layers}.eh_proj.weight" in dist:
            self.mtp_layers += 1
        self.sources: dict[str, list[tuple[Piece, Block, Place]]] = {}
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for piece in pieces(known, mtp_layers=self.mtp_layers):
            place = self._place(piece)
            for block in piece.blocks:
                self.sources.setdefault(block.name, []).append((piece, block, place))
                self.tensors[block.name] = (self._dtype(block.name, place[0]), block.shape)
        self._check_all_used()
        copies = self.origin.get("copies") if self.origin else mtp_copies(known, self.mtp_layers)
        self.copies = {name: of for name, of in (copies or {}).items() if of in self.sources}
        for name, of in self.copies.items():
            self.tensors[name] = self.tensors[of]
        self.bytes = sum(size_of(tensor) for tensor in self.tensors.values())
        self.files = self._files()
        count = len(self.files)
        self.names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

    @property
    def fingerprint(self) -> str:
        """Of all that decides the files' content."""
        stat = (self.dist.folder / ".metadata").stat()
        told = [self.known.config.fields, str(self.dist.folder.resolve()), stat.st_size, stat.st_mtime_ns, self.origin, self.names, self.strict]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def write(self, i: int, file: Output) -> dict[str, Any]:
        """One safetensors file, in strips; returns the tensors with NaN in them."""
        nan = NanWatch(self.dist.folder, self.strict)
        members = {name: self.tensors[name] for name in self.files[i]}
        file.write(header({name: members[name] for name in widest_first(members)}))
        for name in widest_first(members):
            self._write_tensor(name, file, nan)
        return {"nan": sorted(nan.names)}

    def finish(self, out: Path, records: list[dict[str, Any]]) -> None:
        """Tokenizer, index, and the config last: without it the folder is no model."""
        self.warnings += nan_warnings(records)
        for file in config_files(self.folder):
            if file.name != "config.json":
                copy_durable(file, out / file.name)
        if len(self.names) > 1:
            write_durable(out / INDEX, index({name: self.names[i] for i, names in enumerate(self.files) for name in names}, self.bytes))
        write_durable(out / "config.json", json.dumps(self._config(), indent=2).encode() + b"\n")

    def _config(self) -> dict[str, Any]:
        """The model's config.json, true of what is written: not quantised, of these MTP layers and this dtype."""
        fields = read_object(self.folder / "config.json")
        inside = fields["text_config"] if self.known.prefix else fields
        if self.known.mtp_layers != self.mtp_layers:
            inside["num_nextn_predict_layers"] = self.mtp_layers
        dtype = str(next(iter(self.tensors.values()))[0]).removeprefix("torch.")  # the embedding's
        for told in (fields, inside):
            told.pop("quantization_config", None)
            told.pop("compression_config", None)
            told.update(dict.fromkeys({"dtype", "torch_dtype"} & told.keys(), dtype))
        return fields

    def _check_all_used(self) -> None:
        """UserError for weights of the model that config.json tells nothing of: without them it would be another model."""
        used = {key for sources in self.sources.values() for _, _, (key, _) in sources}
        left = sorted(key for key in self.dist.shapes if is_model(key) and key not in used)
        if left:
            kind = self.known.config.get("model_type")
            raise UserError(
                f"{self.dist.folder}: {left[0]} is no tensor of a {kind!r} model of {self.known.config.where} ({len(left)} such); "
                f"give the model's own config.json with --hf"
            )

    def _place(self, piece: Piece) -> Place:
        """Where the checkpoint has a piece, stacked or layer by layer."""
        for key, lead, axes in filter(None, [(piece.key, piece.lead, piece.axes), piece.other]):
            if key in self.dist:
                found = self.dist.shapes[key]
                longer = piece.key in (EMBEDDING, OUTPUT) and found[1:] == piece.shape[1:] and found[0] >= piece.shape[0]  # padded
                if found != axes + piece.shape and not longer:
                    raise UserError(f"{self.dist.folder}: {key} has the shape {list(found)}, config.json says {list(axes + piece.shape)}; give the model's own config.json with --hf")
                return key, lead
        raise UserError(f"{self.dist.folder}: {piece.key} is missing; give the model's own config.json with --hf, or restore the checkpoint")

    def _dtype(self, name: str, key: str) -> torch.dtype:
        told = self.origin.get("dtypes", {}).get(name)
        return DTYPES[told] if told in DTYPES else self.dist.dtypes[key]

    def _files(self) -> list[list[str]]:
        files: list[list[str]] = [[]]
        most, size = min(SHARD_BYTES, max(SMALLEST_SHARD, self.bytes // FILES)), 0
        for name, tensor in self.tensors.items():
            if files[-1] and size + size_of(tensor) > most:
                files.append([])
                size = 0
            files[-1].append(name)
            size += size_of(tensor)
        return files

    def _write_tensor(self, name: str, file: Output, nan: NanWatch) -> None:
        dtype, shape = self.tensors[name]
        turned = self._turned(name)
        inner = shape[1:] if turned else shape  # a matrix for each expert, or the tensor itself
        step = strip_rows(dtype, inner)
        for expert in range(shape[0]) if turned else (None,):
            for first in range(0, inner[0], step):
                last = min(inner[0], first + step)
                strip = file.space(dtype, last - first, *inner[1:])
                self._part(name, expert, first, last, strip)
                nan.look(strip, name)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows of a Hugging Face tensor, put together from the checkpoint."""
        dtype, shape = self.tensors[name]
        out = torch.empty((last - first, *shape[1:]), dtype=dtype)
        if self._turned(name):
            for expert in range(first, last):
                self._part(name, expert, 0, shape[1], out[expert - first])
        else:
            self._part(name, None, first, last, out)
        return out

    def _turned(self, name: str) -> bool:
        return self.sources[self.copies.get(name, name)][0][1].transposed

    def _part(self, name: str, expert: int | None, first: int, last: int, out: torch.Tensor) -> None:
        sources = self.sources[self.copies.get(name, name)]
        if expert is None:
            self._fill(out, first, last, sources)
            return
        _, block, (key, lead) = sources[expert]
        assert block.expert == expert, "pieces come in the experts' order"
        turned = torch.empty((block.rows, last - first), dtype=self.dist.dtypes[key])
        self.dist.copy(key, (*lead, block.at, first), turned)
        out.copy_(turned.T)

    def _fill(self, out: torch.Tensor, first: int, last: int, sources: list[tuple[Piece, Block, Place]]) -> None:
        for _, block, (key, lead) in sources:
            a, b = max(first, block.start), min(last, block.start + block.rows)
            if a < b:
                start = (*lead, block.at + a - block.start, *(0 for _ in block.shape[1:]))
                self.dist.copy(key, start, out[a - first : b - first])
