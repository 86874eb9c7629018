"""A lower bound of the memory of weights and optimizer, before anything is started. Activations come on top."""

from __future__ import annotations

import os
from dataclasses import dataclass

from miles.config.schema import RunConfig, Shape
from miles.plan.model import ADAM_BYTES, GIB, parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of weights, gradients and optimizer of one trainer rank, and of one engine process's weights; with the sum in words."""

    trainer: int
    engine: int
    words: str


def estimate(config: RunConfig, shape: Shape) -> Memory:
    """AdamW keeps fp32 weight, gradient and two moments (16 bytes a parameter), sharded over all ranks; a frozen reference
    adds its weights; an engine holds its own copy, split over its tensor parallelism."""
    total = sum(parameters(shape))
    world = config.train.num_nodes * config.train.num_gpus_per_node
    width = 4 if config.model.dtype == "float32" else 2
    trains = config.debug.trains
    held = ADAM_BYTES if trains else 4  # fp32 weights alone
    reference = width if config.algorithm.use_kl_loss and trains else 0
    trainer = total * (held + reference) // world
    engine = 0 if config.debug.recorded else total * width // config.rollout.num_gpus_per_engine
    extra = f" + {reference} for the reference" if reference else ""
    words = f"{total / 1e9:.2f} B parameters × {held}{extra} bytes / {world} ranks = {trainer / GIB:.1f} GiB a trainer rank" + (
        f", × {width} bytes / {config.rollout.num_gpus_per_engine} = {engine / GIB:.1f} GiB an engine rank"
        if engine
        else ""
    )
    return Memory(trainer, engine, words)


def host_memory() -> int:
    """Physical memory of this machine [bytes]."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
