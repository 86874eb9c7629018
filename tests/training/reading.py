"""What the rank processes of the reader's test do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from miles.training.distributed import Ranks
from miles.training.reader import Reader


def group_reads(ranks: Ranks, paths: list[str], rows: list[Any]) -> dict[str, Any]:
    """Read this group's micro-batches in groups of two ranks, then from a damaged file; which files this process has open."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, mine = groups[ranks.rank // 2], rows[ranks.rank // 2]
    reader = Reader([Path(path) for path in paths], group)
    read = [{name: [array.dtype.str, array.tobytes().hex()] for name, array in arrays.items()} for arrays in reader.micro_batches(mine)]
    first = reader.first_tokens(mine)["loss_mask"].tolist()
    opened = [Path(os.readlink(link)).name for link in Path("/proc/self/fd").iterdir() if os.path.islink(link) and os.readlink(link).endswith(".h5")]
    result = {"opened": sorted(opened), "read": read, "first": first}
    reader.close()
    ranks.barrier()
    Path(paths[1]).write_bytes(b"no longer a shard")
    try:
        list(Reader([Path(path) for path in paths], group).micro_batches([[(1, 0, 1)]]))
    except Exception as error:
        result |= {"failed": type(error).__name__, "why": str(error)}
    return result
