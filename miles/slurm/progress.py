"""How far a run has come, from its files alone: whether it is finished, and how many attempts in a row have brought nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles.config.exits import OK
from miles.config.schema import RunConfig
from miles.data.store.epoch import newest_epoch
from miles.data.store.files import Damaged, read_json
from miles.data.store.metrics import read_metrics
from miles.data.store.results import last_with_results
from miles.data.store.run_dir import RunDir, newest_complete_checkpoint, read_provenance

Entry = dict[str, Any]


def finished(run: RunDir, config: RunConfig) -> bool:
    """Whether the newest attempt ended well, and there is no step left to do."""
    done = {line["step"] for line in read_metrics(run.metrics)}
    if config.debug.rescore:
        from miles.data.recorded import chosen_steps  # reads HDF5: not for every start of a job

        left = bool(set(chosen_steps(config)) - done)
    else:
        left = max(done, default=0) < config.last_step
    return not left and ending(run, newest_epoch(run)).get("code") == OK


def ending(run: RunDir, epoch: int) -> dict[str, Any]:
    """What an attempt said at its end: {code, reason, stopped, …}; empty where it left nothing readable (killed, or on a full disk)."""
    try:
        found = read_json(run.attempt(epoch) / "exit.json")
    except (FileNotFoundError, Damaged):
        return {}
    return found if isinstance(found, dict) else {}


def furthest(run: RunDir) -> int:
    """The last step that any attempt has finished: metrics are cut back when one resumes, but each recorded what it found."""
    found = [int(entry.get("furthest", 0)) for entry in read_provenance(run)["attempts"]]
    return max([*found, *(line["step"] for line in read_metrics(run.metrics)), newest_complete_checkpoint(run) or 0])


def fruitless(run: RunDir, counts: Callable[[Entry], bool]) -> int:
    """Attempts in a row, up to the newest, that finished no step that is new. One that was asked to stop is no failure: it doesn't count, unless it
    had all the time that its job may have, and left nothing at all: the next would fare no better.

    counts: which attempts are looked at; the others are of an earlier command.
    """
    reached, number = furthest(run), 0
    for entry in reversed(read_provenance(run)["attempts"]):
        if not counts(entry) or int(entry.get("furthest", 0)) < reached:
            break
        epoch = int(entry["epoch"])
        number += not stopped(run, epoch) or (_had_its_time(run, epoch) and last_with_results(run, {epoch}) is None)
    return number


def stopped(run: RunDir, epoch: int) -> bool:
    """Whether an attempt was asked to stop."""
    return (run.attempt(epoch) / "stop.json").exists() or bool(ending(run, epoch).get("stopped"))


def _had_its_time(run: RunDir, epoch: int) -> bool:
    try:
        return bool(read_json(run.attempt(epoch) / "stop.json").get("time_is_up"))
    except (FileNotFoundError, Damaged):
        return False
