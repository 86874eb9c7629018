"""The vocabulary of a family's map: which rows of which Hugging Face tensors make up a tensor of Megatron.

Both directions follow from one list: a Megatron tensor is filled from its blocks, a Hugging Face tensor from the blocks that name it.
No arithmetic happens on the way (norms of Gemma stay zero-centred, rotary halves stay in order), so both ways keep every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.config.exits import UserError

FP32 = "float32"


@dataclass(frozen=True)
class Block:
    """`rows` rows of a Hugging Face tensor, from its row `start`, which are the rows from `at` on of a Megatron tensor.

    expert: the index on the first axis of a tensor that holds all experts. transposed: the Hugging Face matrix is [columns, rows].
    """

    name: str
    shape: tuple[int, ...]  # of the whole Hugging Face tensor
    start: int
    rows: int
    at: int
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Entry:
    """A tensor of one layer, or of one expert of it: its Megatron name without the layer's, its shape and its blocks.

    experts: how many there are where this is one of them (`expert` says which). dtype: kept in this one whatever the model's is.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    expert: int | None = None
    experts: int = 0
    dtype: str | None = None


def same(name: str, hf: str, *shape: int, dtype: str | None = None) -> Entry:
    """One tensor under another name."""
    return Entry(name, shape, (Block(hf, shape, 0, shape[0], 0),), dtype=dtype)


def stacked(name: str, parts: list[str], rows: int, *columns: int) -> Entry:
    """Tensors of `rows` rows each, one below the other (gate, then up)."""
    blocks = tuple(Block(hf, (rows, *columns), 0, rows, i * rows) for i, hf in enumerate(parts))
    return Entry(name, (rows * len(parts), *columns), blocks)


class Config:
    """A config.json: fields by name, and a refusal that names the field."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or the default where it is missing or null."""
        found = self.fields.get(name)
        return default if found is None else found

    def number(self, name: str, default: int | None = None, least: int = 0) -> int:
        """A whole number of at least `least`. UserError where it is missing or none."""
        found = self.get(name, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise UserError(f"{self.where}: {name} is {found!r}, a whole number of at least {least} is needed; restore config.json from the checkpoint's origin")
        return found

    @property
    def layers(self) -> int:
        return self.number("num_hidden_layers")

    @property
    def hidden(self) -> int:
        return self.number("hidden_size")

    @property
    def heads(self) -> int:
        return self.number("num_attention_heads")

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.number("num_key_value_heads", self.heads)

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.number("head_dim", self.hidden // max(1, self.heads))

    @property
    def experts(self) -> int:
        """Routed experts of a layer, under whichever name this generation of transformers wrote them; 0 for none."""
        names = ("n_routed_experts", "num_experts", "num_local_experts")
        return next((self.number(name) for name in names if self.get(name) is not None), 0)

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters, of whichever generation of transformers wrote them; {} for none."""
        found = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise UserError(f"{self.where}: rope_parameters is {found!r}, an object is needed; restore config.json from the checkpoint's origin")
        return found
