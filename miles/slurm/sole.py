"""One launcher a run: two would only fence each other off."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from miles.config.exits import UserError
from miles.data.service_call import call_attempt
from miles.data.store.run_dir import RunDir


@contextlib.contextmanager
def alone(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold a folder that is there. UserError, in these words: another process does."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: {otherwise}") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_launcher(run: RunDir) -> Iterator[None]:
    """Two launchers on one run would only fence each other off: the second is refused, from the first's start on."""
    with alone(run.path, f"this run is going on; follow it with `miles-submit logs -f {run.quoted}`"):
        refuse_if_running(run)
        yield


def refuse_if_running(run: RunDir) -> None:
    """A launcher that was killed leaves a run that goes on."""
    latest = run.latest.resolve()
    if (latest / "exit.json").exists():
        return
    status = call_attempt(run, latest, "GET", "/status")
    if status is not None and status.get("run") is not None:
        raise UserError(f"{run.path}: this run is going on (attempt {latest.name}); follow it with `miles-submit logs -f {run.quoted}`")
