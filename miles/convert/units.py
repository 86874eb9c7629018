"""A conversion is a list of files. Each is written whole by one worker of one rank, synced, hashed, and recorded; what is recorded and still
has its checksum is not written again. Rank 0 waits for all records, then finishes.

The plan does not depend on the number of ranks or workers, so a conversion may go on with others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import queue
import shutil
import socket
import time
import uuid
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
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # a file system that knows none, such as Lustre mounted without flock
PATIENCE = 600.0  # seconds without a record from any rank before rank 0 gives up


@dataclass(frozen=True)
class Rank:
    """Who this process is among those that convert together, and its threads."""

    rank: int = 0
    world: int = 1
    workers: int = 1


def here(workers: int) -> Rank:
    """This process's place: MPI's (mpirun inside a Slurm job has Slurm's variables too), or that in a step of srun, or alone. A batch script is alone,
    however many tasks its job has."""
    for rank, world in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
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
        """Write what is missing; returns how many files were there already. UserError where the destination holds something else, or is finished
        and no longer what was written; TryAgain after Ctrl-C."""
        mine = list(range(me.rank, len(self.names), me.world))
        progress.share(len(mine) / len(self.names))
        try:
            kept = mine if self._finished(mine, me.workers, progress) else self._convert(me, mine, progress)
        except KeyboardInterrupt:
            raise TryAgain(f"{self.folder}: stopped; the same command goes on, files that are finished are kept") from None
        except FileNotFoundError:
            # Rank 0 has looked through this rank's files itself, and cleared up.
            if me.rank == 0 or self._told() is None:
                raise
            kept = mine
        if me.rank == 0:
            # On NFS a file that is open keeps its folder alive: the locks are closed by now, other ranks' may not be.
            shutil.rmtree(self.records, ignore_errors=True)
        return len(kept)

    def _convert(self, me: Rank, mine: list[int], progress: Progress) -> list[int]:
        self._claim()
        with self._alone(me.rank):
            before = {i: self._read(i) for i in range(len(self.names)) if i % me.world != me.rank} if me.rank == 0 else {}
            whole = self._each(mine, me.workers, lambda i: self._kept(i, progress))
            kept = [i for i, good in zip(mine, whole, strict=True) if good]
            with _one_thread_each():
                self._write_all([i for i in mine if i not in set(kept)], me.workers, progress)
            if me.rank == 0:
                self._await(before)
                found = [self._read(i) for i in range(len(self.names))]
                assert all(found), "just seen"
                records = [record for record in found if record is not None]
                self.finish(records)
                files = {record["file"]: {"bytes": record["bytes"], "xxh3": record["xxh3"]} for record in records}
                write_durable(self.folder / DONE, json.dumps({"schema": "miles.conversion/1", "plan": self.plan, "files": files}).encode())
        return kept

    def _told(self) -> dict[str, Any] | None:
        """What is written of a finished conversion of this plan."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.folder / DONE).read_text())
            if isinstance(found, dict) and found.get("plan") == self.plan and "files" in found:
                return found
        return None

    def _finished(self, mine: list[int], workers: int, progress: Progress) -> bool:
        """Whether all is done. UserError where files of a finished conversion are no longer as they were written."""
        told = self._told()
        if told is None:
            return False

        def good(i: int) -> bool:
            about = told["files"][self.names[i]]
            progress.skip(about["bytes"])
            return self._whole(i, about)

        bad = [self.names[i] for i, whole in zip(mine, self._each(mine, workers, good), strict=True) if not whole]
        if bad:
            raise UserError(f"{self.folder / bad[0]}: not what was written ({len(bad)} such); remove {self.folder}, then convert again")
        return True

    def _each(self, numbers: list[int], workers: int, what: Callable[[int], bool]) -> list[bool]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(what, numbers))

    def _claim(self) -> None:
        plan = self.records / PLAN
        for path in (self.folder, *self.folder.parents):
            if (path.exists() or path.is_symlink()) and not path.is_dir():
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
            except BlockingIOError:
                raise UserError(f"{self.folder}: another process is converting into it; wait for it, or choose another folder") from None
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
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
        found = self._read(i)
        if found is None or not self._whole(i, found):
            self._record(i).unlink(missing_ok=True)
            return False
        self._note(i, found)
        progress.skip(found["bytes"])
        return True

    def _whole(self, i: int, about: dict[str, Any]) -> bool:
        """Whether a file is what a record says."""
        file = self.folder / self.names[i]
        return file.is_file() and bool(file.stat().st_size == about["bytes"] and checksum(file) == about["xxh3"])

    def _note(self, i: int, about: dict[str, Any]) -> None:
        """Record that a file is whole, now: rank 0 tells this from an earlier attempt's record."""
        write_durable(self._record(i), json.dumps(about | {"seen": uuid.uuid4().hex}).encode())

    def _write_all(self, todo: list[int], workers: int, progress: Progress) -> None:
        spare = queue.SimpleQueue[mmap.mmap]()
        for _ in range(min(workers, len(todo))):
            spare.put(new_buffer())

        def write(i: int) -> None:
            buffer = spare.get()
            try:
                self._write(i, buffer, progress)
            finally:
                spare.put(buffer)

        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(write, i) for i in todo]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()
            except BaseException:
                progress.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

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
        self._note(i, {"file": self.names[i], "bytes": file.tell(), "xxh3": file.digest(), **about})

    def _await(self, others: dict[int, dict[str, Any] | None]) -> None:
        """Until every file of other ranks is known to be whole. others: the records of those files when this attempt began. One that has not changed
        since is looked at here: its rank may have been the quicker one, or may not have come to it yet."""
        looked, since = set[int](), time.monotonic()
        while others:
            for i, before in list(others.items()):
                now = self._read(i)
                if now is None or (now == before and i in looked):
                    continue
                looked.add(i)
                if now != before or self._whole(i, now):
                    del others[i]
                    since = time.monotonic()
            if others and time.monotonic() - since > PATIENCE:
                raise TryAgain(f"{self.folder}: {len(others)} files of other ranks have not come for {PATIENCE:.0f} s; run the same command again")
            time.sleep(0.2 if others else 0.0)


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
