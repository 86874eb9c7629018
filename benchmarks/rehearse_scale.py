"""From what was measured to 4,096 sequences of 32k tokens and 1,024 ranks: each line with its formula."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.rehearse_case import Found
from benchmarks.rehearse_memory import RECORD_BYTES, SLACK_BYTES, TOKEN_BYTES
from miles.data.plan_batch import assign
from miles.data.store.manifest import NAME, Manifest, Policy, ShardEntry, read_manifest, seal_manifest
from miles.rollout.engines import REPLY_BYTES
from miles.rollout.held import BUDGET_BYTES

SEQUENCES, SAMPLES, TOKENS, RANKS = 4096, 8, 32768, 1024
WORKERS, RANKS_A_NODE = 64, 8
ROUTE_BYTES = 60 * 8
SMALL_BYTES = 50  # of a sequence: what all ranks know of all sequences


@dataclass(frozen=True)
class Line:
    """A quantity at full size, how it follows, its value."""

    what: str
    formula: str
    value: str


def extrapolate(found: dict[str, Found], rates: dict[str, float], prompt: int) -> list[Line]:
    """Lines of the table; `rates`: tokens/s of a worker by case."""
    total = SEQUENCES * TOKENS
    lines = [Line("tokens of a step", f"{SEQUENCES:,} sequences × {TOKENS:,} tokens", f"{total / 1e6:,.0f} M")]
    for name, rate in rates.items():
        if name in ("plain", "routes"):
            lines.append(Line(f"seconds of worker time, {name}", f"tokens / ({rate:,.0f} tokens/s × {WORKERS} workers)", f"{total / rate / WORKERS:,.1f}"))
    for name in ("plain", "routes"):
        if name in found:
            case, tokens = found[name].case, found[name].steps[-1]["all_tokens"]
            formula = f"{TOKEN_BYTES} + {RECORD_BYTES} of the record" + (f" + {case.layers * case.top_k} of routes" if case.routes else "") + " + texts; measured"
            lines.append(Line(f"bytes of a token on disk, {name}", formula, f"{found[name].bytes[-1] / tokens:,.1f}"))
    group = SAMPLES * (TOKENS + prompt) * (TOKEN_BYTES + ROUTE_BYTES)
    ranks_rows = assigned()
    share = total // RANKS
    return [
        *lines,
        Line("bytes of shards", f"tokens × {TOKEN_BYTES} B", f"{total * TOKEN_BYTES / 1e9:,.2f} GB"),
        Line("bytes of routes", f"tokens × {ROUTE_BYTES} B", f"{total * ROUTE_BYTES / 1e9:,.1f} GB"),
        Line("bytes of train records", f"tokens × {RECORD_BYTES} B", f"{total * RECORD_BYTES / 1e9:,.2f} GB"),
        Line("new files", f"1 manifest + {WORKERS} workers × 2 + {RANKS // RANKS_A_NODE} trainer nodes × 1", f"{1 + 2 * WORKERS + RANKS // RANKS_A_NODE}"),
        Line("memory of a worker", f"at most 1 GB + 2 × a group of {SAMPLES} × {TOKENS + prompt:,} tokens × {TOKEN_BYTES + ROUTE_BYTES} B", f"{(1e9 + 2 * group) / 1e9:,.2f} GB"),
        Line("a worker's rise over idle", f"at most ({REPLY_BYTES >> 20} + {BUDGET_BYTES >> 20} + {SLACK_BYTES >> 20}) MiB + 2 × that group", f"{(REPLY_BYTES + BUDGET_BYTES + SLACK_BYTES + 2 * group) / 1e9:,.2f} GB"),
        Line("memory of a rank's reading", f"(2 ahead + 1) micro-batches of {TOKENS + prompt:,} tokens × {TOKEN_BYTES} B", f"{3 * (TOKENS + prompt) * TOKEN_BYTES / 1e6:,.1f} MB"),
        Line("memory of a rank's record", f"its share: {share:,} tokens × {RECORD_BYTES} B, a micro-batch at a time to the node's writer", f"{share * RECORD_BYTES / 1e6:,.1f} MB"),
        Line("bytes that a rank reads", f"its share: {share:,} tokens × {TOKEN_BYTES} B", f"{share * TOKEN_BYTES / 1e6:,.1f} MB"),
        Line("bytes of small arrays that rank 0 reads and broadcasts", f"{SEQUENCES:,} sequences × {SMALL_BYTES} B", f"{SEQUENCES * SMALL_BYTES / 1e3:,.0f} kB"),
        *ranks_rows,
    ]  # fmt: skip


def assigned() -> list[Line]:
    """Composition at full size, measured here and now."""
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(9, 0.8, SEQUENCES).astype(int) + 64, TOKENS)
    draws, samples = np.repeat(np.arange(SEQUENCES // SAMPLES), SAMPLES), np.tile(np.arange(SAMPLES), SEQUENCES // SAMPLES)
    shards = draws % WORKERS
    rows = np.zeros(SEQUENCES, int)
    for worker in range(WORKERS):
        rows[shards == worker] = np.arange(np.count_nonzero(shards == worker))
    began = time.perf_counter()
    assignment = assign(lengths, draws, samples, shards, rows, dp_size=RANKS, max_tokens=TOKENS)
    seconds = time.perf_counter() - began
    entries = [ShardEntry(name=f"rollout.{worker}.h5", bytes=1 << 30, xxh3="0" * 16, sequences=SEQUENCES // WORKERS, tokens=1 << 24) for worker in range(WORKERS)]
    manifest = Manifest(
        run_id="rehearsal", epoch=1, step=1, kind="rollout", policy=Policy(weight_version=0, weight_checksum="0" * 16), shards=entries, routes=entries,
        draws=draws[::SAMPLES].tolist(), assignment=assignment,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        sealed = seal_manifest(Path(name), manifest)
        began = time.perf_counter()
        read_manifest(Path(name) / NAME)
        read = time.perf_counter() - began
    opened = [len({shard for micro_batch in rank for shard, _, _ in micro_batch}) for rank in assignment[0]]
    return [
        Line("seconds of the service to assign", f"assign() of {SEQUENCES:,} sequences to {RANKS:,} ranks, measured", f"{seconds:.3f}"),
        Line("bytes of the manifest", "sealed, measured", f"{sealed.bytes / 1e3:,.0f} kB"),
        Line("seconds of a rank to read the manifest", "measured", f"{read:.4f}"),
        Line("shards that a rank opens", "of its micro-batches, measured: mean and most", f"{np.mean(opened):.1f}, {max(opened)}"),
    ]
