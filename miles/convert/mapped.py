"""Files mapped into memory for reading, and tensors on them."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor

# Said once a process by torch; none of these tensors is written to.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def map_file(path: Path) -> mmap.mmap:
    """The whole file."""
    with path.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def tensor_on(mapped: mmap.mmap, dtype: torch.dtype, offset: int, count: int) -> Tensor:
    """`count` numbers from byte `offset`, without a copy; the storage holds these alone. Must not be written to."""
    return torch.frombuffer(mapped, dtype=dtype, offset=offset, count=count)
