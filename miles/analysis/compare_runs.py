"""Two runs or more side by side: reward, length, mismatch and speed by step, settings and versions that differ, and the first step at which they do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.analysis.contents import ASPECTS, contents
from miles.analysis.rollout_stats import rollout_stats
from miles.analysis.source import find_steps, steps_between
from miles.config.exits import UserError
from miles.data.store.manifest import NAME
from miles.data.store.run_dir import RunDir, steps_in
from miles.report.figures import (
    ACCURACY,
    ENTROPY,
    GRAD_NORM,
    LENGTH,
    LOSS,
    MISMATCH_MAX,
    MISMATCH_MEAN,
    REWARD,
    STEP_SECONDS,
    series_of,
    tokens_per_second,
)
from miles.report.records import RunRecord, read_run

SCHEMA = "miles.comparison/1"
K3 = ("train/train_rollout_kl",)
CURVES = {  # ours -> public names, of rollout steps
    "reward": REWARD, "response_length": LENGTH, "mismatch_abs_diff": MISMATCH_MEAN, "mismatch_max": MISMATCH_MAX, "mismatch_k3": K3, "entropy": ENTROPY, "grad_norm": GRAD_NORM,
    "loss": LOSS,
}  # fmt: skip
NO_RESULT = frozenset({"step", "kind", "time"})
ENVIRONMENT = ("python", "cpu", "gpus", "machine", "threads", "layout", "kernels", "tier")  # of an attempt in provenance.json
Curve = dict[int, float]


@dataclass
class Run:
    """A run as it is compared: curves by step, all metrics by (kind, step), settings, environment."""

    name: str
    path: Path
    curves: dict[str, Curve]
    metrics: dict[tuple[str, int], dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, Any]
    damaged: list[str]


def compare(paths: list[Path], first: int | None = None, last: int | None = None) -> dict[str, Any]:
    """Everything, of steps first to last (inclusive). UserError for fewer than two runs, and where they have no step in common."""
    if len(paths) < 2:
        raise UserError(f"{len(paths)} run given: two are compared, or more")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is given twice; give different run directories")
    runs = [_read(path, name, first, last) for path, name in zip(paths, _names(paths), strict=True)]
    metrics = {name: _side_by_side([run.curves[name] for run in runs]) for name in runs[0].curves}
    present = {name: found for name, found in metrics.items() if found is not None}
    if not present:
        raise UserError(f"nothing to compare: {' and '.join(run.name for run in runs)} have no step with a figure in common")
    return {
        "schema": SCHEMA,
        "runs": [{"name": run.name, "path": str(run.path), "steps": len(run.curves["reward"]), "damaged": run.damaged} for run in runs],
        "metrics": present,
        "first_difference": {"metrics": _first_metric(runs), "batches": _first_batch(paths, first, last)},
        "settings": _differences([run.settings for run in runs]),
        "environment": _differences([run.environment for run in runs]),
    }


def differs(found: dict[str, Any]) -> list[str]:
    """What of compare() says that the runs did not compute the same, in words; empty where they did. Speed and settings are no result."""
    metric, batch = found["first_difference"]["metrics"], found["first_difference"]["batches"]
    said = [f"{metric['first'][0]} at {metric['kind']} step {metric['step']}"] if metric["step"] is not None else []
    said += [f"{ASPECTS[aspect]} at step {step}" for aspect, step in batch["first"].items() if step is not None]
    return said + [f"{count} steps are in one run alone" for count in [metric["alone"]] if count]


def _read(path: Path, name: str, first: int | None, last: int | None) -> Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run directory")
    run = RunDir(path)
    record = read_run(path) if run.run_yaml.is_file() or run.attempts.is_dir() else RunRecord(run)

    def inside(step: int) -> bool:
        return (first is None or step >= first) and (last is None or step <= last)

    lines = [line for line in record.of_kind("rollout") if inside(line["step"])]
    curves: dict[str, Curve] = {ours: _curve(series_of(lines, names)) for ours, names in CURVES.items()}
    curves["accuracy"] = _curve(series_of([line for line in record.of_kind("eval") if inside(line["step"])], ACCURACY))
    curves["tokens_per_second"] = {step: value for step, value in _curve(tokens_per_second(record)).items() if inside(step)}
    curves["step_seconds"] = _curve(series_of(lines, STEP_SECONDS)) or _durations(record, {line["step"] for line in lines})
    if not record.of_kind("rollout"):
        curves |= _of_batches(path, first, last)
    metrics = {(kind, line["step"]): line for kind in ("sft", "rollout", "eval") for line in record.of_kind(kind) if inside(line["step"])}
    attempts = record.provenance.get("attempts") or [{}]
    environment = {key: attempts[-1].get(key) for key in ENVIRONMENT if attempts[-1].get(key) is not None} | {f"version of {key}": value for key, value in (attempts[-1].get("versions") or {}).items()}
    return Run(name, path, curves, metrics, flatten(record.config), environment, record.damaged)


def _of_batches(path: Path, first: int | None, last: int | None) -> dict[str, Curve]:
    """Curves of a run without metrics (an imported one), out of its batches and train records."""
    if not _sealed(path, first, last) and not steps_in(RunDir(path).batches):
        raise UserError(f"{path}: holds neither metrics of rollout steps nor batches; give a run directory")
    rows = rollout_stats(path, first, last)["steps"]
    found = {ours: {row["step"]: row[theirs] for row in rows if row.get(theirs) is not None} for ours, theirs in (("reward", "reward_mean"), ("response_length", "response_mean"))}
    if find_steps(path, first, last)[0]:
        from miles.analysis.analyze import analyze
        from miles.analysis.measure import slices
        from miles.analysis.ranks import Alone

        by_step = slices(analyze(path, Alone(), first, last)).get("step") or []
        found |= {"mismatch_abs_diff": {row["value"]: row["abs_diff"] for row in by_step}, "mismatch_k3": {row["value"]: row["kl_k3"] for row in by_step}}
    return found


def _side_by_side(curves: list[Curve]) -> dict[str, Any] | None:
    """A figure of all runs at the steps that all have; None where there is none. Differences are from the first run."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return None
    rows = [[curve[step] for curve in curves] for step in steps]
    spread = [max(abs(value - row[0]) for value in row[1:]) for row in rows]
    first = next((step for step, size in zip(steps, spread, strict=True) if size > 0), None)
    greatest = max(range(len(steps)), key=lambda place: spread[place])
    return {
        "steps": steps, "values": rows, "mean": [sum(column) / len(steps) for column in zip(*rows, strict=True)], "last": rows[-1],
        "first_difference": first, "greatest_difference": spread[greatest], "greatest_at": steps[greatest],
    }  # fmt: skip


def _first_metric(runs: list[Run]) -> dict[str, Any]:
    """The first step at which a metric other than speed differs in its bits, and which do there; steps that not all runs have."""
    common = set.intersection(*(set(run.metrics) for run in runs))
    order = ("sft", "rollout", "eval")
    for kind, step in sorted(common, key=lambda place: (place[1], order.index(place[0]))):
        lines = [run.metrics[kind, step] for run in runs]
        names = sorted({name for line in lines for name in line if name not in NO_RESULT and not name.startswith("perf/")})
        if wrong := [name for name in names if any(not _same(lines[0].get(name), line.get(name)) for line in lines[1:])]:
            return {"step": step, "kind": kind, "first": wrong, "compared": len(common), "alone": len(set.union(*(set(run.metrics) for run in runs)) - common)}
    return {"step": None, "kind": None, "first": [], "compared": len(common), "alone": len(set.union(*(set(run.metrics) for run in runs)) - common)}


def _first_batch(paths: list[Path], first: int | None, last: int | None) -> dict[str, Any]:
    """Of each aspect of the batches that all runs still have, the first step at which it differs."""
    common = sorted(set.intersection(*(set(_sealed(path, first, last)) for path in paths)))
    found: dict[str, int | None] = dict.fromkeys(ASPECTS)
    for step in common:
        open_aspects = [aspect for aspect, at in found.items() if at is None]
        if not open_aspects:
            break
        seen = [contents(path, step, open_aspects) for path in paths]
        for aspect in open_aspects:
            values = [each[aspect] for each in seen]
            if None not in values and len(set(values)) > 1:
                found[aspect] = step
    return {"compared": len(common), "first": found}


def _sealed(path: Path, first: int | None, last: int | None) -> Iterable[int]:
    """Steps with a batch that is there."""
    run = RunDir(path)
    return [step for step in steps_between(run.batches, first, last) if (run.batch(step) / NAME).is_file()]


def _differences(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keys whose values aren't the same in all runs; None where a run has none."""
    keys = sorted({key for each in runs for key in each})
    return [{"name": key, "values": [each.get(key) for each in runs]} for key in keys if any(each.get(key) != runs[0].get(key) for each in runs[1:])]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted path -> plain value; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= flatten(each, f"{prefix}.{key}" if prefix else str(key))
    return found


def _curve(series: tuple[list[int], list[float]]) -> Curve:
    return {step: value for step, value in zip(*series, strict=True) if math.isfinite(value)}


def _durations(record: RunRecord, steps: set[int]) -> Curve:
    """Seconds of steps out of their phases."""
    return {step: sum(stack.values()) for step, stack in record.phase_seconds.items() if step in steps}


def _same(one: Any, other: Any) -> bool:
    return one == other or (isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other))


def _names(paths: list[Path]) -> list[str]:
    """Short names: those of the folders where they differ, whole paths else."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def shown(value: Any) -> str:
    """A setting in one line."""
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
