"""What is inside the model folders that a run names, as far as a look at their heads shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles.config.exits import ConfigError
from miles.config.json_file import RESTORE, read_object
from miles.config.schema import RunConfig
from miles.plan.abilities import Entry

VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def unusable(config: RunConfig) -> Iterator[Entry]:
    """Errors: a tokenizer or weights that are missing or cut off. No weights are read."""
    folder = Path(config.model.hf_checkpoint) if config.model.hf_checkpoint else None
    if folder is not None and (folder / "config.json").is_file():
        yield from _tokenizer("model.hf_checkpoint", folder)
        yield from _weights("model.hf_checkpoint", folder)
    if config.checkpoint.ref_load and (Path(config.checkpoint.ref_load) / "config.json").is_file():
        yield from _weights("checkpoint.ref_load", Path(config.checkpoint.ref_load))


def _tokenizer(where: str, folder: Path) -> Iterator[Entry]:
    path = folder / "tokenizer.json"
    if path.is_file():
        _, problem = _object(path)
        if problem:
            yield "error", where, problem, RESTORE
    elif not any((folder / name).is_file() for name in VOCABULARIES):
        yield "error", where, f"{folder}: has neither tokenizer.json nor an older vocabulary ({', '.join(VOCABULARIES)})", "copy the tokenizer's files there"


def _weights(where: str, folder: Path) -> Iterator[Entry]:
    """Every safetensors file as long as its own header says."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        content, problem = _object(index)
        shards = content.get("weight_map")
        if problem or not isinstance(shards, dict):
            yield "error", where, problem or f"{index}: no weight_map", RESTORE
            return
        files = sorted({folder / str(name) for name in shards.values()})
    if not files:
        yield "error", where, f"{folder}: no safetensors weights", "convert them first (other formats are pickles and are not read)"
    for file in files:
        problem = _cut_off(file)
        if problem:
            yield "error", where, f"{file}: {problem}", RESTORE
            return


def _cut_off(path: Path) -> str | None:
    """What is wrong with a safetensors file: u64 length of the header, the header (JSON), the tensors' bytes at its data_offsets."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                return f"damaged: its header does not fit in {size} bytes"
            header = json.loads(file.read(length))
        end = 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "damaged: its header is not one of safetensors"
    return None if end == size else f"damaged: {end} bytes by its header, {size} found"


def _object(path: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a file; the problem, without its mend, where there is none."""
    try:
        return read_object(path), None
    except ConfigError as error:
        return {}, str(error).removesuffix(f"; {RESTORE}")
