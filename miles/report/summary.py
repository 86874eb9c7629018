"""The state of a run in one small record: the same for `status`, for the report's header, and for scripts."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from miles.config.exits import AGAIN, OK, WRONG
from miles.data.store.files import Damaged, read_json
from miles.report.figures import ACCURACY, REWARD, STEP_SECONDS, series_of, tokens_per_second
from miles.report.records import RunRecord

QUIET_SECONDS = 120.0  # a run that wrote something within this time is taken for alive
RECENT_STEPS = 5  # steps that speed and remaining time are taken from


@dataclass
class Summary:
    """state: new (no attempt yet), starting, running, finished, stopped, failed, or lost (died without a word). Unknown values are None."""

    run: str
    run_dir: str
    state: str = "starting"
    reason: str = ""
    alive: bool = False
    epoch: int | None = None
    attempts: int = 0
    restarts: int = 0  # attempts that miles began by itself; the others are the user's own commands
    phase: str | None = None
    kind: str | None = None
    step: int | None = None
    steps_done: int = 0
    total_steps: int = 0
    reward_mean: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    seconds_left: float | None = None
    tier: str | None = None
    tier_why: str = ""
    tier_since: int | None = None  # attempt from which on it is weaker than it was at first
    checkpoint: int | None = None
    message: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(record: RunRecord, now: float | None = None) -> Summary:
    """What the files alone say."""
    now = time.time() if now is None else now
    summary = Summary(run=record.name, run_dir=str(record.run_dir.path))
    summary.attempts = len(record.attempts)
    summary.restarts = sum(entry.get("restart") is True for entry in record.provenance.get("attempts", []))
    summary.total_steps = record.total_steps
    summary.checkpoint = record.checkpoint
    summary.tier, summary.tier_since, summary.tier_why = guarantee_tier(record)
    trained = sorted({int(line["step"]) for line in record.metrics if line.get("kind") in ("sft", "rollout")})
    if trained:
        summary.step = trained[-1]
        summary.steps_done = len(trained)
    if record.metrics:
        summary.kind = record.metrics[-1].get("kind")
    summary.reward_mean = _last(series_of(record.of_kind("rollout"), REWARD)[1])
    evals = record.of_kind("eval")
    if evals:
        summary.accuracy = _last(series_of(evals, ACCURACY)[1])
        summary.accuracy_low, summary.accuracy_high = evals[-1].get("eval/accuracy_low"), evals[-1].get("eval/accuracy_high")
    summary.tokens_per_second = _last(tokens_per_second(record)[1])
    summary.seconds_per_step = step_seconds(record)
    if summary.seconds_per_step is not None and summary.total_steps:
        summary.seconds_left = max(summary.total_steps - summary.steps_done, 0) * summary.seconds_per_step
    _judge(record, summary, now)
    return summary


def _judge(record: RunRecord, summary: Summary, now: float) -> None:
    """State and reason from the newest attempt's end and from how fresh the files are."""
    if not record.attempts:
        summary.state, summary.reason = "new", "no attempt has been made yet; start it with `miles-submit run`"
        summary.seconds_left = None
        return
    latest = record.attempts[-1]
    summary.epoch = latest.epoch
    if latest.damaged:
        summary.state, summary.reason = "lost", f"attempt {latest.epoch} has ended, but {latest.folder / 'exit.json'} is damaged; {_again(record)}"
    elif latest.outcome is None and (made_in := _made_elsewhere(record)) is not None:
        summary.state = "lost"
        summary.reason = f"attempt {latest.epoch} was made in {made_in}, of which this is a copy: nothing goes on here; {_again(record)}"
    elif latest.outcome is None:
        if now - last_written(record) <= QUIET_SECONDS:
            summary.state = "running" if record.metrics or record.events else "starting"
        else:
            summary.state = "lost"
            summary.reason = f"attempt {latest.epoch} ended without a word; {_again(record)}"
    else:
        code, why = latest.outcome.get("code"), str(latest.outcome.get("reason") or "")
        cut_short = bool(latest.outcome.get("stopped")) and summary.steps_done < summary.total_steps
        if code == OK and not cut_short:
            summary.state = "finished"
        elif code in (OK, AGAIN, 130) or latest.outcome.get("stopped"):
            early = code == OK and record.setting("debug.stop_after")
            why = why if early else "stopped on request" if latest.outcome.get("stopped") else why or "interrupted"
            summary.state, summary.reason = "stopped", f"{why}; {_again(record, 'debug.stop_after=null' if early else '')}"
        else:
            mend = "" if code == WRONG else f" (exit code {code})"
            summary.state, summary.reason = "failed", (why or "no reason was recorded") + mend
    if summary.state not in ("running", "starting"):
        summary.seconds_left = None


def _made_elsewhere(record: RunRecord) -> str | None:
    """The folder in which the newest attempt was made, where this one is another."""
    try:
        service = read_json(record.attempts[-1].folder / "service.json")
    except (FileNotFoundError, PermissionError, Damaged):  # not written yet, or another user's
        return None
    made_in = service.get("run_dir") if isinstance(service, dict) else None
    return None if not isinstance(made_in, str) or record.run_dir.is_at(made_in) else made_in


def _again(record: RunRecord, setting: str = "") -> str:
    command = f"`miles-submit run {' '.join([record.run_dir.quoted, setting]).strip()}`"
    kept = record.checkpoint is not None or record.setting("debug.rollout_only") or record.setting("debug.rescore")  # those keep their files, not checkpoints
    return f"resume with {command}" if kept else f"no checkpoint yet: {command} begins again"


def merge_service(summary: Summary, status: dict[str, Any]) -> Summary:
    """Let what the living service says win over the files. Keys may be missing."""
    summary.alive, summary.reason = True, ""
    summary.state = "running"  # also when it says finished: its attempt has not ended yet
    summary.phase = status.get("phase") or summary.phase
    behind = steps_behind(status)
    summary.steps_done = max(summary.steps_done, behind or 0)
    # The service's tokens_per_second are those of generation alone; the files' are a batch's by the seconds of its whole step.
    for name in ("kind", "epoch", "step", "total_steps", "reward_mean", "accuracy", "seconds_per_step", "message"):
        if status.get(name) is not None:
            setattr(summary, name, status[name])
    if summary.seconds_per_step is not None and summary.total_steps:
        summary.seconds_left = max(summary.total_steps - summary.steps_done, 0) * float(summary.seconds_per_step)
    return summary


def steps_behind(status: dict[str, Any]) -> int | None:
    """Steps that are done, from the service's status: while a batch is generated or trained on, its own step is not done yet.

    An evaluation belongs to the step that it follows; `sft`, `rollout` (told once a step is recorded), `sync`, `save` and
    `finished` come after the step.
    """
    if not isinstance(status.get("step"), int):
        return None
    at_work = status.get("phase") in (None, "starting", "generate", "wait", "log_probs", "train") and status.get("kind") != "eval"
    return max(status["step"] - 1, 0) if at_work else int(status["step"])


def guarantee_tier(record: RunRecord) -> tuple[str | None, int | None, str]:
    """(exact, replayed or accounted, as the last attempt recorded it; the attempt since which, if one before could promise more; why).

    What binds an attempt is in its own entry: one between that left nothing doesn't count.
    """
    order = ("exact", "replayed", "accounted")
    entries = [entry for entry in record.provenance.get("attempts", []) if entry.get("tier")]
    if not entries:
        return None, None, ""
    ranks = [order.index(entry["tier"]) if entry["tier"] in order else len(order) for entry in entries]
    first = next((index + 1 for index in reversed(range(len(entries))) if ranks[index] != ranks[-1]), 0)  # of those with the last one's tier, at the end
    fell = any(rank < ranks[-1] for rank in ranks[:first])
    found = entries[first]
    why = ", ".join(found.get("changed") or []) if fell else ""
    return str(found["tier"]), int(found["epoch"]) if fell else None, why or str(found.get("why") or "")


def step_seconds(record: RunRecord) -> float | None:
    """Median seconds of the last few steps: as recorded, else from the times of the metric lines."""
    trained = [line for line in record.metrics if line.get("kind") in ("sft", "rollout")]
    recorded = series_of(trained[-RECENT_STEPS:], STEP_SECONDS)[1]
    if recorded:
        return _median(recorded)
    recent = [line for line in trained if isinstance(line.get("time"), int | float)][-RECENT_STEPS - 1 :]
    gaps = [float(after["time"]) - float(before["time"]) for before, after in itertools.pairwise(recent)]
    return _median([gap for gap in gaps if gap >= 0])


def last_written(record: RunRecord) -> float:
    """When the run last wrote something [unix s]."""
    places = [record.run_dir.metrics, record.attempts[-1].folder, record.attempts[-1].folder / "logs"] if record.attempts else [record.run_dir.metrics]
    for folder in (record.run_dir.events, record.attempts[-1].folder / "logs" if record.attempts else record.run_dir.events):
        places += list(folder.glob("*")) if folder.is_dir() else []
    return max((place.stat().st_mtime for place in places if place.exists()), default=0.0)


def duration(seconds: float | None) -> str:
    """45 s, 3 min 20 s, 2 h 05 min, 3 d 4 h; a dash for the unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def _last(values: list[float]) -> float | None:
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def _median(values: list[float]) -> float | None:
    ordered = sorted(value for value in values if math.isfinite(value))
    return ordered[len(ordered) // 2] if ordered else None
