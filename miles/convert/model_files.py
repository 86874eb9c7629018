"""Which tensors of a Hugging Face folder a model's map uses, and what is wrong with the others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from miles.config.exits import UserError
from miles.convert.contradictions import culprits, deciding
from miles.convert.hf_source import HfSource
from miles.models.hf_folder import tokenizer_files
from miles.models.maps.find import Known
from miles.models.maps.pieces import Piece, mtp_copies
from miles.precision.fp8_blocks import BLOCK, SCALE

BUFFERS = ("rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")


@dataclass
class Found:
    """What a source holds beside the map's tensors: copies that MTP layers repeat, MTP layers left out, tensors of another part of the model."""

    copies: dict[str, str] = field(default_factory=dict)
    mtp_layers: int = 0
    left_out: list[str] = field(default_factory=list)


def source_mtp_layers(known: Known, names: Iterable[str]) -> int:
    """MTP layers that a source's tensors show: layers after the last with the projection of one."""
    if not known.family.mtp:
        return 0
    found, held = 0, set(names)
    while known.full(f"model.layers.{known.config.layers + found}.eh_proj.weight") in held:
        found += 1
    return found


def check_quantised(known: Known, source: HfSource) -> None:
    """FP8 in blocks of 128 × 128 is dequantised on the way; UserError for anything else, which would be misread."""
    quantised = known.config.get("quantization_config") or known.config.get("compression_config")
    if quantised:
        method, block = quantised.get("quant_method"), quantised.get("weight_block_size")
        if method != "fp8" or block != [BLOCK, BLOCK]:
            raise UserError(
                f"{source.folder}: quantised by {method!r} with weight_block_size {block!r}; FP8 in blocks of {BLOCK} × {BLOCK} is read directly, "
                f"turn others into bf16 first (tools/convert/quantize.py --method bf16)"
            )


def examine(known: Known, source: HfSource, wanted: list[Piece], mtp_layers: int) -> Found:
    """UserError for a tensor that is missing, has another shape than config.json says, holds no floating-point numbers, or is known to nobody."""
    shapes = {block.name: block.shape for piece in wanted for block in piece.blocks}
    for name, shape in shapes.items():
        if name not in source:
            raise _refusal(known, source, name, f"{source.folder}: {name} is missing; restore the folder from its origin")
        if source.shape(name) != shape:
            axes = range(len(shape)) if len(shape) == len(source.shape(name)) else ()
            stored = source.shapes
            fields = sorted({field for axis in axes if shape[axis] != source.shape(name)[axis] for field in deciding(known, stored, name, axis)})
            told = f"config.json says {list(shape)}" + (f" ({', '.join(fields)})" if fields else "")
            raise _refusal(known, source, name, f"{source.folder}: {name} has the shape {list(source.shape(name))}, {told}; restore the folder from its origin")
        source.check(name)
    found = Found(mtp_layers=source_mtp_layers(known, source.stored))
    copies = mtp_copies(known, found.mtp_layers)
    after = tuple(known.full(f"model.layers.{known.config.layers + i}.") for i in range(found.mtp_layers))
    unknown = []
    for name in source.stored:
        base = name.removesuffix(SCALE)
        if name in shapes or base in shapes:
            continue
        if base in copies and mtp_layers:
            found.copies[base] = copies[base]
        elif known.tied and name == known.full("lm_head.weight"):
            found.copies[name] = known.full("model.embed_tokens.weight")
        elif (after and name.startswith(after)) or not name.startswith(known.prefix) or name.endswith(BUFFERS):
            found.left_out.append(name)
        else:
            unknown.append(name)
    if unknown:
        plain = f"{source.folder}: {unknown[0]} is no tensor of a {known.config.get('model_type')!r} model of this config.json ({len(unknown)} such); correct config.json"
        raise _refusal(known, source, unknown[0], plain)
    for name, of in found.copies.items():
        if not _equal(source, name, of):
            tied = f" ({known.config.where}: tie_word_embeddings = {str(known.tied).lower()})" if name == known.full("lm_head.weight") else ""
            raise UserError(f"{source.folder}: {name} differs from {of}, of which Megatron keeps one{tied}; they can't be converted together")
    return found


def _refusal(known: Known, source: HfSource, name: str, plain: str) -> UserError:
    """By the field of config.json that contradicts the tensors, where one alone does; else what is plain."""
    fields = culprits(known, source.shapes, name)
    if not fields:
        return UserError(plain)
    told = " or ".join(f"{field} = {json.dumps(value)} ({json.dumps(other)} would fit)" for field, value, other in fields)
    how = f"has the shape {list(source.shape(name))}" if name in source else "is missing"
    return UserError(f"{known.config.where}: {told} contradicts the tensors: {name} {how}; correct config.json, or restore the folder from its origin")


def _equal(source: HfSource, one: str, other: str) -> bool:
    if source.shape(one) != source.shape(other):
        return False
    rows, step = source.shape(one)[0], 4096
    return all(
        bool((source.values(one, at, min(rows, at + step)) == source.values(other, at, min(rows, at + step))).all()) for at in range(0, rows, step)
    )


def config_files(folder: Path) -> list[Path]:
    """What travels with the weights: config, tokenizer, generation settings; a model's own code is not copied."""
    return [path for path in (folder / "config.json", *tokenizer_files(folder)) if path.is_file()]
