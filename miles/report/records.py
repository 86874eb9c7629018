"""What a run directory says of its run, read through the store. Everything may be missing, unfinished, or torn at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.config.lenient import usable
from miles.data.store.events import read_events
from miles.data.store.metrics import as_float, read_metrics
from miles.data.store.run_dir import RunDir, newest_complete_checkpoint, read_provenance, read_run_yaml

NOT_PHASES = frozenset({"step", "idle"})  # spans that contain others, or nothing


@dataclass
class Attempt:
    """One attempt: its epoch, its folder, and how it ended (None while it goes on, or when it died without a word)."""

    epoch: int
    folder: Path
    outcome: dict[str, Any] | None = None
    damaged: bool = False  # it ended, and how can't be read


@dataclass
class RunRecord:
    """A run's small files. `damaged` are the lines about files that could not be read: they are told, never hidden."""

    run_dir: RunDir
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # each with component, rank, epoch
    attempts: list[Attempt] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    checkpoint: int | None = None
    damaged: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.run_dir.run_id())

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Metric lines of one kind, by step; a step that was done again counts once, as it was last."""
        return [line for _, line in sorted({int(line["step"]): line for line in self.metrics if line.get("kind") == kind}.items())]

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted path."""
        value: Any = self.config
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value

    @property
    def total_steps(self) -> int:
        """Warm-start steps and rollouts together, as configured."""
        return int(self.setting("warm_start.steps", 0) or 0) + int(self.setting("num_rollout", 0) or 0)

    @cached_property
    def phase_source(self) -> str:
        """Which process the time of phases is taken from: the trainer's rank 0 drives the loop."""
        present = {(str(event["component"]), int(event["rank"])) for event in self.events}
        if ("trainer", 0) in present:
            return "trainer 0"
        if present:
            component, rank = min(present)
            return f"{component} {rank}"
        return "the trainer"

    @cached_property
    def phase_seconds(self) -> dict[int, dict[str, float]]:
        """Seconds by step and phase, of the attempt that did the step last; from perf/*_time metrics where no events are."""
        newest: dict[int, int] = {}
        source = self.phase_source
        mine = [event for event in self.events if f"{event['component']} {event['rank']}" == source and _is_span(event)]
        for event in mine:
            newest[event["step"]] = max(newest.get(event["step"], -1), event["epoch"])
        seconds: dict[int, dict[str, float]] = {}
        for event in mine:
            if event["epoch"] == newest[event["step"]]:
                stack = seconds.setdefault(event["step"], {})
                stack[event["phase"]] = stack.get(event["phase"], 0.0) + max(event["end"] - event["start"], 0.0)
        return seconds or self._phase_metrics()

    def _phase_metrics(self) -> dict[int, dict[str, float]]:
        names = {"perf/rollout_time": "generate", "perf/log_probs_time": "log_probs", "perf/ref_log_probs_time": "ref_log_probs", "perf/actor_train_time": "train", "perf/train_time": "train", "perf/update_weights_time": "sync"}
        found = {int(line["step"]): {phase: as_float(line[name]) for name, phase in names.items() if isinstance(line.get(name), int | float)} for line in self.metrics}
        return {step: stack for step, stack in found.items() if stack}


def _is_span(event: dict[str, Any]) -> bool:
    numbers = all(isinstance(event.get(key), int | float) for key in ("start", "end"))
    return numbers and isinstance(event.get("step"), int) and isinstance(event.get("phase"), str) and event["phase"] not in NOT_PHASES


def require_run_dir(path: Path) -> RunDir:
    """The run directory at this path. UserError when it is none."""
    run_dir = RunDir(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory; give the folder that `miles-submit run` made")
    if not run_dir.run_yaml.is_file() and not run_dir.attempts.is_dir():
        raise UserError(f"{path}: not a run directory (it has no run.yaml); give the folder that `miles-submit run` made")
    return run_dir


def read_attempts(run_dir: RunDir) -> list[Attempt]:
    """All attempts, oldest first."""
    if not run_dir.attempts.is_dir():
        return []
    found = []
    for folder in sorted(run_dir.attempts.iterdir()):
        if folder.is_dir() and folder.name.isdigit():
            outcome = read_small_json(folder / "exit.json")
            found.append(Attempt(int(folder.name), folder, outcome, damaged=outcome is None and (folder / "exit.json").exists()))
    return sorted(found, key=lambda attempt: attempt.epoch)


def read_small_json(path: Path) -> dict[str, Any] | None:
    """A small JSON object that another process may be writing just now; None while it is not there or not whole."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def read_run(path: Path) -> RunRecord:
    """Read the small files of a run (never a batch). UserError when the folder is not a run's."""
    record = RunRecord(require_run_dir(path))
    run_dir = record.run_dir

    def attempt_to(read: Any, default: Any) -> Any:
        try:
            return read()
        except FileNotFoundError:
            return default
        except (OSError, ValueError) as error:
            record.damaged.append(" ".join(str(error).split()))
            return default

    record.config, wrong = usable(attempt_to(lambda: read_run_yaml(run_dir), {}))
    record.damaged += [f"{run_dir.run_yaml}: {line}" for line in wrong]
    record.metrics = attempt_to(lambda: read_metrics(run_dir.metrics), [])
    record.provenance = attempt_to(lambda: read_provenance(run_dir), {})
    record.attempts = read_attempts(run_dir)
    record.damaged += [f"{attempt.folder / 'exit.json'}: not a JSON object" for attempt in record.attempts if attempt.damaged]
    record.checkpoint = newest_complete_checkpoint(run_dir)
    record.events = attempt_to(lambda: read_events(run_dir), [])
    return record
