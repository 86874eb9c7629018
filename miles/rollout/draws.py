"""Numbers of draws and the seeds that follow from them: pure functions, so that resuming needs one integer.

A draw number is given to one prompt and never again in a run:

    0 …                            rollouts, in the order of the data
    2^40 + (step - 1) × batch …    warm start
    2^48 + step × rows …           evaluation after `step`
"""

from __future__ import annotations

import struct

import xxhash

SFT_BASE = 1 << 40
EVAL_BASE = 1 << 48
SOURCES = {"sft": "warm_start", "rollout": "data", "eval": "eval"}


def sampling_seed(run_seed: int, draw: int, sample: int, turn: int) -> int:
    """Seed of one turn of one sample: xxh3_64 of (run seed i64, draw u64, sample u32, turn u32), little-endian, without its last bit.

    63 bits, since engines keep seeds in signed integers. It depends on neither the step nor the batch nor the engine.
    """
    return xxhash.xxh3_64_intdigest(struct.pack("<QQII", run_seed % 2**64, draw, sample, turn)) >> 1


def first_draw(kind: str, step: int, batch_size: int, rows: int) -> int:
    """The draw that a batch starts with: of a warm start and an evaluation always, of rollouts at a fresh start.

    batch_size: draws of one batch; rows: of the source.
    """
    if kind == "sft":
        return SFT_BASE + (step - 1) * batch_size
    if kind == "eval":
        return EVAL_BASE + step * rows
    return 0


def number_in_source(kind: str, draw: int, rows: int) -> int:
    """Which draw of its source (from 0) a run-wide draw number is."""
    if kind == "sft":
        return draw - SFT_BASE
    if kind == "eval":
        return (draw - EVAL_BASE) % rows
    return draw
