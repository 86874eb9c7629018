"""A model's Megatron checkpoint, piece by piece: every tensor of every layer and expert with its place in the file's tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from miles.config.exits import UserError
from miles.models.maps.entry import Block, Config, Entry, same
from miles.models.maps.find import Known

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
NORMS = ("enorm", "hnorm", "k_norm")


@dataclass(frozen=True)
class Piece:
    """What one layer (and expert) gives to the tensor `key`, at index `lead` of its leading axes of sizes `axes`.

    other: (key, lead, axes) under Megatron's other way of naming layers. dtype: its own, whatever the model's is.
    """

    key: str
    lead: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    dtype: str | None = None
    other: tuple[str, tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        return self.axes + self.shape

    @property
    def objects(self) -> list[str]:
        """Names of the _extra_state items that Transformer Engine's modules look for."""
        module = self.key.rpartition(".")[0]
        last = module.rpartition(".")[2]
        if not (last.startswith("linear_") or last.endswith("layernorm") or last == "eh_proj" or last in NORMS):
            return []
        lead, axes = self.lead or (0,), self.axes or (1,)
        return [f"{module}._extra_state/shard_{'.'.join(map(str, lead))}_{'.'.join(map(str, axes))}"]


def padded_vocabulary(vocabulary: int, divisible_by: int, tensor_parallel: int) -> int:
    """Rows of the embedding: the vocabulary, rounded up to a multiple of divisible_by × tensor_parallel."""
    if divisible_by < 1 or tensor_parallel < 1:
        raise UserError(f"the vocabulary can't be padded to a multiple of {divisible_by} × {tensor_parallel}; give numbers of at least 1")
    return math.ceil(vocabulary / (divisible_by * tensor_parallel)) * divisible_by * tensor_parallel


def pieces(known: Known, *, mtp_layers: int = 0, rows: int | None = None) -> Iterator[Piece]:
    """All pieces, embedding first. rows: of the embedding and the output layer with their padding (None: the vocabulary)."""
    config, family = known.config, known.family
    uniform = family.uniform(config)
    embedding, *others = whole_tensors(known, rows)
    yield embedding
    for i in range(config.layers):
        for entry in family.layer(config, i):
            yield _of_layer(known, entry, i, uniform)
    output = others.pop() if not known.tied else None
    yield from others
    for i in range(mtp_layers):
        for entry in mtp_layer(known, i):
            lead, axes = ((entry.expert or 0,), (entry.experts,)) if entry.experts else ((), ())
            blocks = _named(entry.blocks, known.full(f"model.layers.{config.layers + i}."))
            yield Piece(f"mtp.layers.{i}.{entry.name}", lead, axes, entry.shape, blocks, entry.dtype)
    if output is not None:
        yield output


def whole_tensors(known: Known, rows: int | None = None) -> list[Piece]:
    """Tensors that belong to no layer: embedding, norm and the like, and last the output layer where there is one. rows: as for pieces."""
    config = known.config
    rows = rows or config.number("vocab_size")
    found = [_padded(known, EMBEDDING, "model.embed_tokens.weight", rows)]
    for entry in known.family.top(config):
        found.append(Piece(entry.name, (), (), entry.shape, tuple(replace(block, name=known.full(block.name)) for block in entry.blocks), entry.dtype))
    return found if known.tied else [*found, _padded(known, OUTPUT, "lm_head.weight", rows)]


def mtp_layer(known: Known, i: int) -> list[Entry]:
    """An MTP layer: norms of the embedding and of the hidden state, their projection to one, a layer like the others, a norm."""
    config = known.config
    hidden = config.hidden
    inner = [replace(entry, name=f"transformer_layer.{entry.name}") for entry in known.family.layer(config, config.layers + i)]
    return [
        same("enorm.weight", "enorm.weight", hidden),
        same("hnorm.weight", "hnorm.weight", hidden),
        same("eh_proj.weight", "eh_proj.weight", hidden, 2 * hidden),
        *inner,
        same("final_layernorm.weight", "shared_head.norm.weight", hidden),
    ]


def mtp_copies(known: Known, mtp_layers: int) -> dict[str, str]:
    """Hugging Face names of tensors that MTP layers repeat, each with the tensor that it is a copy of. Megatron keeps them once."""
    of = {}
    for i in range(mtp_layers):
        prefix = known.full(f"model.layers.{known.config.layers + i}.")
        of[f"{prefix}embed_tokens.weight"] = known.full("model.embed_tokens.weight")
        of[f"{prefix}shared_head.head.weight"] = known.full("model.embed_tokens.weight" if known.tied else "lm_head.weight")
    return of


def _of_layer(known: Known, entry: Entry, i: int, uniform: bool) -> Piece:
    inner = ((entry.expert or 0,), (entry.experts,)) if entry.experts else ((), ())
    stacked = (f"decoder.layers.{entry.name}", (i, *inner[0]), (known.config.layers, *inner[1]))
    apart = (f"decoder.layers.{i}.{entry.name}", *inner)
    (key, lead, axes), other = (stacked, apart) if uniform else (apart, stacked)
    blocks = _named(entry.blocks, known.full(f"model.layers.{i}."))
    return Piece(key, lead, axes, entry.shape, blocks, entry.dtype, other)


def _padded(known: Known, key: str, hf: str, rows: int) -> Piece:
    config: Config = known.config
    vocabulary, hidden = config.number("vocab_size"), config.hidden
    return Piece(key, (), (), (rows, hidden), (Block(known.full(hf), (vocabulary, hidden), 0, vocabulary, 0),))


def _named(blocks: tuple[Block, ...], prefix: str) -> tuple[Block, ...]:
    return tuple(replace(block, name=prefix + block.name) for block in blocks)
