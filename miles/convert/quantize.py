"""Hugging Face folders: bf16 to FP8 blocks or to INT4 groups of compressed-tensors, and back."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.config.exits import UserError
from miles.convert.durable import write_durable
from miles.convert.hf_source import INDEX, NAMES, HfSource
from miles.convert.hf_to_torch_dist import Report
from miles.convert.model_files import config_files
from miles.convert.progress import Progress
from miles.convert.units import Rank, Units
from miles.models.maps.find import read_json
from miles.precision import fp8_blocks, int4_groups

METHODS = ("fp8", "int4", "bf16")
KEPT = ("embed_tokens", "lm_head", "norm", ".gate.", "router", "eh_proj", "indexer.weights_proj", "shared_expert_gate")
PACKED = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class Target:
    """method: fp8, int4 or bf16. group: numbers that share a scale (int4). power_of_two: scales (fp8)."""

    method: str
    power_of_two: bool = False
    group: int = 32


def quantize(source: str | Path, output: str | Path, target: Target, me: Rank | None = None, quiet: bool = True) -> Report:
    """Write a folder with the linear layers' weights in the target's form; embeddings, heads, norms and routers stay as they are.

    One file for each of the source's, a matrix at a time in memory. UserError, one line, for what can't be.
    """
    me, hf = me or Rank(), HfSource(source)
    config = read_json(Path(source) / "config.json")
    if target.method not in METHODS:
        raise UserError(f"method {target.method!r} is not known; known: {', '.join(METHODS)}")
    quantised = "quantization_config" in config or "compression_config" in config
    if quantised != (target.method == "bf16"):
        mend = "choose --method fp8 or int4" if target.method == "bf16" else "convert it to bf16 first"
        raise UserError(f"{Path(source) / 'config.json'}: the model is {'already' if quantised else 'not'} quantised; {mend}")
    work = _Work(Path(source), hf, target, config)
    units = Units(Path(output), work.fingerprint, work.names, work.write, lambda records: work.finish(Path(output), records))
    progress = Progress(hf.bytes, quiet or me.rank != 0)
    resumed = units.run(me, progress)
    progress.end()
    return Report(str(output), len(hf.stored), hf.bytes, len(work.names), resumed)


class _Work:
    """One file of the output for each file of the source."""

    def __init__(self, source: Path, hf: HfSource, target: Target, config: dict[str, Any]) -> None:
        self.source, self.hf, self.target, self.config = source, hf, target, config
        files = sorted({stored.file.name for stored in hf.stored.values()})
        self.names = files
        self.members = [[name for name, stored in hf.stored.items() if stored.file.name == file] for file in files]

    @property
    def fingerprint(self) -> str:
        seen = [[name, (self.source / name).stat().st_size, (self.source / name).stat().st_mtime_ns] for name in self.names]
        return hashlib.sha256(json.dumps([seen, self.config, vars(self.target)], sort_keys=True).encode()).hexdigest()

    def write(self, i: int, file: Any) -> dict[str, Any]:
        """Two passes: sizes for the header, then values."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in self.members[i]:
            for given, dtype, shape in self._plan(name):
                count = dtype.itemsize * int(torch.Size(shape).numel())
                header[given] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + count]}
                at += count
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for name in self.members[i]:
            for tensor in self._values(name):
                if tensor.numel():
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return {"tensors": [name for name in header if name != "__metadata__"], "size": at}

    def finish(self, output: Path, records: list[dict[str, Any]]) -> None:
        """Config, tokenizer, and the index last."""
        for file in config_files(self.source):
            if file.name != "config.json":
                shutil.copyfile(file, output / file.name)
        config = {key: value for key, value in self.config.items() if key not in ("quantization_config", "compression_config")}
        if self.target.method != "bf16":
            config["quantization_config"] = self._described()
        write_durable(output / "config.json", json.dumps(config, indent=2).encode() + b"\n")
        if len(self.names) > 1:
            where = {name: record["file"] for record in records for name in record["tensors"]}
            index = {"metadata": {"total_size": sum(record["size"] for record in records)}, "weight_map": dict(sorted(where.items()))}
            write_durable(output / INDEX, json.dumps(index, indent=2).encode() + b"\n")

    def _described(self) -> dict[str, Any]:
        if self.target.method == "fp8":
            found: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [fp8_blocks.BLOCK] * 2}
            return found | ({"scale_fmt": "ue8m0"} if self.target.power_of_two else {})
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": self.target.group, "dynamic": False, "actorder": None}
        kept = sorted(name.removesuffix(".weight") for name in self.hf.stored if name.endswith(".weight") and not self._quantises(name) and len(self.hf.shape(name)) == 2)
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": kept,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}},
        }  # fmt: skip

    def _quantises(self, name: str) -> bool:
        """Whether a tensor is the weight of a linear layer that is quantised."""
        if not name.endswith("_proj.weight") and not name.endswith((".w1.weight", ".w2.weight", ".w3.weight", ".wq_b.weight", ".wk.weight")):
            return False
        shape = self.hf.shape(name)
        fits = self.target.method != "int4" or shape[-1] % self.target.group == 0
        return len(shape) == 2 and fits and not any(word in name for word in KEPT)

    def _plan(self, name: str) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        shape, dtype = self.hf.shape(name), self.hf.stored[name].dtype
        base = name.removesuffix("weight_packed")
        if self.target.method == "bf16":
            if name.endswith("weight_packed"):
                yield f"{base}weight", torch.bfloat16, (shape[0], shape[1] * int4_groups.PER_WORD)
            elif not self._is_scale(name):
                yield name, self.hf.dtype(name), shape
        elif not self._quantises(name):
            yield name, dtype, shape
        elif self.target.method == "fp8":
            yield name, torch.float8_e4m3fn, shape
            yield f"{name}{fp8_blocks.SCALE}", torch.float32, (-(-shape[0] // fp8_blocks.BLOCK), -(-shape[1] // fp8_blocks.BLOCK))
        else:
            yield f"{name}_packed", torch.int32, (shape[0], shape[1] // int4_groups.PER_WORD)
            yield f"{name}_scale", dtype, (shape[0], shape[1] // self.target.group)
            yield f"{name}_shape", torch.int64, (2,)

    def _values(self, name: str) -> Iterator[Tensor]:
        shape = self.hf.shape(name)
        if self.target.method == "bf16":
            if name.endswith("weight_packed"):
                scale = f"{name.removesuffix('packed')}scale"
                yield int4_groups.dequantize(self._whole(name), self._whole(scale))
            elif not self._is_scale(name):
                yield from self._strips(name)
        elif not self._quantises(name):
            yield from self._strips(name)
        elif self.target.method == "fp8":
            yield from fp8_blocks.quantize(self._whole(name), self.target.power_of_two)
        else:
            yield from int4_groups.quantize(self._whole(name), self.target.group)
            yield torch.tensor(shape)

    def _whole(self, name: str) -> Tensor:
        if name not in self.hf:
            raise UserError(f"{self.source}: {name} is missing; restore the folder from its origin")
        shape = self.hf.shape(name)
        return self.hf.rows(name, 0, shape[0]) if shape else self.hf.rows(name, 0, 1)

    def _strips(self, name: str) -> Iterator[Tensor]:
        shape = self.hf.shape(name)
        if not shape:
            raise UserError(f"{self.source}: {name} is a single number, which no model of a known family has; remove it")
        step = 4096
        for first in range(0, shape[0], step):
            yield self.hf.values(name, first, min(shape[0], first + step))

    def _is_scale(self, name: str) -> bool:
        return name.endswith(fp8_blocks.SCALE) or name.endswith(("weight_scale", "weight_shape"))
