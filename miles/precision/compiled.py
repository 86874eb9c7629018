"""How the CPU kernels are compiled: C functions void(int64 *block), cached on disk, run by threads.launch.

block[0] is the next task, block[1] the number of tasks, the rest addresses and sizes. A task is a row or a fixed run of rows, so a row's
bits depend on that row alone: no fast-math, reductions in 16 lanes and one tree (llvm.py). The cache lies in NUMBA_CACHE_DIR, else
beside the module, else in the user's cache folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from miles.precision.llvm import as_pointer

ONE = np.float32(1.0)
ZERO = np.float32(0.0)
SIGNATURE = types.void(types.CPointer(types.int64))


def _compile(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"nopython": True, "error_model": "numpy"}
    try:
        return cfunc(SIGNATURE, cache=True, **options)(function)
    except RuntimeError:  # no place for the cache: neither beside the module nor in the user's folder
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="miles-numba-")
        return cfunc(SIGNATURE, **options)(function)


def kernel(function: Callable[..., Any]) -> int:
    """Compile a kernel and return its address; the compiled object is kept alive."""
    compiled = _compile(function)
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


@njit(inline="always")
def i32(address, n):
    return carray(as_pointer(address), (n,), np.int32)
