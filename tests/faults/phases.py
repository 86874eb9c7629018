"""In which phase a run is, from the files it has written so far: its events tell what ended last, the schedule what comes then."""

from __future__ import annotations

from pathlib import Path

import shared

from miles.config.schema import RunConfig
from miles.data.store.manifest import NAME
from miles.data.store.metrics import read_lines
from miles.data.store.run_dir import RunDir
from miles.run.schedule import Step, steps

ALL = ("start", "generate", "seal", "train", "sync", "eval", "save")


def phase_now(config: RunConfig, run_dir: Path) -> str:
    """One of ALL, or "warm start", "export" (the end), "between" (an attempt has ended, the next has not begun)."""
    folder, epoch = RunDir(run_dir), shared.newest(run_dir)
    if (folder.attempt(epoch) / "exit.json").exists():
        return "between"
    events = read_lines(folder.event_file("trainer", 0, epoch))
    pushed = (folder.attempt(epoch) / "sync").exists()
    if not events:
        return "sync" if pushed else "start"  # the first sync of a resumed attempt
    phase, number = events[-1]["phase"], int(events[-1]["step"])
    schedule = {step.number: step for step in steps(config, 0)}
    trained = phase in ("train", "eval", "save") or (phase == "sync" and any(e["phase"] == "train" and e["step"] == number for e in events))
    if phase == "wait":
        return "train"
    if not trained:
        return waiting(folder, schedule.get(number + 1), pushed)
    if number == config.warm_start.steps and phase == "sync":
        return "eval"  # before the first rollout
    order = after(schedule[number])
    left = order[order.index(phase) + 1 :] if phase in order else []
    return left[0] if left else waiting(folder, schedule.get(number + 1), pushed)


def after(step: Step) -> list[str]:
    """Phases of a step from its training on."""
    return ["train", *(["sync"] if step.kind == "rollout" else []), *(["eval"] if step.evaluate else []), *(["save"] if step.save else [])]


def waiting(folder: RunDir, step: Step | None, pushed: bool) -> str:
    """What is done while the trainer waits for the batch of a step."""
    if step is None:
        return "export"
    if step.kind == "sft":
        return "warm start"
    if not pushed:
        return "start"  # engines are not there yet
    return "seal" if sealing(folder, step.number) else "generate"


def sealing(folder: RunDir, number: int) -> bool:
    """Whether files of a batch are being written: in staging, or in a folder that has no manifest yet."""
    batch = folder.batch(number)
    if batch.exists():
        return not (batch / NAME).exists()
    staging = folder.attempt(shared.newest(folder.path)) / "staging"
    return any(staging.glob(".rollout.*")) or any(staging.glob(".manifest.*"))


