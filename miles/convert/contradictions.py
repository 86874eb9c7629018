"""Which field of config.json contradicts a checkpoint's tensors, so that a refusal can name it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from miles.config.exits import UserError
from miles.models.maps.entry import Config
from miles.models.maps.find import Known
from miles.models.maps.pieces import mtp_layer, whole_tensors
from miles.precision.fp8_blocks import SCALE

Shapes = Mapping[str, tuple[int, ...]]


def culprits(known: Known, stored: Shapes, name: str) -> list[tuple[str, Any, Any]]:
    """(field, its value, a value) for each field with which, changed alone, all tensors of `name`'s layer would be as config.json says.

    stored: the source's tensors. Tensors outside layers count as one layer. [] where no single field explains it: the tensors are damaged.
    """
    held = _scope(known, stored, name)
    fields = {"tie_word_embeddings": known.tied, **known.config.fields}
    found = []
    for field, value in fields.items():
        for other in _others(known, value, name, stored.get(name, ())):
            changed = replace(known, config=Config({**known.config.fields, field: other}, known.config.where))
            if _wanted(changed, stored, name) == held:
                found.append((field, value, other))
                break
    return found


def deciding(known: Known, stored: Shapes, name: str, axis: int) -> list[str]:
    """Fields, with their values, on which the size of an axis of a tensor depends."""
    size, found = (_wanted(known, stored, name) or {})[name][axis], []
    for field, value in known.config.fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            changed = replace(known, config=Config({**known.config.fields, field: 2 * value}, known.config.where))
            shape = (_wanted(changed, stored, name) or {}).get(name, ())
            if len(shape) > axis and shape[axis] != size:
                found.append(f"{field} = {value}")
    return found


def mtp_contradiction(known: Known, names: Iterable[str], there: int) -> str | None:
    """What config.json says of MTP layers against what the tensors show; None where both agree, or where it says nothing."""
    if not known.family.mtp or known.config.get("num_nextn_predict_layers") is None or known.mtp_layers == there:
        return None
    first = known.full(f"model.layers.{known.config.layers + min(there, known.mtp_layers)}.eh_proj.weight")
    return f"{known.config.where}: num_nextn_predict_layers = {known.mtp_layers}, but {first} is {'there' if first in set(names) else 'missing'}"


def _others(known: Known, value: Any, name: str, shape: tuple[int, ...]) -> Iterator[Any]:
    """Values that a field may have been meant to have, nearest first: those that the tensor's name and shape suggest."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        suggested = {0, *numbers, *(number + 1 for number in numbers), *shape}
        suggested |= {size // part for size in shape for part in known.config.fields.values() if type(part) is int and part > 1 and size % part == 0}
        yield from sorted(suggested - {value}, key=lambda number: abs(number - value))


def _layer(known: Known, name: str) -> int | None:
    match = re.match(re.escape(known.full("model.layers.")) + r"(\d+)\.", name)
    return int(match[1]) if match else None


def _scope(known: Known, stored: Shapes, name: str) -> Shapes:
    """The source's tensors of the layer of `name`, or those outside layers, without scales and copies."""
    layer = _layer(known, name)
    left_out = (SCALE, "inv_freq") if layer is None else (SCALE, "inv_freq", ".embed_tokens.weight", ".shared_head.head.weight")
    return {other: shape for other, shape in stored.items() if other.startswith(known.prefix) and _layer(known, other) == layer and not other.endswith(left_out)}


def _wanted(known: Known, stored: Shapes, name: str) -> Shapes | None:
    """What config.json asks for in the layer of `name`; None for a config that makes no sense. stored shows which layers are MTP's."""
    layer = _layer(known, name)
    try:
        if layer is None:
            return {block.name: block.shape for piece in whole_tensors(known) for block in piece.blocks}
        prefix, beyond = known.full(f"model.layers.{layer}."), layer - known.config.layers
        if beyond < 0:
            entries = known.family.layer(known.config, layer)
        else:
            entries = mtp_layer(known, beyond) if known.family.mtp and f"{prefix}eh_proj.weight" in stored else []
        return {prefix + block.name: block.shape for entry in entries for block in entry.blocks}
    except (UserError, ArithmeticError, LookupError):
        return None
