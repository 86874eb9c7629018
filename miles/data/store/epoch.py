"""Epochs: every attempt has a number greater than all before, and an older attempt writes nothing once a newer one began.

Two fences. Fence.check looks for a newer attempt's folder: cheap, and enough between phases. But a process can be stopped
between its check and its write; so everything sealed passes through the attempt's staging folder (files.seal), and a new
attempt renames the staging folders of all older ones. From then on an older attempt's rename fails in the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from miles.config.exits import AGAIN, TryAgain
from miles.data.store.files import make_folder, sync_folder
from miles.data.store.run_dir import RunDir

STAGING = "staging"
MOVING = "moving."  # before the quoted path, in the run directory, of what is on its way there


class Fenced(TryAgain):
    """A newer attempt owns the run: write nothing, exit with `exit_code` (75)."""

    exit_code = AGAIN


def newest_epoch(run_dir: RunDir) -> int:
    """Greatest epoch so far, 0 before the first attempt."""
    if not run_dir.attempts.is_dir():
        return 0
    return max((int(entry.name) for entry in run_dir.attempts.iterdir() if entry.name.isdecimal()), default=0)


def new_epoch(run_dir: RunDir, after: int | None = None) -> int:
    """Begin an attempt: make attempts/NNNNNN exclusively, point `latest` at it, take the staging folders of older attempts.

    after: the attempt that this one goes on from; somebody who has begun another one since has taken over. Returns the epoch (1 for the first).
    Raises Fenced if another attempt began in the meantime.
    """
    make_folder(run_dir.attempts)
    while True:
        epoch = (newest_epoch(run_dir) if after is None else after) + 1
        try:
            run_dir.attempt(epoch).mkdir()
            break
        except FileExistsError:  # somebody was faster: theirs is that number
            if after is not None:
                Fence(run_dir, after).check()
    (run_dir.attempt(epoch) / STAGING).mkdir()
    sync_folder(run_dir.attempts)
    Fence(run_dir, epoch).check()  # a newer one may have looked for our staging folder before we made it
    _take_staging(run_dir, epoch)
    point_latest(run_dir, Fence(run_dir, epoch))
    return epoch


def point_latest(run_dir: RunDir, fence: Fence) -> None:
    """Replace the symbolic link `latest` atomically. Raises Fenced when a newer attempt exists."""
    with fence.staged():
        temporary = fence.temporary("latest")
        os.symlink(Path("attempts") / run_dir.attempt(fence.epoch).name, temporary)
        os.replace(temporary, run_dir.latest)
    sync_folder(run_dir.path)


class Fence:
    """What an attempt carries to everything it writes."""

    def __init__(self, run_dir: RunDir, epoch: int) -> None:
        self.run_dir = run_dir
        self.epoch = epoch
        # Epochs are consecutive, so the next number is the first sign of a newer attempt: one stat, whatever their count.
        self._next = str(run_dir.attempt(epoch + 1))

    @property
    def staging(self) -> Path:
        """Folder where this attempt prepares what it seals."""
        return self.run_dir.attempt(self.epoch) / STAGING

    def check(self) -> None:
        """Raise Fenced when a newer attempt exists."""
        if os.path.exists(self._next):
            raise Fenced(f"attempt {self.epoch} of {self.run_dir.path} was superseded by attempt {newest_epoch(self.run_dir)}")

    def temporary(self, name: str) -> Path:
        """A path in staging that nobody uses yet, for something that will be called `name`."""
        return self.staging / f".{name}.{secrets.token_hex(4)}.tmp"

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Around renames out of staging and into it: check(), and Fenced where one fails since a newer attempt took the folder."""
        self.check()
        try:
            yield
        except FileNotFoundError:
            self.check()
            raise

    def replace_folder(self, draft: Path, folder: Path) -> None:
        """Give a folder in staging its name; an older one of that name goes. Raises Fenced when a newer attempt exists.

        A kill between the two leaves the name without a folder until the next attempt begins, which puts the older one back.
        """
        place, older = self._moving(folder), self.temporary(folder.name)
        with self.staged():
            if folder.exists():
                os.rename(folder, place)
            os.rename(draft, folder)
            sync_folder(folder.parent)
            if place.exists():
                os.rename(place, older)
        shutil.rmtree(older, ignore_errors=True)  # what is left goes with the staging folder

    def move(self, path: Path, target: Path) -> None:
        """Rename something in the run directory, by way of staging: an attempt that takes the folder in between completes the move.

        Raises Fenced when a newer attempt exists.
        """
        place = self._moving(target)
        with self.staged():
            os.rename(path, place)
            os.rename(place, target)
        sync_folder(target.parent)

    def _moving(self, target: Path) -> Path:
        """Where something lies on its way to a path in the run directory."""
        return self.staging / (MOVING + quote(str(target.relative_to(self.run_dir.path)), safe=""))

    def discard(self, path: Path) -> None:
        """Delete a file or folder by way of staging: a kill never leaves half of it under its name. Raises Fenced when a newer attempt exists."""
        with self.staged():
            place = self.temporary(path.name)
            os.rename(path, place)
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)  # what is left goes with the staging folder
        else:
            place.unlink(missing_ok=True)


def _take_staging(run_dir: RunDir, epoch: int) -> None:
    for attempt in sorted(run_dir.attempts.iterdir()):
        if not attempt.name.isdecimal() or int(attempt.name) >= epoch:
            continue
        taken = attempt / f"{STAGING}.taken.{epoch}"
        with contextlib.suppress(FileNotFoundError):  # taken already by an attempt between that one and ours
            os.rename(attempt / STAGING, taken)
    for taken in run_dir.attempts.glob(f"*/{STAGING}.taken.*"):
        for place in taken.glob(f"{MOVING}*"):
            target = run_dir.path / unquote(place.name.removeprefix(MOVING))
            try:
                os.rename(place, target)
            except OSError as error:  # moved by another attempt; or the folder that replaces it has the name already
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync_folder(target.parent)
        shutil.rmtree(taken, ignore_errors=True)  # an old process may still write into it; the next attempt sweeps again
