"""How the CPU kernels are compiled: C functions void(int64 *block), cached on disk, run by threads.launch.

block[0] is the next task, block[1] the number of tasks, the rest addresses and sizes. A task is a row or a fixed run of rows, so a row's
bits depend on that row alone: no fast-math, reductions in 16 lanes and one tree (llvm.py). The cache lies in the
folder of kernel_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, config, njit, types

from miles.precision.kernel_cache import cache_folder
from miles.precision.llvm import as_pointer

ONE = np.float32(1.0)
ZERO = np.float32(0.0)
SIGNATURE = types.void(types.CPointer(types.int64))


CACHE_FOLDER = cache_folder(*(Path(__file__).parent / name for name in ("llvm.py", "compiled.py")))


def kernel(function: Callable[..., Any]) -> int:
    """Compile a kernel and return its address; the compiled object is kept alive."""
    settings: Any = config
    options: dict[str, Any] = {"nopython": True, "error_model": "numpy"}
    before, settings.CACHE_DIR = settings.CACHE_DIR, CACHE_FOLDER
    try:
        compiled: Any = cfunc(SIGNATURE, cache=True, **options)(function)
    finally:
        settings.CACHE_DIR = before
    _alive.append(compiled)
    return int(compiled.address)


_alive: list[Any] = []


@njit(inline="always")
def f32(address, n):
    """fp32 view of n elements at an address."""
    return carray(as_pointer(address), (n,), np.float32)


@njit(inline="always")
def i64(address, n):
    return carray(as_pointer(address), (n,), np.int64)
