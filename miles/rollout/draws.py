"""Numbers of draws and the seeds that follow from them: pure functions, so that resuming needs one integer.

A draw number is given to one prompt and never again in a run:

    0 …                          warm start, step k takes [k × batch_size, (k + 1) × batch_size)
    warm_start.steps × batch …   rollouts, in the order of the data
    2^48 + step × rows …         evaluation after `step`
"""

from __future__ import annotations

import struct

import xxhash

from miles.config.schema import RunConfig

EVAL_BASE = 1 << 48


def sampling_seed(run_seed: int, draw: int, sample: int, turn: int) -> int:
    """Seed of one turn of one sample: xxh3_64 of (run seed i64, draw u64, sample u32, turn u32), little-endian, without its last bit.

    63 bits, since engines keep seeds in signed integers. It depends on neither the step nor the batch nor the engine.
    """
    return xxhash.xxh3_64_intdigest(struct.pack("<QQII", run_seed % 2**64, draw, sample, turn)) >> 1


def first_draw(config: RunConfig, kind: str, step: int, eval_rows: int = 0) -> int:
    """The draw that a batch of this kind starts with: at a fresh start for rollouts, always for the other kinds."""
    if kind == "sft":
        return step * config.warm_start.batch_size
    if kind == "eval":
        return EVAL_BASE + step * eval_rows
    return config.warm_start.steps * config.warm_start.batch_size


def number_in_source(config: RunConfig, kind: str, draw: int, eval_rows: int = 0) -> int:
    """Which draw of its source (from 0) a run-wide draw number is."""
    if kind == "sft":
        return draw
    if kind == "eval":
        return (draw - EVAL_BASE) % eval_rows
    return draw - config.warm_start.steps * config.warm_start.batch_size


SOURCES = {"sft": "warm_start", "rollout": "data", "eval": "eval"}
