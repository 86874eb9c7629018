"""The report of a run, made by its job as the launcher of one machine makes it: fresh while the run goes on, and once more at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from miles.config.exits import disk_full
from miles.data.store.run_dir import RunDir
from miles.slurm.signals import Signals

if TYPE_CHECKING:
    from miles.report.refresh import Refresher


@contextlib.contextmanager
def reported(run: RunDir, signals: Signals, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields what to call when something may have changed. A job that must make room for others makes no last page: the next one goes on with it.

    A report that can't be made is said, and ends nothing.
    """
    made: list[Refresher] = []

    def poke() -> None:
        if not made:
            from miles.report.refresh import Refresher  # templates and HDF5: not for every start of a job

            made.append(Refresher(run.path))
        made[0].poke()

    try:
        yield poke
    finally:
        for refresher in made:
            refresher.close()
    if signals.by == "slurm":
        return
    from miles.report.build import build_report

    try:
        say(f"report: {build_report(run.path)}")
    except (OSError, ValueError) as error:
        if disk_full(error) is None:  # the run says that itself
            say(f"warning: the report was not made: {error}")
