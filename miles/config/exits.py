"""Exit codes of every process, and the exceptions that choose them. The table is in docs/formats.md."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

OK = 0  # finished
AGAIN = 75  # try again: requeue
WRONG = 78  # the configuration or the input is wrong: never requeue

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
FULL_BYTES = 64 << 10  # a disk with less room is the reason for whatever failed on it
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


class UserError(ValueError):
    """A user's mistake. Its text is one line: what is wrong, where, and the mend. Processes exit with WRONG."""


class ConfigError(UserError):
    """The configuration is wrong."""


class TryAgain(Exception):
    """Not the run's fault (fenced off, coordinator lost, stopped on request): nothing more is written. Processes exit with AGAIN."""


def disk_full(error: BaseException, run_dir: Path | None = None) -> str | None:
    """The line about a full disk, None for another error. Libraries wrap the system's error in their own, so its text counts too.

    Of several processes that find the disk full each fails at another file; in the run's folder they all say the same.
    """
    seen: BaseException | None = error
    while seen is not None:
        if (isinstance(seen, OSError) and seen.errno in FULL) or any(text in str(seen) for text in FULL_TEXTS):
            name = getattr(seen, "filename", None)
            inside = run_dir is not None and (not isinstance(name, str) or Path(name).absolute().is_relative_to(run_dir))
            return full(run_dir if inside else name)
        seen = seen.__cause__ or seen.__context__
    return None


def no_room(path: Path) -> bool:
    """Whether the disk of a path is full, or has no place for another file."""
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize < FULL_BYTES or bool(room.f_files and not room.f_favail)


def full(where: Path | str | None) -> str:
    """What to do about a full disk."""
    place = f" at {where}" if where else ""
    return f"disk full{place}: free some space, then run the same command again; the run resumes from its last checkpoint"


def file_fault(error: OSError) -> str | None:
    """The line about a path that can't be used, None where the error may as well be a bug."""
    if error.errno not in REFUSED or not error.filename:
        return None
    return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}; check the path and its permissions, or choose another"


def first_cause(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several that ended together, the one that says why: a message for the user, then a kill or a hang by name, then an exception; 75 is an echo."""

    def echo(outcome: dict[str, Any]) -> int:
        if outcome["code"] == WRONG:
            return 0
        if outcome.get("killed") or outcome.get("told"):
            return 1
        return 3 if outcome["code"] == AGAIN else 2

    return min(outcomes, key=echo)
