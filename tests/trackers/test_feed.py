"""Trackers get every number once, whatever is told again, and can do no harm. The packages are not needed by miles: where they are, the real thing is read back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from miles.config.compose import dump_config, load_config
from miles.config.schema import RunConfig
from miles.data.store.metrics import append_line
from miles.data.store.run_dir import RunDir
from miles.slurm.tracked import tracked
from miles.trackers import feed as feeding
from miles.trackers.feed import Feed
from miles.trackers.sinks import Numbers

LOSS = {1: 0.5, 2: 0.25, 3: 0.125}


def line(run: RunDir, step: int, kind: str = "rollout", **more: object) -> None:
    append_line(run.metrics, {"step": step, "kind": kind, "time": 1000.0 + step, "train/loss": LOSS[step], "note": "text", **more})


def run_with(tmp_path: Path, *overrides: str) -> tuple[RunDir, RunConfig]:
    run, config = RunDir(tmp_path / "run"), load_config(["recipes/tiny"], list(overrides))
    run.path.mkdir()
    run.run_yaml.write_text(dump_config(config))
    return run, config


class Lines:
    """A tracker that is a file of lines."""

    identity: str | None = None

    def __init__(self, run: RunDir, config: RunConfig, identity: str | None) -> None:
        self.identity, self.file = identity or "first", run.path / "sent.jsonl"

    def log(self, numbers: Numbers, step: int, time: float) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps([step, dict(numbers)]) + "\n")

    def close(self) -> None: ...


class Broken(Lines):
    """One that fails at its second step."""

    def log(self, numbers: Numbers, step: int, time: float) -> None:
        if step > 1:
            raise ConnectionError("no route\nto host")
        super().log(numbers, step, time)


def sent(run: RunDir) -> list[list[object]]:
    return [json.loads(line) for line in (run.path / "sent.jsonl").read_text().splitlines()]


def test_a_step_is_sent_once_though_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume cuts metrics.jsonl back to its checkpoint and tells steps 2 and 3 again: another feed, the same identity, no second point."""
    monkeypatch.setattr(feeding, "SINKS", {"tensorboard": Lines})
    run, config = run_with(tmp_path, "trackers.tensorboard=true")
    first = Feed(run, config)
    first.open()
    line(run, 1)
    line(run, 1, "eval")
    first.send()
    line(run, 2)
    first.send()
    run.metrics.write_text(run.metrics.read_text().splitlines()[0] + "\n")
    line(run, 2)
    line(run, 3, infinite=float("inf"), flag=True)
    second = Feed(run, config)
    second.open()
    second.send()
    assert second.sinks["tensorboard"].identity == "first"
    assert sent(run) == [[1, {"train/loss": 0.5}], [1, {"train/loss": 0.5}], [2, {"train/loss": 0.25}], [3, {"train/loss": 0.125}]]


def test_one_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(feeding, "SINKS", {"tensorboard": Broken, "wandb": Lines})
    run, config = run_with(tmp_path, "trackers.tensorboard=true", "trackers.wandb=true")
    feed = Feed(run, config)
    feed.open()
    for step in LOSS:
        line(run, step)
        feed.send()
    feed.close()
    assert capsys.readouterr().out == "tracker tensorboard: no route to host; nothing more is sent to it, metrics.jsonl has everything\n"
    assert [step for step, _ in sent(run)] == [1, 1, 2, 3]


def test_a_package_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    """Beside a launcher: its process says so in one line, and ends when the launcher does."""
    run, config = run_with(tmp_path, "trackers.wandb=true")
    (tmp_path / "wandb.py").write_text("raise ImportError('not in this environment')")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        with tracked(run, config, said.append):
            deadline = time.monotonic() + 60
            while not said and time.monotonic() < deadline:
                time.sleep(0.05)
    assert said == ["warning: tracker wandb: not in this environment; nothing more is sent to it, metrics.jsonl has everything"]


def feed_process(run: RunDir, steps: list[int], job: str, restart: str) -> None:
    """A feed as a launcher starts it; signals of the job are not its affair."""
    environment = {**os.environ, "SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart, "WANDB_SILENT": "true"}
    process = subprocess.Popen([sys.executable, "-m", "miles.trackers.feed", str(run.path)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (run.path / "trackers.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for step in steps:
        line(run, step)
    if restart == "0":
        process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].count("tracker ") == 0
    assert process.returncode == 0


def told_twice(run: RunDir) -> None:
    """Two feeds over a run that was requeued, whose second step is told again."""
    feed_process(run, [1, 2], "45", "0")
    run.metrics.write_text(run.metrics.read_text().splitlines()[0] + "\n")
    feed_process(run, [2, 3], "45", "1")


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, _ = run_with(tmp_path, "trackers.tensorboard=true")
    told_twice(run)
    found = []
    for file in sorted((run.path / "tensorboard").iterdir()):
        assert ".45." in file.name
        events = reader.EventAccumulator(str(file)).Reload()
        found += [(event.step, event.value, event.wall_time) for event in events.Scalars("train/loss")]
        assert events.Tensors("slurm_job_id/text_summary" if "slurm_job_id/text_summary" in events.Tags()["tensors"] else "slurm_job_id")[0].tensor_proto.string_val == [b"45"]
    assert found == [(step, loss, 1000.0 + step) for step, loss in LOSS.items()]


def test_mlflow_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the databases are in mlflow itself, not in mlflow-skinny
    uri = str(tmp_path / "mlruns")
    client = tracking.MlflowClient(tracking_uri=uri)
    run, config = run_with(tmp_path, "trackers.mlflow=true", f"trackers.mlflow_uri={uri}")
    told_twice(run)
    identity = json.loads((run.path / "trackers.json").read_text())["mlflow"]["identity"]
    assert [(metric.step, metric.value) for metric in client.get_metric_history(identity, "train/loss")] == list(LOSS.items())
    there = client.get_run(identity)
    assert (there.data.tags["slurm_job_id"], there.data.tags["slurm_restart_count"], there.info.status, there.info.run_name) == ("45", "1", "FINISHED", config.name)


def test_wandb_offline_reads_it_back(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run, _ = run_with(tmp_path, "trackers.wandb=true", "trackers.wandb_mode=offline")
    told_twice(run)
    files = sorted((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    identity = json.loads((run.path / "trackers.json").read_text())["wandb"]["identity"]
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    records = [record for file in files for record in records_of(file)]
    history = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item} for record in records if record.HasField("history")]
    assert [(items["_step"], items["train/loss"]) for items in history] == list(LOSS.items())
    assert {tag for record in records if record.HasField("run") for tag in record.run.tags} == {"slurm-45"}


def records_of(file: Path) -> list[Any]:
    """Records of a .wandb file: a 7-byte header, then LevelDB's log of 32 KiB blocks (u32 checksum, u16 length, u8 type; parts 2, 3, 4 make one)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found
