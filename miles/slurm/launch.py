"""One run on this machine: attempts one after another until it is finished, stopped, or wrong.

The launcher holds no state that matters: kill it, and the components go on; run it again, and the run resumes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from miles.config.exits import AGAIN, OK, WRONG
from miles.config.placement import part
from miles.config.schema import RunConfig
from miles.data.store.epoch import newest_epoch
from miles.data.store.run_dir import RunDir, newest_complete_checkpoint
from miles.slurm.attempt import SUPERVISE, Attempt, Component, Watcher, because_of_disk
from miles.slurm.local import LocalRunner
from miles.slurm.progress import fruitless


def start_here(attempt: Attempt, component: str) -> Component:
    """Start a component of an attempt on this machine."""
    nodes = part(attempt.config, component).nodes
    return LocalRunner(attempt.folder / "submitit").submit(component, SUPERVISE, str(attempt.run.path), component, attempt.epoch, nodes=nodes)


def launch(config: RunConfig, run: RunDir, update: Watcher, say: Callable[[str], None]) -> int:
    """Run to the end, restarting after crashes; returns the exit code (docs/formats.md), 130 after Ctrl-C.

    Raises Fenced when somebody else began a newer attempt.
    """
    before, newest = newest_epoch(run), None
    while True:
        attempt = Attempt(run, config, say, start_here, restart=newest is not None, after=newest)
        newest = attempt.epoch
        interrupted = _stop_on_interrupt(attempt, say)
        attempt.submit()
        try:
            outcome = because_of_disk(run, attempt.watch(update))
        finally:
            signal.signal(signal.SIGINT, interrupted)
        attempt.close(outcome)
        if attempt.stop_asked and outcome["code"] != OK:
            say(f"stopped; {again_with(run)}")
            return 130
        if outcome["code"] != OK:
            attempt.fence.check()  # another attempt of ours would only fence the newer one off
        again = fruitless(run, lambda entry: entry["epoch"] > before)
        more = outcome["code"] == AGAIN and again <= config.cluster.restarts
        if outcome["code"] == AGAIN:
            say(f"attempt {attempt.epoch}: {outcome['reason']}" + ("; trying again" if more else ""))
        if not more:
            break
    if outcome["code"] == WRONG:
        say(f"error: {outcome['reason']}")
    elif outcome["code"] not in (OK, AGAIN):
        say(f"failed: {outcome['reason']}")
    elif outcome["code"] == AGAIN:
        say(f"gave up after {again} attempts without a new step (cluster.restarts); {again_with(run)}")
    return int(outcome["code"])


def again_with(run: RunDir) -> str:
    """The command that goes on with a run, and whether it resumes or begins again."""
    if newest_complete_checkpoint(run) is None:
        return f"no checkpoint yet, so the same command begins again: miles-submit run {run.quoted}"
    return f"resume with: miles-submit run {run.quoted}"


def _stop_on_interrupt(attempt: Attempt, say: Callable[[str], None]) -> Any:
    def handler(signum: int, frame: Any) -> None:
        after = "a checkpoint" if attempt.config.debug.trains else "this step"
        say("stopping at once" if attempt.stop_asked else f"stopping after {after} (Ctrl-C again stops at once)")
        attempt.request_stop()

    return signal.signal(signal.SIGINT, handler)
