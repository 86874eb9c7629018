"""A conversion is a list of files. Each is written whole by one worker of one rank, synced, hashed, and recorded; what is recorded and still
has its checksum is not written again. Rank 0 waits for all records, then finishes.

The plan does not depend on the number of ranks or workers, so a conversion may go on with others.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from miles.config.exits import TryAgain, UserError
from miles.convert.durable import publish, write_durable
from miles.convert.output import Output, new_buffer
from miles.convert.progress import Progress

RECORDS, DONE, PLAN = ".convert", "conversion.json", "plan.json"
PATIENCE = 600.0  # seconds without a record from any rank before rank 0 gives up


@dataclass(frozen=True)
class Rank:
    """Who this process is among those that convert together, and its threads."""

    rank: int = 0
    world: int = 1
    workers: int = 1


def here(workers: int) -> Rank:
    """This process's place: Slurm's, or MPI's, or alone."""
    for rank, world in (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if rank in os.environ and world in os.environ:
            return Rank(int(os.environ[rank]), int(os.environ[world]), workers)
    return Rank(0, 1, workers)


@dataclass(frozen=True)
class Units:
    """folder: where the files go. plan: fingerprint of all that decides their content. names: the files. write(i, file) writes file i and
    returns what to record of it. finish(records) makes the folder a checkpoint."""

    folder: Path
    plan: str
    names: list[str]
    write: Callable[[int, Output], dict[str, Any]]
    finish: Callable[[list[dict[str, Any]]], None]

    @property
    def records(self) -> Path:
        return self.folder / RECORDS

    def run(self, me: Rank, progress: Progress) -> int:
        """Write what is missing; returns how many files were there already. UserError where the destination holds something else."""
        if self._finished():
            if me.rank == 0:
                shutil.rmtree(self.records, ignore_errors=True)  # what a kill in _close left
            return len(self.names)
        self._claim()
        with self._alone(me.rank):
            mine = list(range(me.rank, len(self.names), me.world))
            kept = [i for i in mine if self._kept(i, progress)]
            todo = [i for i in mine if i not in set(kept)]
            with _one_thread_each():
                self._write_all(todo, max(1, me.workers), progress)
            if me.rank == 0:
                found = self._all_records()
                self.finish(found)
                self._close()
        return len(kept)

    def _finished(self) -> bool:
        mark = self.folder / DONE
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads(mark.read_text())["plan"] == self.plan)
        return False

    def _claim(self) -> None:
        plan = self.records / PLAN
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path}: not a folder; choose another")
        if self.folder.exists() and not plan.exists() and any(entry.name != RECORDS for entry in self.folder.iterdir()):
            raise UserError(f"{self.folder}: not empty, and no unfinished conversion of this source with these options; choose another folder")
        self.records.mkdir(parents=True, exist_ok=True)
        if not plan.exists():
            write_durable(plan, json.dumps({"plan": self.plan}).encode(), f"-{socket.gethostname()}-{os.getpid()}")
        if json.loads(plan.read_text()).get("plan") != self.plan:
            raise UserError(f"{self.folder}: holds an unfinished conversion of another source or with other options; finish that one, or choose another folder")

    @contextlib.contextmanager
    def _alone(self, rank: int) -> Any:
        with (self.records / f"rank-{rank}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder}: another process is converting into it; wait for it, or choose another folder") from None
            yield

    def _record(self, i: int) -> Path:
        return self.records / f"{self.names[i]}.json"

    def _read(self, i: int) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._record(i).read_text())
            if isinstance(found, dict):
                return found
        return None

    def _kept(self, i: int, progress: Progress) -> bool:
        found, file = self._read(i), self.folder / self.names[i]
        if found is None or not file.is_file() or file.stat().st_size != found["bytes"] or checksum(file) != found["xxh3"]:
            self._record(i).unlink(missing_ok=True)
            return False
        progress.skip(found["bytes"])
        return True

    def _write_all(self, todo: list[int], workers: int, progress: Progress) -> None:
        stop, spare = threading.Event(), queue.SimpleQueue[mmap.mmap]()
        for _ in range(min(workers, len(todo))):
            spare.put(new_buffer())

        def write(i: int) -> None:
            if not stop.is_set():
                buffer = spare.get()
                self._write(i, buffer, progress)
                spare.put(buffer)

        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(write, i) for i in todo]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            if any(job.exception() for job in done):
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
            for job in done:
                job.result()

    def _write(self, i: int, buffer: mmap.mmap, progress: Progress) -> None:
        draft = self.records / f"{self.names[i]}.part"
        try:
            with contextlib.closing(Output(draft, buffer, progress)) as file:
                about = self.write(i, file)
                file.finish()
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        publish(draft, self.folder / self.names[i])
        write_durable(self._record(i), json.dumps({"file": self.names[i], "bytes": file.tell(), "xxh3": file.digest(), **about}).encode())

    def _all_records(self) -> list[dict[str, Any]]:
        seen, since = -1, time.monotonic()
        while True:
            missing = [i for i in range(len(self.names)) if not self._record(i).is_file()]
            if not missing:
                break
            if len(missing) != seen:
                seen, since = len(missing), time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise TryAgain(f"{self.folder}: {len(missing)} files of other ranks have not come for {PATIENCE:.0f} s; run the same command again")
            time.sleep(0.2)
        found = [self._read(i) for i in range(len(self.names))]
        assert all(found), "just seen"
        return [record for record in found if record is not None]

    def _close(self) -> None:
        write_durable(self.folder / DONE, json.dumps({"schema": "miles.conversion/1", "plan": self.plan}).encode())
        shutil.rmtree(self.records)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Files are the parallel pieces: torch's own threads for every worker would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checksum(file: Path) -> str:
    """xxh3_128 of a file."""
    whole, block = xxhash.xxh3_128(), memoryview(bytearray(1 << 22))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(block):
            whole.update(block[:count])
    return whole.hexdigest()
