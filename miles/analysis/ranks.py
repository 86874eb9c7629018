"""Many processes: which launch this is, and states merged along a tree. mpi4py is imported only where a launcher started several."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from miles.analysis.state import State
from miles.config.exits import UserError

# What a launcher says of the number of its processes; srun's step, not its job: a batch script is one process of many tasks.
SIZES = ("SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "PALS_SIZE", "FLUX_JOB_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("PMI_RANK", "PMIX_RANK", "SLURM_STEP_ID")


class Alone:
    """One process."""

    rank, size = 0, 1

    def merge(self, state: State) -> State:
        return state

    def agree(self, wrong: str | None) -> str | None:
        """The message of the first process that failed; None where none did."""
        return wrong


    def abort(self) -> None:
        """Nobody else waits."""


class Many:
    """Processes of MPI."""

    def __init__(self, communicator: Any) -> None:
        self._comm = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def merge(self, state: State) -> State:
        """All states in one, on rank 0; on others what they had."""
        step = 1
        while step < self.size:
            if self.rank % (2 * step):
                self._send(state.pack(), self.rank - step)
                return state
            if self.rank + step < self.size:
                state.merge(State.unpack(self._receive(self.rank + step)))
            step *= 2
        return state

    def agree(self, wrong: str | None) -> str | None:
        """The message of the first process that failed, everywhere; None where none did."""
        content = (wrong or "").encode()
        sizes = np.zeros(self.size, np.int64)
        self._comm.Allgather(np.array([len(content)], np.int64), sizes)
        if not sizes.any():
            return None
        first = int(np.flatnonzero(sizes)[0])
        message = np.frombuffer(content, np.uint8).copy() if self.rank == first else np.zeros(int(sizes[first]), np.uint8)
        self._comm.Bcast(message, first)
        return message.tobytes().decode()

    def abort(self) -> None:
        """Print what goes wrong here, and end all processes."""
        traceback.print_exc()
        sys.stderr.flush()
        self._comm.Abort(1)

    def _send(self, content: bytes, to: int) -> None:
        self._comm.Send(np.array([len(content)], np.int64), to)
        for start in range(0, len(content), 1 << 30):  # counts of MPI are 32-bit
            self._comm.Send(np.frombuffer(content[start : start + (1 << 30)], np.uint8), to)

    def _receive(self, source: int) -> bytes:
        size = np.zeros(1, np.int64)
        self._comm.Recv(size, source)
        content = np.zeros(int(size[0]), np.uint8)
        for start in range(0, len(content), 1 << 30):
            self._comm.Recv(content[start : start + (1 << 30)], source)
        return content.tobytes()


def launched(environment: Mapping[str, str] = os.environ, world: Callable[[], Any] | None = None) -> Alone | Many:
    """The processes of this launch. UserError where a launcher started several and MPI knows of another number: each would do all the work."""
    told = {name: int(environment[name]) for name in SIZES if environment.get(name, "").isdecimal()}
    most = max(told.values(), default=1)
    if most == 1 and not any(name in environment for name in RANKS):
        return Alone()
    try:
        communicator = (world or _world)()
    except ImportError as error:
        if most == 1:
            return Alone()
        raise UserError(f"{most} processes were started, and MPI can't be used ({error}): pip install 'miles[analyze]'") from None
    size = communicator.Get_size()
    if size < most:
        by = next(name for name, value in told.items() if value == most)
        raise UserError(
            f"{most} processes were started ({by}), and MPI sees {size}: they would each read everything. "
            "Start them by the mpirun of this environment, or by srun --mpi=pmi2"
        )
    return Many(communicator) if size > 1 else Alone()


def _world() -> Any:
    if "SLURM_STEP_ID" in os.environ:
        # The addresses of UCX, which MPICH takes otherwise, are long: under Slurm 22.05's pmi2 a launch in seven failed, since they arrived garbled.
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
    from mpi4py import MPI

    return MPI.COMM_WORLD
