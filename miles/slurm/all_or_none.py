"""Jobs that are submitted together: all of them, or none, whatever ends the command, short of kill -9 and a power cut."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from miles.config.exits import UserError
from miles.slurm.command import slurm_command

SUBMIT_SECONDS = 60.0
ASKS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class AllOrNone:
    """A block whose jobs are cancelled when it ends by an exception or a signal. Signals wait while sbatch runs: the job that it makes is known first.

    taken_back: whether that was done, and Slurm took it.
    """

    def __init__(self) -> None:
        self.jobs: list[int] = []
        self.taken_back = False
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> AllOrNone:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in ASKS if signal.getsignal(number) != signal.SIG_IGN]  # nohup's is not
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def sbatch(self, words: Sequence[str]) -> int:
        """Run an `sbatch --parsable …` command; returns the job's id. UserError: refused. KeyboardInterrupt or SystemExit: a signal came before."""
        self.heed()
        said = slurm_command(words, timeout=SUBMIT_SECONDS, own_session=True).stdout
        if (found := re.search(r"^(\d+)(;\S*)?$", said, re.MULTILINE)) is None:  # a site's own sbatch may say more
            raise UserError(f"sbatch --parsable took the job and named no id, but {said.strip()!r}: find it with squeue")
        self.jobs.append(int(found[1]))
        return self.jobs[-1]

    def heed(self) -> None:
        """Raise what a signal that came would have raised, or ended, the command with."""
        if self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self._asked is not None:
            raise SystemExit(128 + self._asked)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.heed()
        except (KeyboardInterrupt, SystemExit):
            self._take_back()
            raise
        else:
            if kind is not None:
                self._take_back()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _take_back(self) -> None:
        """Slurm may be why there is nothing more to submit: then the jobs stay on record."""
        try:
            if self.jobs:
                slurm_command(["scancel", *map(str, self.jobs)], timeout=SUBMIT_SECONDS, own_session=True)
            self.taken_back = True
        except UserError:
            self.taken_back = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
