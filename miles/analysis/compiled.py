"""How the analysis' loops are compiled: by numba, strict IEEE, cached on disk, without Python's lock, so that files are read meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit

from miles.precision.kernel_cache import cache_folder

SOURCES = (
    "bin_lanes.py", "bootstrap.py", "boundaries.py", "compiled.py", "core_lanes.py", "core_pass.py", "corrections.py", "counters.py",
    "distinct.py", "exact.py", "expert_kernel.py", "fused.py", "hashing.py", "lane_sum.py", "memory.py", "row_lanes.py",
    "segments.py", "sequence_kernels.py", "sequences.py", "single_tokens.py", "slice_lanes.py", "slices.py", "terms.py", "token_lanes.py",
    "transposition.py", "vectors.py", "weights_pass.py",
)  # fmt: skip
_FOLDER = cache_folder(*(Path(__file__).parent / name for name in SOURCES))


def kernel(function: Callable[..., Any]) -> Any:
    """A function compiled at its first call, or taken from the cache."""
    settings: Any = config
    before, settings.CACHE_DIR = settings.CACHE_DIR, _FOLDER
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        settings.CACHE_DIR = before
