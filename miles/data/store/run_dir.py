"""The run directory: the only place that knows its paths, and the small files at its top."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from miles.data.store.files import Damaged, Sealed, read_json, schema_kind, seal_json

if TYPE_CHECKING:
    from miles.data.store.epoch import Fence

PLAN_SCHEMA = "miles.plan/1"
PROVENANCE_SCHEMA = "miles.provenance/1"
COMPLETE = "COMPLETE"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML was built with it, takes a tenth of the time
PACKAGES = (
    "miles", "torch", "transformers", "tokenizers", "numpy", "h5py", "numba", "llvmlite", "safetensors", "sglang", "megatron-core", "submitit", "pydantic",
    "math-verify", "sympy", "reasoning-gym",
)  # fmt: skip
ENTRY = {  # of an attempt in provenance.json; lists are of texts
    "tier": str, "why": str, "changed": list, "gpus": list, "import_roots": list, "layout": dict, "versions": dict, "host": str,
}  # fmt: skip
STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class RunDir:
    """Paths of a run. Steps are numbered once through the whole run, warm start included."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def quoted(self) -> str:
        """The folder as a shell takes it: suggested commands are pasted."""
        return shlex.quote(str(self.path))

    def is_at(self, path: str | Path) -> bool:
        """Whether a path that was noted leads here (symbolic links do): of a copy it leads to the original."""
        try:
            return os.path.samefile(path, self.path)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False

    @property
    def run_yaml(self) -> Path:
        return self.path / "run.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    def attempt(self, epoch: int) -> Path:
        """Folder of one attempt: submission text, logs, staging."""
        return self.attempts / f"{epoch:06d}"

    @property
    def latest(self) -> Path:
        return self.path / "latest"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events"

    def event_file(self, component: str, rank: int, epoch: int) -> Path:
        return self.events / f"{component}.{rank}.{epoch}.jsonl"

    @property
    def batches(self) -> Path:
        return self.path / "batches"

    @property
    def journal(self) -> Path:
        return self.batches / "journal"

    def journal_file(self, worker: str | int, epoch: int) -> Path:
        return self.journal / f"{worker}.{epoch}.log"

    def batch(self, step: int) -> Path:
        """Folder of the batch of one step: manifest.json and its shards."""
        return self.batches / step_name(step)

    @property
    def evals(self) -> Path:
        return self.path / "evals"

    def eval(self, step: int) -> Path:
        """Folder of the evaluation after one step: manifest.json and its shards."""
        return self.evals / step_name(step)

    def batch_of(self, kind: str, step: int) -> Path:
        """Folder of a batch of this kind (rollout, sft, eval)."""
        return self.eval(step) if kind == "eval" else self.batch(step)

    @property
    def train_records(self) -> Path:
        return self.path / "train"

    def train(self, step: int) -> Path:
        """Folder of what training saw in one step: one file a node."""
        return self.train_records / step_name(step)

    def profile(self, step: int) -> Path:
        """Folder of the traces of one step: one file a trainer rank."""
        return self.path / "profile" / step_name(step)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    @property
    def hf(self) -> Path:
        """The final export."""
        return self.path / "hf"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def run_id(self) -> str:
        """Name of the run: the name of its folder."""
        return self.path.resolve().name


def step_name(step: int) -> str:
    """step_000012"""
    assert step >= 0, "steps are numbered from 0"
    return f"step_{step:06d}"


def step_of(name: str) -> int | None:
    """12 of step_000012; None for a set-aside or foreign name."""
    match = STEP.fullmatch(name)
    return None if match is None else int(match[1])


def steps_in(folder: Path) -> list[int]:
    """Steps that have a folder here, ascending; set-aside and foreign names are passed over."""
    if not folder.is_dir():
        return []
    found = (step_of(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(step for step in found if step is not None)


def journal_paths(folder: Path) -> list[Path]:
    """Journals of a folder, oldest attempt first, then by worker."""
    found = [path for path in folder.glob("*.log") if path.name.split(".")[-2].isdecimal()]
    return sorted(found, key=lambda path: (int(path.name.split(".")[-2]), path.name))


def newest_complete_checkpoint(run_dir: RunDir) -> int | None:
    """Step of the newest checkpoint that carries COMPLETE (its content is the trainer's to verify); None without any."""
    complete = [step for step in steps_in(run_dir.checkpoints) if (run_dir.checkpoint(step) / COMPLETE).is_file()]
    return complete[-1] if complete else None


def read_run_yaml(run_dir: RunDir) -> dict[str, Any]:
    """The resolved configuration as plain values. Damaged when it is not a YAML mapping."""
    try:
        config = yaml.load(run_dir.run_yaml.read_text(encoding="utf-8"), Loader=LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Damaged(f"{run_dir.run_yaml}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise Damaged(f"{run_dir.run_yaml}: a mapping expected, {type(config).__name__} found")
    return config


def write_plan(run_dir: RunDir, plan: dict[str, Any], fence: Fence | None = None) -> Sealed:
    """Write what was planned."""
    return seal_json(run_dir.plan, {"schema": PLAN_SCHEMA, **plan}, fence)


def read_provenance(run_dir: RunDir) -> dict[str, Any]:
    """provenance.json, or an empty one: {schema, run_id, attempts: [...]}."""
    if not run_dir.provenance.exists():
        return {"schema": PROVENANCE_SCHEMA, "run_id": run_dir.run_id(), "attempts": []}
    return read_provenance_file(run_dir.provenance)


def read_provenance_file(path: Path) -> dict[str, Any]:
    """What read_provenance gives, of a file by any name. Damaged when it is no object with a list of attempts."""
    provenance = read_json(path)
    if not isinstance(provenance, dict):
        raise Damaged(f"{path}: an object expected, {type(provenance).__name__} found")
    schema_kind(provenance.get("schema"), PROVENANCE_SCHEMA, path)
    attempts = provenance.get("attempts")
    if not isinstance(attempts, list) or not all(isinstance(entry, dict) and isinstance(entry.get("epoch"), int) for entry in attempts):
        raise Damaged(f"{path}: attempts: a list of objects with an epoch expected, {attempts!r:.60} found")
    for entry in attempts:
        for name, kind in ENTRY.items():
            if not isinstance(value := entry.get(name), kind | None) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
                raise Damaged(f"{path}: attempt {entry['epoch']}: {name}: a {kind.__name__} expected, {value!r:.60} found")
    return provenance


def record_attempt(run_dir: RunDir, epoch: int, fence: Fence | None = None, **facts: Any) -> dict[str, Any]:
    """Add (or complete) the entry of one attempt: epoch, time, host, versions, and the facts given (tier, layout, GPUs, job).

    One process writes it (the launcher, later rank 0). Returns the entry.
    """
    provenance = read_provenance(run_dir)
    attempts = {entry["epoch"]: entry for entry in provenance["attempts"]}
    entry = {**attempts.get(epoch, {"epoch": epoch, "time": time.time(), **environment()}), **facts}
    attempts[epoch] = entry
    provenance["attempts"] = [attempts[number] for number in sorted(attempts)]
    seal_json(run_dir.provenance, provenance, fence)
    return entry


def environment() -> dict[str, Any]:
    """Host, machine, models of CPU and GPUs, Python and the versions of installed packages that bits may depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed: nothing to record
    return {
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu": _first(Path("/proc/cpuinfo"), "model name") or platform.processor() or None,
        "gpus": [model for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")) if (model := _first(path, "Model"))],
        "python": platform.python_version(),
        "versions": versions,
    }


def _first(path: Path, key: str) -> str | None:
    """Value of the first `key : value` line of a file of the kernel's; None without it."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon and name.strip() == key), None)
