"""Two checkpoints of either format compared tensor by tensor, under Hugging Face names: equal bits, or the largest difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from miles.config.exits import UserError
from miles.convert.conversion import CHUNK_BYTES
from miles.convert.hf_source import HfSource
from miles.convert.look import is_torch_dist
from miles.convert.progress import Progress
from miles.convert.safetensors_file import size_of
from miles.convert.torch_dist_source import TorchDistSource
from miles.convert.torch_dist_to_hf import Export
from miles.models.maps.find import known_folder
from miles.precision.fp8_blocks import SCALE


@dataclass
class Verdict:
    """equal: every tensor is in both, with equal shape, dtype and bits. different: name and what differs."""

    equal: bool
    compared: int
    bytes: int
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    different: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _Side:
    """Tensors under Hugging Face names: dtype, shape, and rows [first, last) of any."""

    def __init__(self, folder: Path, hf: Path | None) -> None:
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.rows: Callable[[str, int, int], torch.Tensor]
        if is_torch_dist(folder):
            source = TorchDistSource(folder)
            config = hf or source.folder / "hf"
            if not (config / "config.json").is_file():
                raise UserError(f"{config}: config.json is missing; give the model's Hugging Face folder with --hf")
            export = Export(known_folder(config), source, config)
            self.tensors, self.rows = export.tensors, export.rows
        else:
            found = HfSource(folder)
            self.tensors = {name: (found.dtype(name), found.shape(name)) for name in found.stored if not name.endswith(SCALE)}
            self.rows = found.values


def verify(first: str | Path, second: str | Path, hf: str | Path | None = None, quiet: bool = True) -> Verdict:
    """Compare. hf: a folder with config.json for a torch_dist checkpoint that keeps none. FP8 blocks count by the bfloat16 values they stand for."""
    one, other = (_Side(Path(folder), Path(hf) if hf is not None else None) for folder in (first, second))
    verdict = Verdict(True, 0, 0, sorted(set(one.tensors) - set(other.tensors)), sorted(set(other.tensors) - set(one.tensors)))
    both = [name for name in one.tensors if name in other.tensors]
    progress = Progress(sum(size_of(side.tensors[name]) for side in (one, other) for name in both), quiet)
    for name in both:
        (dtype, shape), (other_dtype, other_shape) = one.tensors[name], other.tensors[name]
        verdict.compared += 1
        if shape != other_shape:
            verdict.different.append({"name": name, "what": f"shapes {list(shape)} and {list(other_shape)}"})
            continue
        count, largest = _differences(one, other, name, shape, verdict, progress)
        if not count and dtype == other_dtype:
            continue
        what = f"{_word(dtype)} and {_word(other_dtype)}" if dtype != other_dtype else f"{count} numbers differ"
        finite = math.isfinite(largest)  # JSON has no other numbers
        verdict.different.append({"name": name, "what": what, "largest": largest} if finite else {"name": name, "what": f"{what}, by NaN or infinity"})
    progress.end()
    verdict.equal = not (verdict.only_first or verdict.only_second or verdict.different)
    return verdict


def _differences(one: _Side, other: _Side, name: str, shape: tuple[int, ...], verdict: Verdict, progress: Progress) -> tuple[int, float]:
    width = int(torch.Size(shape[1:]).numel()) * 4
    step, count, largest = max(1, CHUNK_BYTES // max(1, width)), 0, 0.0
    rows = shape[0] if shape else 1  # a single number
    for first in range(0, rows, step):
        a, b = (side.rows(name, first, min(rows, first + step)) for side in (one, other))
        verdict.bytes += a.nbytes + b.nbytes
        progress.add(a.nbytes + b.nbytes)
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            continue
        gap = (a.float() - b.float()).abs()
        count += int((_bits(a) != _bits(b)).sum()) if a.dtype == b.dtype else int((gap != 0).sum())
        largest = max(largest, float(gap.nan_to_num(nan=float("inf")).max()))
    return count, largest


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As whole numbers, so that NaN equals NaN and zero differs from minus zero."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
