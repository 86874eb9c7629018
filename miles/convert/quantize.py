"""Hugging Face folders: bf16 to FP8 blocks or to INT4 groups of compressed-tensors, and back."""

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
from miles.config.json_file import read_object
from miles.convert.conversion import strip_rows
from miles.convert.durable import copy_durable, write_durable
from miles.convert.hf_source import HfSource
from miles.convert.model_files import config_files
from miles.convert.nan import NanWatch, nan_warnings
from miles.convert.output import Output
from miles.convert.progress import Progress
from miles.convert.report import Report
from miles.convert.safetensors_file import INDEX, Wanted, header, index, size_of, widest_first
from miles.convert.units import Rank, Units
from miles.precision import fp8_blocks, int4_groups

METHODS = ("fp8", "int4", "bf16")
# As the families' published FP8 checkpoints choose: the experts' routers and small projections are kept, and so is all that is not language.
LINEAR = ("_proj.weight", "_proj_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight", ".wq_b.weight", ".wk.weight")
KEPT = ("embed_tokens", "lm_head", "norm", ".gate.", "router", "eh_proj", "indexer.weights_proj", "shared_expert_gate", "vision_", "audio_", "multi_modal_")


@dataclass(frozen=True)
class Target:
    """method: fp8, int4 or bf16. group: numbers that share a scale (int4). power_of_two: scales (fp8). strict: refuse NaN also where it is kept.
    UserError for what can't be."""

    method: str
    power_of_two: bool = False
    group: int = 32
    strict: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is not known; known: {', '.join(METHODS)}")
        if self.group < int4_groups.PER_WORD or self.group % int4_groups.PER_WORD:
            raise UserError(f"--group-size {self.group}: codes are packed by {int4_groups.PER_WORD}; give a multiple of that, such as 32")


def quantize(source: str | Path, output: str | Path, target: Target, me: Rank | None = None, quiet: bool = True) -> Report:
    """Write a folder with the linear layers' weights in the target's form; embeddings, heads, norms and routers stay as they are.

    One file for each of the source's, a strip of a matrix at a time in memory. UserError, one line, for what can't be: also for NaN and infinity
    in a weight to be quantised, whose whole block or group would be lost.
    """
    me, hf = me or Rank(), HfSource(source)
    config = read_object(Path(source) / "config.json")
    described = "quantization_config" in config or "compression_config" in config
    quantised = described or any(map(hf.quantised, hf.stored))
    if quantised != (target.method == "bf16"):
        mend = "choose --method fp8 or int4" if target.method == "bf16" else "convert it to bf16 first"
        raise UserError(f"{Path(source) / 'config.json'}: the model is {'already' if quantised else 'not'} quantised; {mend}")
    if described:
        _check_readable(config, Path(source) / "config.json")
    work = _Work(Path(source), hf, target, config)
    units = Units(Path(output), work.fingerprint, work.names, work.write, lambda records: work.finish(Path(output), records))
    progress = Progress(hf.bytes, quiet or me.rank != 0)
    try:
        resumed = units.run(me, progress)
    finally:
        progress.end()
    return Report(str(output), len(hf.stored), hf.bytes, len(work.names), resumed, work.warnings)


class _Work:
    """One file of the output for each file of the source."""

    def __init__(self, source: Path, hf: HfSource, target: Target, config: dict[str, Any]) -> None:
        self.source, self.hf, self.target, self.config = source, hf, target, config
        self.warnings: list[str] = []
        self.names = sorted({stored.file.name for stored in hf.stored.values()})
        self.made = {name: self._plan(name) for name in hf.stored}
        if target.method != "bf16" and not any(map(self._quantises, hf.stored)):
            why = f" with rows that groups of {target.group} divide" if target.method == "int4" else ""
            raise UserError(f"{source}: no linear layers{why}, so nothing would be quantised; give a language model's folder or another --group-size")
        self.members = [[name for name in widest_first(self._first()) if hf.stored[name].file.name == file] for file in self.names]

    @property
    def fingerprint(self) -> str:
        seen = [[name, (self.source / name).stat().st_size, (self.source / name).stat().st_mtime_ns] for name in self.names]
        return hashlib.sha256(json.dumps([seen, self.config, vars(self.target)], sort_keys=True).encode()).hexdigest()

    def write(self, i: int, file: Output) -> dict[str, Any]:
        """The header, from shapes alone, then strips of values."""
        nan = NanWatch(self.source, self.target.strict)
        made = {given: tensor for name in self.members[i] for given, tensor in self.made[name].items()}
        file.write(header(made))
        for name in self.members[i]:
            if self.target.method == "bf16":
                self._write_back(name, file, nan)
            elif self._quantises(name):
                self._write_codes(name, file)
            else:
                self._write_same(name, file, nan)
        return {"tensors": list(made), "size": sum(size_of(tensor) for tensor in made.values()), "nan": sorted(nan.names)}

    def finish(self, output: Path, records: list[dict[str, Any]]) -> None:
        """Tokenizer, index, and the config last: without it the folder is no model."""
        self.warnings += nan_warnings(records)
        for file in config_files(self.source):
            if file.name != "config.json":
                copy_durable(file, output / file.name)
        config = {key: value for key, value in self.config.items() if key not in ("quantization_config", "compression_config")}
        if self.target.method != "bf16":
            config["quantization_config"] = self._described()
        if len(self.names) > 1:
            where = {name: record["file"] for record in records for name in record["tensors"]}
            write_durable(output / INDEX, index(where, sum(record["size"] for record in records)))
        write_durable(output / "config.json", json.dumps(config, indent=2).encode() + b"\n")

    def _described(self) -> dict[str, Any]:
        matrices = [name for name in self.hf.stored if name.endswith(".weight") and len(self.hf.shape(name)) == 2]
        kept = sorted({"lm_head", *(name.removesuffix(".weight") for name in matrices if not self._quantises(name))})  # a tied head is in no file
        if self.target.method == "fp8":
            found: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [fp8_blocks.BLOCK] * 2}
            return found | ({"scale_fmt": "ue8m0"} if self.target.power_of_two else {}) | {"modules_to_not_convert": kept}
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": self.target.group, "dynamic": False, "actorder": None}
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": kept,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}},
        }  # fmt: skip

    def _quantises(self, name: str) -> bool:
        """Whether a tensor is the weight of a linear layer that is quantised."""
        shape = self.hf.shape(name)
        if not name.endswith(LINEAR) or len(shape) != 2 or any(word in name for word in KEPT):
            return False
        return self.target.method != "int4" or shape[1] % self.target.group == 0

    def _first(self) -> dict[str, Wanted]:
        """The source's tensors, each with the first of those that it becomes; those that belong to another are left out."""
        return {name: next(iter(made.values())) for name, made in self.made.items() if made}

    def _plan(self, name: str) -> dict[str, Wanted]:
        """What a tensor of the source becomes."""
        shape, dtype = self.hf.shape(name), self.hf.stored[name].dtype
        if self.hf.quantised(name) or self._quantises(name):
            self.hf.check(name)
        if self.target.method == "bf16":
            if name.endswith("weight_packed"):
                return {name.removesuffix("_packed"): (torch.bfloat16, self._unpacked(name))}
            return {} if self._is_scale(name) else {name: (self.hf.dtype(name), shape)}
        if not self._quantises(name):
            return {name: (dtype, shape)}
        if self.target.method == "fp8":
            return {name: (torch.float8_e4m3fn, shape), f"{name}{fp8_blocks.SCALE}": (torch.float32, fp8_blocks.scales_shape(shape))}
        packed, groups = (shape[0], shape[1] // int4_groups.PER_WORD), (shape[0], shape[1] // self.target.group)
        return {f"{name}_shape": (torch.int64, (2,)), f"{name}_packed": (torch.int32, packed), f"{name}_scale": (dtype, groups)}

    def _unpacked(self, name: str) -> tuple[int, int]:
        """The shape of the matrix whose codes these are. UserError where its other tensors do not fit."""
        base = name.removesuffix("packed")
        if len(self.hf.shape(name)) != 2:
            raise UserError(f"{self.source}: {name} has the shape {list(self.hf.shape(name))}, a matrix is needed; restore the folder from its origin")
        rows, words = self.hf.shape(name)
        shape = rows, words * int4_groups.PER_WORD
        for other in (f"{base}scale", f"{base}shape"):
            if other not in self.hf:
                raise UserError(f"{self.source}: {other} is missing; restore the folder from its origin")
        told, scales = self.hf.rows(f"{base}shape", 0, 2).tolist(), self.hf.shape(f"{base}scale")
        if told != list(shape) or scales[0] != rows or not scales[1] or shape[1] % scales[1]:
            raise UserError(f"{self.source}: {name} holds {list(shape)} numbers, {base}shape says {told} and {base}scale has {list(scales)}; restore the folder from its origin")
        return shape

    def _write_same(self, name: str, file: Output, nan: NanWatch) -> None:
        ((dtype, shape),) = self.made[name].values()
        if dtype == self.hf.stored[name].dtype:  # of any shape, also one whose rows are longer than a buffer
            count = int(torch.Size(shape).numel())
            for first, last in _strips(count, strip_rows(dtype, (count,))):
                strip = file.space(dtype, last - first)
                self.hf.read_flat(name, first, strip)
                nan.look(strip, name)
            return
        for first, last in _strips(shape[0], strip_rows(dtype, shape)):
            strip = file.space(dtype, last - first, *shape[1:])
            self.hf.read(name, first, last, strip)
            nan.look(strip, name)

    def _write_codes(self, name: str, file: Output) -> None:
        shape, scales = self.hf.shape(name), []
        if self.target.method == "int4":
            file.write(_bytes(torch.tensor(shape)))
        for first, last in _strips(shape[0], max(fp8_blocks.BLOCK, strip_rows(torch.float32, shape))):
            rows = self.hf.rows(name, first, last)
            if not bool(rows.float().abs().max().isfinite()):
                raise UserError(f"{self.source}: NaN or infinity in {name}, which a quantised block can't hold beside its neighbours; restore the source")
            fp8 = self.target.method == "fp8"
            codes, scale = fp8_blocks.quantize(rows, self.target.power_of_two) if fp8 else int4_groups.quantize(rows, self.target.group)
            file.write(_bytes(codes))
            scales.append(scale)
        file.write(_bytes(torch.cat(scales)))

    def _write_back(self, name: str, file: Output, nan: NanWatch) -> None:
        if not name.endswith("weight_packed"):
            self._write_same(name, file, nan)
            return
        ((dtype, shape),) = self.made[name].values()
        scales = f"{name.removesuffix('packed')}scale"
        for first, last in _strips(shape[0], strip_rows(torch.float32, shape)):
            values = int4_groups.dequantize(self.hf.rows(name, first, last), self.hf.rows(scales, first, last))
            strip = file.space(dtype, last - first, shape[1])
            strip.copy_(values)
            nan.look(strip, name)

    def _is_scale(self, name: str) -> bool:
        return name.endswith(fp8_blocks.SCALE) or name.endswith(("weight_scale", "weight_shape"))


def _strips(rows: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(rows, first + step)) for first in range(0, rows, step))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _check_readable(config: dict[str, Any], where: Path) -> None:
    """UserError for a quantisation that would be misread."""
    told = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(told, dict):
        raise UserError(f"{where}: quantization_config is {told!r}, an object is needed; restore it from the checkpoint's origin")
    if told.get("quant_method") == "fp8" and told.get("weight_block_size") == [fp8_blocks.BLOCK] * 2:
        return
    groups = told.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else [{}]
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    if told.get("format") != "pack-quantized" or any({key: found.get(key) for key in wanted} != wanted or found.get("actorder") for found in weights):
        raise UserError(
            f"{where}: quantised by {told.get('quant_method')!r} in a way that is not read; FP8 in blocks of {fp8_blocks.BLOCK} × {fp8_blocks.BLOCK} "
            f"and symmetric INT4 groups of compressed-tensors are"
        )
