"""A program: kernel calls written down once and run many times with other sizes, in one parallel region and one call from Python."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from miles.precision import cpu_program
from miles.precision.threads import address_of, launch

WIDTH = 24  # int64 of a call's block: two counters and up to 22 arguments
YIELD = address_of("sched_yield")


@dataclass(frozen=True)
class Size:
    """An argument that changes from run to run: `times` the quantity `of` that run() is given."""

    of: str
    times: int = 1


@dataclass
class Program:
    """Kernel calls, at most `calls`. Memory whose addresses are written down must outlive the program.

    add() returns the address of a call's block (its arguments begin 16 bytes on).
    """

    calls: int
    _count: int = 0
    _group: int = 0
    _sizes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    _fixed: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._blocks = np.zeros((self.calls, WIDTH), dtype=np.int64)
        self._flat = self._blocks.reshape(-1)
        self._table = np.zeros((self.calls, cpu_program.FIELDS), dtype=np.int64)

    def next_block(self, ahead: int = 0) -> int:
        """Address of the block of the call that comes `ahead` calls after the next one."""
        return int(self._blocks.ctypes.data) + (self._count + ahead) * WIDTH * 8

    def add(self, kernel: int, tasks: int | Size, args: tuple[int | Size, ...], joined: bool = False) -> int:
        """Append a call. joined: the next call does not read what this one writes, so nobody waits between them."""
        assert self._count < self.calls, "the program was made large enough"
        assert len(args) <= WIDTH - 2, "so is a block"
        block, line = self.next_block(), self._blocks[self._count]
        for at, value in enumerate((tasks, *args), start=1):
            if isinstance(value, Size):
                places, times = self._sizes.setdefault(value.of, ([], []))
                places.append(self._count * WIDTH + at)
                times.append(value.times)
            else:
                line[at] = value
        self._table[self._count] = (kernel, block, -1 if joined else self._group, 0, 0)
        self._count += 1
        if not joined:
            self._group = self._count
        self._fixed.clear()
        return block

    def run(self, work: int, **quantities: int) -> None:
        """Run all calls with these quantities. work: as in threads.launch."""
        if not self._fixed:
            self._fixed = {name: (np.array(places), np.array(times)) for name, (places, times) in self._sizes.items()}
        self._blocks[:, 0] = 0
        self._table[:, 3:] = 0
        for name, (places, times) in self._fixed.items():
            self._flat[places] = times * quantities[name]
        # launch() calls with as many threads as there are tasks: every thread of the team walks the list
        launch(cpu_program.run_program, 1 << 30, (int(self._table.ctypes.data), self._count, YIELD), work)
