"""What is in a checkpoint of either format: tensors, sizes, dtypes, layout, MTP."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.config.json_file import read_object
from miles.convert.hf_source import HfSource
from miles.convert.model_files import source_mtp_layers
from miles.convert.torch_dist_source import TRACKER, TorchDistSource, is_model
from miles.models.dcp_metadata import METADATA
from miles.models.maps.find import known


@dataclass
class Look:
    """What inspect says. dtypes: bytes of each; tensors: name, dtype, shape, parts; refused: why config.json can't be converted, None where it can."""

    format: str
    folder: str
    family: str | None
    mtp_layers: int
    bytes: int
    parameters: int
    files: int
    dtypes: dict[str, int]
    layout: str
    other: dict[str, int] = field(default_factory=dict)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    refused: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(folder: str | Path) -> Look:
    """Look at a Hugging Face folder or a torch_dist checkpoint. UserError where it is neither, or not whole."""
    folder = Path(folder)
    if is_torch_dist(folder):
        return _torch_dist(TorchDistSource(folder))
    if (folder / "config.json").is_file():
        return _hf(folder)
    raise UserError(f"{folder}: neither a Hugging Face folder (config.json) nor a torch_dist checkpoint ({METADATA} or {TRACKER}); give one of them")


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder claims to be a torch_dist checkpoint."""
    return (folder / METADATA).is_file() or (folder / TRACKER).is_file()


def _hf(folder: Path) -> Look:
    config, source = folder / "config.json", HfSource(folder)
    fields, refused, mtp = read_object(config), None, 0
    try:
        mtp = source_mtp_layers(known(fields, str(config)), source.stored)
    except UserError as error:  # there is something to see all the same
        refused = str(error)
    dtypes: Counter[str] = Counter()
    tensors = []
    for name, stored in sorted(source.stored.items()):
        word = str(stored.dtype).removeprefix("torch.")
        dtypes[word] += stored.bytes
        tensors.append({"name": name, "dtype": word, "shape": list(stored.shape), "file": stored.file.name})
    files = len({stored.file for stored in source.stored.values()})
    parameters = sum(stored.bytes // stored.dtype.itemsize for name, stored in source.stored.items() if not name.endswith("_scale_inv"))
    kind = str(fields.get("model_type"))
    return Look("hf", str(folder), kind, mtp, source.bytes, parameters, files, dict(dtypes), "whole tensors", tensors=tensors, refused=refused)


def _torch_dist(source: TorchDistSource) -> Look:
    dtypes: Counter[str] = Counter()
    other: Counter[str] = Counter()
    tensors: list[dict[str, Any]] = []
    parameters = total = 0
    for key, shape in sorted(source.shapes.items()):
        count = 1
        for size in shape:
            count *= size
        amount = count * source.dtypes[key].itemsize
        if not is_model(key):
            other[key.split(".")[0]] += amount
            continue
        word = str(source.dtypes[key]).removeprefix("torch.")
        dtypes[word] += amount
        parameters, total = parameters + count, total + amount
        tensors.append({"name": key, "dtype": word, "shape": list(shape), "parts": len(source.chunks(key))})
    mtp = len({key.split(".")[2] for key in source.shapes if key.startswith("mtp.layers.")})
    stacked = any(key.startswith("decoder.layers.") and not key.split(".")[2].isdigit() for key in source.shapes)
    largest = max((tensor["parts"] for tensor in tensors), default=0)
    layout = f"{'layers stacked' if stacked else 'layer by layer'}, up to {largest} parts a tensor, any parallel layout can load it"
    config = source.folder / "hf" / "config.json"
    family = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    other["objects"] = len(source.objects)
    return Look("torch_dist", str(source.folder), family, mtp, total, parameters, len(source.files()), dict(dtypes), layout, dict(other), tensors)
