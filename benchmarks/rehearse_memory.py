"""What each process of a rehearsal may hold: a wide bound, and a narrow one that a process with a whole batch in it would miss.

Wide: at most 1 GB + 2 × the largest slice in all. Narrow: at most so much more than the process had when it stood idle, before the
first step: the buffers that its code bounds by design, what must stay until the step's end, and 2 × the largest slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.rehearse_case import Found
from miles.rollout.engines import REPLY_BYTES
from miles.rollout.held import BUDGET_BYTES

GIGABYTE = 10**9
TOKEN_BYTES = 10  # id i32, log-prob f32, loss mask u8, flags u8
RECORD_BYTES = 13  # log-prob, entropy, advantage f32, used u8
# In every process: HDF5's blocks of 4 MiB, buffers of 64 connections, what is imported at first use, and what the heap keeps when it is free.
SLACK_BYTES = 48 << 20
# A rehearsal whose batch is not this many times the narrow bound could not tell a process that holds all of it.
BATCH_TIMES = 4


@dataclass(frozen=True)
class Allowed:
    """What a process may hold [bytes]: at a time (a slice), until the step ends (kept), and in buffers (fixed). words: of the slice and of what is kept."""

    words: str
    slice: int
    fixed: int = SLACK_BYTES
    kept: int = 0

    @property
    def wide(self) -> int:
        """Of the whole process."""
        return GIGABYTE + 2 * self.slice

    @property
    def narrow(self) -> int:
        """Of its rise over idle."""
        return self.fixed + self.kept + 2 * self.slice


def token_bytes(found: Found) -> int:
    """Of a token in a worker's shard and routes."""
    return TOKEN_BYTES + (found.case.layers * found.case.top_k if found.case.routes else 0)


def batch_bytes(found: Found) -> int:
    """The least batch's arrays: tokens, prompts included, with their routes."""
    return min(line["all_tokens"] for line in found.steps) * token_bytes(found)


def allowed(found: Found, process: str) -> Allowed:
    """What a process of this name (a role, perhaps with a number) may hold."""
    token = token_bytes(found)
    group = max(line["largest_group"] for line in found.steps)
    micro_batch = max(line["largest_micro_batch"] for line in found.steps)
    share = max(line["all_tokens"] for line in found.steps)  # one rank: it has all tokens
    return {
        "service": Allowed("nothing", 0),
        "engine": Allowed("nothing (its replies are the benchmark's)", 0),
        "worker": Allowed(f"a group: {group:,} tokens × {token} B", group * token, REPLY_BYTES + BUDGET_BYTES + SLACK_BYTES),
        "trainer": Allowed(
            f"a micro-batch: {micro_batch:,} tokens × {TOKEN_BYTES} B; its record {share:,} × {RECORD_BYTES} B",
            micro_batch * TOKEN_BYTES, kept=share * RECORD_BYTES,
        ),
        "reward": Allowed(f"a group: {group:,} tokens × {TOKEN_BYTES} B", group * TOKEN_BYTES),
    }[process.split()[0]]  # fmt: skip


def judge_memory(found: Found) -> list[dict[str, Any]]:
    """Goals of every process, wide and narrow, and that the batch is large enough for the narrow one to say something."""
    said: list[dict[str, Any]] = []
    for role, high in found.memory.items():
        may, rise = allowed(found, role), found.rise[role]
        said.append({"what": f"{found.case.name}: peak memory of {role} [B]", "found": high, "goal": may.wide, "passed": high <= may.wide})
        said.append({"what": f"{found.case.name}: rise of {role} over idle [B]", "found": rise, "goal": may.narrow, "passed": rise <= may.narrow})
    if found.case.large:
        batch, least = batch_bytes(found), BATCH_TIMES * allowed(found, "worker").narrow
        said.append({"what": f"{found.case.name}: a batch, {BATCH_TIMES} × the worker's rise or more [B]", "found": batch, "goal": least, "passed": batch >= least})
    return said
