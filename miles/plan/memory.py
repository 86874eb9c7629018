"""Memory of a trainer rank and of an engine rank, with the arithmetic: weights, gradients, optimizer, key-value cache.

A lower bound: activations, buffers of NCCL and CUDA, and an engine's graphs come on top.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from miles.config.placement import NodeGroup, node_groups
from miles.config.schema import RunConfig, Shape
from miles.plan.kv_cache import token_bytes, token_words, wanted_tokens
from miles.plan.model import ADAM_BYTES, GIB, parameters


@dataclass(frozen=True)
class Line:
    """A summand: what it is, its bytes on one accelerator, and how they come about."""

    what: str
    bytes: int
    words: str

    def __str__(self) -> str:
        return f"{self.what}: {self.words} = {self.bytes / GIB:.1f} GiB"


@dataclass(frozen=True)
class Memory:
    """Of one trainer rank and of one engine rank. loading: what a trainer rank holds for a moment before its weights are sharded."""

    trainer_lines: list[Line]
    engine_lines: list[Line]
    loading: Line | None
    notes: list[str] = field(default_factory=list)

    @property
    def trainer(self) -> int:
        return sum(line.bytes for line in self.trainer_lines)

    @property
    def engine(self) -> int:
        return sum(line.bytes for line in self.engine_lines)

    @property
    def words(self) -> str:
        """One line of both."""
        trainer = " + ".join(line.words for line in self.trainer_lines)
        said = f"{trainer} = {self.trainer / GIB:.1f} GiB a trainer rank"
        if self.engine_lines:
            said += f"; {' + '.join(line.words for line in self.engine_lines)} = {self.engine / GIB:.1f} GiB an engine rank"
        return said


def estimate(config: RunConfig, shape: Shape) -> Memory:
    """AdamW keeps fp32 weight, gradient and two moments (16 bytes a parameter), sharded over all ranks; a frozen reference adds its
    weights; where ranks or dtypes share, one layer is gathered whole while the next is on its way. An engine holds its own copy of
    the weights, split over its tensor parallelism, and the cache."""
    return Memory(_trainer(config, shape), _engine(config, shape), _loading(config, shape), _notes(config, shape))


def gpu_memory(config: RunConfig, component: str) -> float | None:
    """Memory of one of a component's accelerators [GiB]; None where it isn't known."""
    group = group_of(config, component)
    return (group.ask.gpu_memory if group else None) or config.cluster.gpu_memory


def group_of(config: RunConfig, component: str) -> NodeGroup | None:
    """The group that a component runs on."""
    return next((group for group in node_groups(config) if component in group.components), None)


def shared(config: RunConfig) -> bool:
    """Whether trainer and engine ranks lie on the same accelerators."""
    return config.cluster.placement == "colocate" and not config.debug.recorded


def _width(config: RunConfig) -> int:
    return 4 if config.model.dtype == "float32" else 2


def _trainer(config: RunConfig, shape: Shape) -> list[Line]:
    if config.train.backend == "megatron":
        return _megatron(config, shape)
    total, world = sum(parameters(shape)), config.train.num_nodes * config.train.num_gpus_per_node
    trains, count = config.debug.trains, f"{total / 1e9:.2f} B parameters"
    held = ADAM_BYTES if trains else 4  # fp32 weights alone
    what = "weights, gradients, AdamW" if trains else "weights"
    lines = [Line(what, total * held // world, f"{count} × {held} bytes / {world} ranks")]
    if config.algorithm.use_kl_loss and trains:
        lines.append(Line("reference", total * _width(config) // world, f"{count} × {_width(config)} for the reference / {world} ranks"))
    if config.cluster.device == "cuda" and (world > 1 or _width(config) < 4):
        largest = _largest_layer(shape)
        lines.append(Line("two layers gathered", 2 * largest * _width(config), f"2 × {largest / 1e9:.2f} B × {_width(config)} bytes"))
    return lines


def _megatron(config: RunConfig, shape: Shape) -> list[Line]:
    """Weights and fp32 gradients of a rank's share of the model; master weights and moments shared by the ranks that hold the same."""
    train, parallel = config.train, config.train.parallel
    world, etp = train.num_nodes * train.num_gpus_per_node, parallel.inside_expert
    held = _width(config) + 4
    lines = []
    for what, total, ranks, sizes in [
        ("dense", parameters(shape)[0], parallel.tensor * parallel.pipeline, f"TP {parallel.tensor} × PP {parallel.pipeline}"),
        ("experts", parameters(shape)[1], parallel.expert * etp * parallel.pipeline, f"EP {parallel.expert} × ETP {etp} × PP {parallel.pipeline}"),
    ]:
        if not total:
            continue
        copies = max(1, world // ranks)
        share = f"{total / 1e9:.2f} B / ({sizes})"
        lines.append(Line(f"{what}, weights and gradients", total * held // ranks, f"{share} × {held} bytes"))
        lines.append(Line(f"{what}, AdamW", total * 12 // (ranks * copies), f"{share} × 12 bytes / {copies} copies"))
    return lines


def _largest_layer(shape: Shape) -> int:
    """Parameters of a layer with its experts, or of a dense one."""
    dense, experts = parameters(shape)
    embedding = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    moe_layers = shape.moe_layers
    return (dense - embedding) // shape.layers + (experts // moe_layers if moe_layers else 0)


def _loading(config: RunConfig, shape: Shape) -> Line | None:
    if config.cluster.device != "cuda" or config.train.backend != "fsdp":
        return None
    total = sum(parameters(shape))
    return Line("while it loads", total * 4, f"the whole model in fp32 on every rank: {total / 1e9:.2f} B × 4 bytes")


def _engine(config: RunConfig, shape: Shape) -> list[Line]:
    if config.debug.recorded:
        return []
    rollout, width, total = config.rollout, _width(config), sum(parameters(shape))
    ranks = rollout.num_gpus_per_engine
    lines = [Line("weights", total * width // ranks, f"{total / 1e9:.2f} B × {width} bytes / {ranks}")]
    each = token_bytes(shape, width, ranks)
    pool = static_pool(config)
    given = rollout.sglang.get("max_total_tokens")
    if rollout.engine == "embedded":
        tokens, words = rollout.kv_cache_tokens, f"{rollout.kv_cache_tokens} tokens"
    elif isinstance(given, int):
        tokens, words = given, f"{given} tokens (max_total_tokens)"
    elif pool is not None:
        fraction = rollout.sglang["mem_fraction_static"]
        lines.append(Line("KV cache", max(0, pool - lines[0].bytes), f"what mem_fraction_static {fraction:g} × {gpu_memory(config, 'rollout'):g} GiB leaves"))
        return lines
    else:
        tokens, words = wanted_tokens(config)
    lines.append(Line("KV cache", tokens * each, f"{words} × {each} bytes"))
    return lines


def static_pool(config: RunConfig) -> int | None:
    """Bytes that SGLang keeps for weights and cache by mem_fraction_static; None where it isn't given, or the memory isn't known."""
    fraction, memory = config.rollout.sglang.get("mem_fraction_static"), gpu_memory(config, "rollout")
    if config.rollout.engine != "sglang" or not isinstance(fraction, int | float) or memory is None:
        return None
    return int(fraction * memory * GIB)


def _notes(config: RunConfig, shape: Shape) -> list[str]:
    """What a fraction of the memory means in tokens."""
    if config.debug.recorded:
        return []
    rollout, width = config.rollout, _width(config)
    each = token_bytes(shape, width, rollout.num_gpus_per_engine)
    said = [f"a token's cache is {token_words(shape, width, rollout.num_gpus_per_engine)} = {each} bytes"]
    wanted, words = wanted_tokens(config)
    said.append(f"the cache of an engine holds {_engine(config, shape)[1].bytes // each} tokens; {words} are {wanted}")
    if any(name.startswith("speculative_") for name in rollout.sglang):
        said.append("the draft of speculative decoding comes on top")
    return said


def host_memory() -> int:
    """Physical memory of this machine [bytes]."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
