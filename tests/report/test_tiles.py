"""The verdict tiles: what each says, and when it warns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from demo_run import begin_attempt, empty_run, record_phases, record_step

from miles.report.records import RunRecord, read_run
from miles.report.summary import summarise
from miles.report.tiles import Tile, config_lines, tiles

LARGEST = "train/train_rollout_logprob_max_abs_diff"
MEAN = "train/train_rollout_logprob_abs_diff"


def tile(record: RunRecord, start: str) -> Tile:
    (found,) = [one for one in tiles(record, summarise(record)) if one.name.startswith(start)]
    return found


def run_with(folder: Path, *lines: tuple[int, str, dict[str, float]]) -> RunRecord:
    run = empty_run(folder)
    epoch = begin_attempt(run)
    for step, kind, metrics in lines:
        record_step(run, epoch, step, kind, 1.8e9 + step, **metrics)
    return read_run(folder)


@pytest.mark.parametrize(
    ("lines", "value", "tone"),
    [
        ([{LARGEST: 0.0, MEAN: 0.0}, {LARGEST: 0.0, MEAN: 0.0}], "exactly 0", "good"),
        ([{LARGEST: 0.0, MEAN: 0.0}, {LARGEST: 1e-300, MEAN: 1e-301}], "1.0e-300", ""),
        ([{LARGEST: 0.2, MEAN: 1e-4}], "0.2", "bad"),
        ([{MEAN: 1e-4}], "1.0e-04", ""),
        ([{LARGEST: 0.0}, {LARGEST: math.nan}], "not finite", "bad"),
        ([{LARGEST: 0.0, "train/mismatch_not_finite": 3.0}], "not finite", "bad"),
        ([{}], "–", ""),
    ],
)
def test_mismatch(tmp_path: Path, lines: list[dict[str, float]], value: str, tone: str) -> None:
    record = run_with(tmp_path / "run", *[(step, "rollout", metrics) for step, metrics in enumerate(lines, 1)])
    found = tile(record, "Mismatch")
    assert (found.value, found.tone) == (value, tone)


def accuracy(value: float, low: float, high: float) -> dict[str, float]:
    return {"eval/accuracy": value, "eval/accuracy_low": low, "eval/accuracy_high": high, "eval/n": 200}


@pytest.mark.parametrize(("last", "tone"), [(accuracy(0.8, 0.74, 0.85), "good"), (accuracy(0.32, 0.26, 0.39), ""), (accuracy(0.1, 0.07, 0.15), "bad")])
def test_accuracy_is_good_or_bad_only_beyond_its_interval(tmp_path: Path, last: dict[str, float], tone: str) -> None:
    record = run_with(tmp_path / "run", (0, "eval", accuracy(0.3, 0.24, 0.37)), (10, "eval", last))
    found = tile(record, "Evaluation")
    assert (found.before, found.value, found.tone) == ("0.300", f"{last['eval/accuracy']:.3f}", tone)
    assert found.note.endswith("n = 200")


def test_a_step_done_again_counts_as_it_was_last(tmp_path: Path) -> None:
    record = run_with(tmp_path / "run", (1, "rollout", {"rollout/raw_reward": 0.1}), (2, "rollout", {"rollout/raw_reward": 0.9}), (2, "rollout", {"rollout/raw_reward": 0.4}))
    found = tile(record, "Mean reward")
    assert (found.before, found.value) == ("0.1", "0.4")


def test_phases_of_a_step_are_those_of_its_last_attempt(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    for seconds in (9.0, 2.0):
        epoch = begin_attempt(run)
        record_phases(run, epoch, 1, 1.8e9 + epoch * 100, {"train": seconds})
    record_phases(run, 1, 2, 1.8e9, {"train": 5.0, "wait": 1.0})
    (run.events / "foreign.jsonl").write_text("{}\n")
    seconds = read_run(run.path).phase_seconds
    assert {step: {phase: round(length, 6) for phase, length in stack.items()} for step, stack in seconds.items()} == {1: {"train": 2.0}, 2: {"train": 5.0, "wait": 1.0}}


def test_phases_from_metrics_where_no_events_are(tmp_path: Path) -> None:
    record = run_with(tmp_path / "run", (1, "rollout", {"perf/train_time": 3.0, "perf/update_weights_time": 0.5}))
    assert record.phase_seconds == {1: {"train": 3.0, "sync": 0.5}}


def test_configuration_in_a_few_lines(tmp_path: Path) -> None:
    lines = dict(config_lines(run_with(tmp_path / "run")))
    assert lines["Rollout"] == "16 prompts × 8 samples"
    assert lines["Steps"] == "12 warm start + 40 rollouts"
    assert lines["Algorithm"] == "grpo"
    assert lines["Device, seed"] == "cpu, 1234"
    assert "Mode" not in lines


def test_a_part_of_a_run_says_which(tmp_path: Path) -> None:
    modes = {"rollout_only": (True, "rollouts alone"), "train_only": ("runs/first", "training alone on runs/first"), "rescore": ("runs/first", "scoring again runs/first")}
    for name, (value, said) in modes.items():
        run = empty_run(tmp_path / name, {"debug": {name: value}})
        assert dict(config_lines(read_run(run.path)))["Mode"] == said
