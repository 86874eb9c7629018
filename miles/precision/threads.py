"""Thread count of this process, and parallel calls of compiled kernels on torch's own OpenMP threads.

A second pool of threads beside torch's (numba's own layers make one) would fight with it for the cores: both spin while they wait.
So kernels run through GOMP_parallel of the OpenMP library that torch itself has loaded, with the very threads torch uses. GNU's, LLVM's
and Intel's libraries all export that entry. Without it (a torch built without OpenMP) kernels run on the calling thread: same bits.
"""

from __future__ import annotations

import array
import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def _library() -> ctypes.CDLL | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.CDLL(str(library)) if library.exists() else None


def address_of(name: str) -> int:
    """Address of a C function that torch's CPU library exports or loads; 0 where there is none."""
    handle = _library()
    if handle is None or not hasattr(handle, name):
        return 0
    return ctypes.cast(getattr(handle, name), ctypes.c_void_p).value or 0


def _find_gomp_parallel() -> Callable[..., None] | None:
    handle = _library()
    if handle is None or not hasattr(handle, "GOMP_parallel"):
        return None
    entry = handle.GOMP_parallel
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


_gomp_parallel = _find_gomp_parallel()
_serial_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def set_threads(n: int) -> None:
    """Pin torch's operations and the compiled kernels to n threads (n >= 1). Bits are promised for one pinned count; record it."""
    if n < 1:
        raise ValueError(f"threads must be at least 1, not {n}; set it to the number of cores of this process")
    torch.set_num_threads(n)


def launch(kernel: int, tasks: int, args: tuple[int, ...], work: int) -> None:
    """Run a compiled kernel over tasks 0..tasks-1.

    kernel: address of a C function void(int64 *block); block[0] is the next task to take (atomic), block[1] the number of tasks,
    block[2:] the arguments (addresses and sizes). work: rough number of elementary operations; small work stays on this thread.
    Whoever takes a task computes the same bits, so the number of threads changes the time only.
    """
    block = array.array("q", (0, tasks, *args))
    address = block.buffer_info()[0]
    threads = min(torch.get_num_threads(), tasks) if work > 16384 else 1
    if threads > 1 and _gomp_parallel is not None:
        _gomp_parallel(kernel, address, threads, 0)
    else:
        _serial_type(kernel)(address)
