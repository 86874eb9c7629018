"""Hugging Face folders of safetensors: write, read and fingerprint named tensors. No pickle anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from miles.config.exits import UserError

SHARD_BYTES = 5_000_000_000
NamedTensors = Iterable[tuple[str, torch.Tensor]]


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a model under their Hugging Face names; a tied head is left out, as in the files transformers writes."""
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, tensor


def save_hf(folder: str | Path, config: Any, files: Iterable[str | Path], tensors: NamedTensors, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json, copies of `files` (tokenizer and the like), and the tensors as safetensors shards with an index.

    config: a transformers config or a dict. tensors may be an iterator: at most one shard is held in memory. Writes into a folder that
    exists or makes it; making it appear at once and durable is the caller's business.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = config if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=True))
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        nonlocal held, size
        if held:
            save_file(held, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(held))
            held, size = {}, 0

    for name, tensor in tensors:
        dtype = dtype or tensor.dtype
        data = tensor.detach().to("cpu").contiguous()
        if any(data.data_ptr() == other.data_ptr() and data.numel() for other in held.values()):
            data = data.clone()  # safetensors refuses shared memory
        amount = data.numel() * data.element_size()
        if held and size + amount > shard_bytes:
            flush()
        held[name] = data
        size += amount
        total += amount
    flush()
    if not shards:
        raise UserError(f"no tensors to write into {folder}")
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
    else:
        where = {}
        for i, names in enumerate(shards):
            final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"part-{i}.safetensors").rename(folder / final)
            where.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    described = {**described, "dtype": str(dtype).removeprefix("torch.")}
    described.pop("_attn_implementation", None)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    for file in files:
        shutil.copyfile(file, folder / Path(file).name)


def tokenizer_files(folder: str | Path) -> list[Path]:
    """Files of a Hugging Face folder that travel with the weights: tokenizer, chat template, generation settings."""
    wanted = ("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json")
    return sorted({path for pattern in wanted for path in Path(folder).glob(pattern) if path.is_file()})


def load_state(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every safetensors file of a folder, one tensor in memory at a time; ValueError where there is none."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if not files or missing:
        raise UserError(f"{folder} holds no complete safetensors weights (missing: {', '.join(missing) or 'model.safetensors'})")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)


def weight_checksum(tensors: NamedTensors) -> str:
    """Fingerprint of named tensors: xxh3_128 (hex) over "name dtype shape" and the bytes, in sorted name order.

    Each tensor is hashed on arrival and the digests are combined in sorted order, so an iterator never needs all tensors at once.
    """
    digests: dict[str, bytes] = {}
    for name, tensor in tensors:
        data = tensor.detach().to("cpu").contiguous()
        one = xxhash.xxh3_128(f"{name} {str(data.dtype).removeprefix('torch.')} {tuple(data.shape)}\n".encode())
        one.update(data.reshape(-1).view(torch.uint8).numpy().data)
        digests[name] = one.digest()
    whole = xxhash.xxh3_128()
    for name in sorted(digests):
        whole.update(digests[name])
    return whole.hexdigest()
