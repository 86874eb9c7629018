"""Complete runs of the tiny recipe through the command line, and what to compare of two runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import open_shard
from miles.data.store.train_record import open_train_record

# Long enough that something can be killed in every phase, short enough for a test. Hardly anybody is rewarded in so few steps: without
# the entropy bonus most rollouts would move no weight, and equal bits would say little.
STEPS = ["recipes/tiny", "num_rollout=6", "warm_start.steps=2", "checkpoint.save_interval=2", "eval.interval=3", "algorithm.entropy_coef=0.01"]
# With what a run may have besides: several optimizer steps on a rollout, and a reference that is made in the middle.
TWO_RANKS = [*STEPS, "train.num_gpus_per_node=2", "train.num_steps_per_rollout=2", "algorithm.use_kl_loss=true", "algorithm.kl_loss_coef=0.05"]
# The same world on two nodes, each with an engine and a worker of its own.
TWO_NODES = [*(word for word in TWO_RANKS if "gpus_per_node" not in word), "train.num_nodes=2", "rollout.num_gpus=2"]
PATIENCE = 480.0
STUCK = str(Path(__file__).parent / "stuck")  # for PYTHONPATH: sitecustomize.py there says what it does


class Launched:
    """A `miles-submit run` in the background."""

    def __init__(self, run_dir: Path, *words: str) -> None:
        self.run_dir = run_dir
        self.output = run_dir.with_name(run_dir.name + ".out")
        self.file = self.output.open("ab")
        command = [sys.executable, "-m", "miles.cli", "run", *(words or STEPS), "--run-dir", str(run_dir)]
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.STDOUT, start_new_session=True)

    def text(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        """Exit code; a run that hangs is a failure with its logs."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the run hangs\n{self.text()}\n{logs(self.run_dir)}") from None
        finally:
            self.file.close()

    def end(self) -> None:
        """End the launcher and everything of this run."""
        for process in psutil.process_iter():
            if belongs(process, self.run_dir):
                process.kill()
        self.process.kill()
        self.process.wait()

    def until(self, condition: Any, what: str) -> None:
        """Wait for a condition while the run goes on."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{what}: did not happen\n{self.text()}\n{logs(self.run_dir)}")
            time.sleep(0.01)

    def role(self, role: str, rank: int = 0) -> psutil.Process:
        """One role process of this run."""
        (found,) = [p for p in psutil.process_iter() if belongs(p, self.run_dir, role, rank)]
        return found

    def kill_role(self, role: str, rank: int = 0) -> None:
        """kill -9 of one role process of this run."""
        os.kill(self.role(role, rank).pid, signal.SIGKILL)

    def kill_supervisor(self, role: str, rank: int = 0) -> None:
        """kill -9 of the supervisor of a role process: all roles of its node die with it."""
        os.kill(self.role(role, rank).ppid(), signal.SIGKILL)


def belongs(process: psutil.Process, run_dir: Path, role: str | None = None, rank: int = 0) -> bool:
    """Whether a process is a role of this run."""
    try:
        env = process.environ()
        if env.get("MILES_RUN_DIR") != str(run_dir):
            return False
        return role is None or (f"miles.run.{role}" in process.cmdline() and env["MILES_RANK"] == str(rank))
    except psutil.Error:
        return False


def status(run_dir: Path) -> dict[str, Any]:
    """What the service of the newest attempt says; empty while it is not there."""
    attempt = (run_dir / "latest").resolve()
    try:
        url = json.loads((attempt / "service.json").read_text())["url"]
        headers = {"Authorization": f"Bearer {(attempt / 'token').read_text()}"}
        return dict(httpx.get(url + "/status", headers=headers, timeout=2.0, trust_env=False).json())
    except (OSError, ValueError, httpx.HTTPError):
        return {}


def run(run_dir: Path, *words: str) -> str:
    """A run to its good end; its output."""
    launched = Launched(run_dir, *words)
    code = launched.wait()
    assert code == 0, f"exit code {code}\n{launched.text()}\n{logs(run_dir)}"
    return launched.text()


def logs(run_dir: Path) -> str:
    """Ends of all logs."""
    return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in sorted(run_dir.glob("attempts/*/logs/*")))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics without what may differ between two runs of the same bits."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key != "time" and not key.startswith("perf/")} for line in lines]


def trained(run_dir: Path) -> int:
    """Steps that metrics tell of."""
    return max((line["step"] for line in metrics(run_dir)), default=0)


def batches(run_dir: Path) -> dict[str, list[Any]]:
    """Every batch and evaluation: all samples by (draw, sample), bit for bit."""
    found = {}
    for folder in [*sorted(RunDir(run_dir).batches.glob("step_*")), *sorted(RunDir(run_dir).evals.glob("step_*"))]:
        manifest = read_manifest(folder)
        rows = []
        for entry in manifest.shards:
            with open_shard(folder / entry.name) as shard:
                for sample in shard.samples():
                    arrays = [np.asarray(a).tobytes() for a in (sample.token_id, sample.rollout_logprob, sample.loss_mask, sample.flags & ~np.uint8(32))]
                    rows.append((sample.draw, sample.sample, sample.seed, int(sample.status), np.float32(sample.reward).tobytes(), *arrays))
        found[f"{folder.parent.name}/{folder.name}"] = sorted(rows, key=lambda row: row[:2])
    return found


def train_records(run_dir: Path) -> dict[str, dict[str, bytes]]:
    """What training saw: every array of every record, bit for bit."""
    found = {}
    for path in sorted(RunDir(run_dir).train_records.glob("step_*/*.h5")):
        with open_train_record(path) as record:
            rows = record.sequences()
            tokens = record.tokens(0, len(rows["row"]), record.names)
        found[f"{path.parent.name}/{path.name}"] = {name: array.tobytes() for name, array in (rows | tokens).items()}
    return found


def weights(run_dir: Path) -> bytes:
    """The exported weights."""
    return (run_dir / "hf" / "model.safetensors").read_bytes()


def same_run(one: Path, other: Path) -> None:
    """Assert the bits of the exact tier: weights, batches, metrics outside perf/."""
    assert batches(one) == batches(other)
    assert metrics(one) == metrics(other)
    assert weights(one) == weights(other)
