"""A sweep: one recipe, several values of some keys, a run directory for each combination, submitted as one array where that can be."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.config.placement import node_groups
from miles.config.schema import RunConfig
from miles.data.store.files import read_json, seal_bytes, seal_json
from miles.data.store.run_dir import RunDir
from miles.slurm import queue, records
from miles.slurm.all_or_none import SUBMIT_SECONDS, AllOrNone
from miles.slurm.command import slurm_command
from miles.slurm.own_jobs import is_array
from miles.slurm.records import left_out
from miles.slurm.script import script
from miles.slurm.submission import Submission, batch_python, prepare, submit, without

TASK = "miles.slurm.sweep_task"
FILE = "sweep.json"
SCRIPT = "array.sbatch"
MOST = 1000


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its name (and folder in the sweep's), and the overrides that make it."""

    name: str
    words: tuple[str, ...]


def members(words: Sequence[str]) -> tuple[list[str], list[Member]]:
    """(words that all runs share, every combination of the others). `key=a,b` has two values; commas in brackets, braces or quotes divide nothing.

    UserError: nothing to vary, a value twice, or too many.
    """
    shared, varied = [], []
    for word in words:
        key, equals, text = word.partition("=")
        values = split(text) if equals and re.fullmatch(r"[A-Za-z_][\w.]*", key) else []
        if len(values) > 1:
            varied.append((key, values))
        else:
            shared.append(word)
    if not varied:
        raise UserError("sweep: nothing varies; give a key several values with commas, such as train.optimizer.lr=1e-4,3e-4")
    for key, values in varied:
        if len(set(values)) < len(values) or "" in values:
            raise UserError(f"sweep: {key}: a value is given twice, or is empty; give each once")
    if len({key for key, _ in varied}) < len(varied):
        raise UserError("sweep: a key is given twice; put all its values into one word")
    found = []
    for chosen in itertools.product(*([(key, value) for value in values] for key, values in varied)):
        found.append(Member("_".join(f"{_short(key, varied)}={_plain(value)}" for key, value in chosen), tuple(f"{key}={value}" for key, value in chosen)))
    if len(found) > MOST:
        raise UserError(f"sweep: {len(found)} runs are more than {MOST}; vary less at a time")
    if len({member.name for member in found}) < len(found):
        found = [Member(f"{number:03d}_{member.name}"[:200], member.words) for number, member in enumerate(found)]
    return shared, found


def split(text: str) -> list[str]:
    """Parts between commas that stand outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _short(key: str, varied: Sequence[tuple[str, list[str]]]) -> str:
    """The last word of a key, or all of it where two end alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other, _ in varied) == 1 else key


def _plain(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value.rpartition("/")[2] or value).strip("-")[:60]


def one_array(configs: Sequence[RunConfig]) -> bool:
    """Whether one array can hold all runs: each is one job of one group, asks for the same, and goes on by being requeued (or not at all)."""
    first = configs[0]
    alike = all(config.cluster == first.cluster and node_groups(config) == node_groups(first) for config in configs)
    return alike and len(node_groups(first)) == 1 and first.cluster.slurm.requeue != "chain"


def submit_array(jobs: AllOrNone, folder: Path, runs: Sequence[RunDir], configs: Sequence[RunConfig], most: int | None) -> int:
    """Submit one array of all runs; returns its job id. Task i writes into the directory of run i, its job.json, too. UserError: refused."""
    config, group = configs[0], node_groups(configs[0])[0]
    job = config.cluster.slurm.model_copy(update={"job_name": config.cluster.slurm.job_name or config.name})
    group = without(group, left_out(runs[0], config))
    # The last task to start keeps the array's own id, by which Slurm's commands mean the whole array: one more that does nothing takes it.
    tasks = f"0-{len(runs)}" + (f"%{most}" if most else "")
    group = replace(group, ask=group.ask.model_copy(update={"sbatch": {**group.ask.sbatch, "array": tasks}}))
    output = Path(str(folder).replace("%", "%%")) / "array.%A_%a.log"
    words = [batch_python(config, group), "-m", TASK, str(folder)]
    whole = script(job, config.name, [group], words, output, device=config.cluster.device)
    path = folder / SCRIPT
    seal_bytes(path, whole.encode())
    for run in runs:
        records.folder(run).mkdir(exist_ok=True)
        records.begin_chain(run)
    return jobs.sbatch(["sbatch", "--parsable", str(path)])


def submit_each(jobs: AllOrNone, runs: Sequence[RunDir], configs: Sequence[RunConfig], most: int | None) -> list[list[int]]:
    """Submit every run's own jobs; returns their ids. At most `most` runs at a time: each waits for the end of the one so far before it."""
    ids: list[list[int]] = []
    for number, (run, config) in enumerate(zip(runs, configs, strict=True)):
        jobs.heed()
        before = ids[number - most] if most and number >= most else []
        ids.append(_submit_after(run, prepare(config, run), before))
        jobs.jobs += ids[-1]
    return ids


def _submit_after(run: RunDir, submissions: list[Submission], before: list[int]) -> list[int]:
    """submission.submit with a dependency on the ends of other jobs."""
    if not before:
        return [entry["job_id"] for entry in submit(run, submissions)]
    ends = "afterany:" + ":".join(map(str, before))
    held = []
    for each in submissions:
        own = next((word.partition("=")[2] for word in each.arguments if word.startswith("--dependency=")), "")
        rest = tuple(word for word in each.arguments if not word.startswith("--dependency="))
        held.append(Submission(each.name, each.groups, each.script, (*rest, f"--dependency={','.join(filter(None, [own, ends]))}")))
    return [entry["job_id"] for entry in submit(run, held)]


def cancel_waiting(folder: Path, array: int, runs: int) -> int:
    """Cancel the tasks of an array that have not begun; returns how many runs that were (one task more is none, see submit_array)."""
    if not is_array(folder, array):
        return 0
    queued = slurm_command(["squeue", "--noheader", "--array", "--states=PENDING", f"--jobs={array}", "--format=%F_%K"], check=False).stdout.split()
    if queued:
        slurm_command(["scancel", *queued], timeout=SUBMIT_SECONDS)
    return sum(int(entry.rpartition("_")[2]) < runs for entry in queued)


def write_record(folder: Path, runs: Sequence[RunDir], found: Sequence[Member], array: int | None, ids: Sequence[Sequence[int]]) -> None:
    """sweep.json: what the sweep is, for status and for the array's tasks."""
    entries = [{"name": member.name, "run_dir": str(run.path), "words": list(member.words), "jobs": list(ids[number]) if ids else []} for number, (member, run) in enumerate(zip(found, runs, strict=True))]
    seal_json(folder / FILE, {"runs": entries, "array": array, "time": time.time()})


def read_record(folder: Path) -> dict[str, Any]:
    """sweep.json. An array that was submitted by a command which was killed before it could note that is found again. UserError: there is none."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: no sweep (no {FILE})")
    record = dict(read_json(folder / FILE))
    if not noted(record) and (folder / SCRIPT).exists() and (array := next((job for job, log in queue.arrays() if Path(log).parent == folder.absolute()), None)):
        record["array"] = array
        seal_json(folder / FILE, record)
    return record


def noted(record: dict[str, Any]) -> bool:
    """Whether sweep.json says what was submitted; a command that is killed while it submits leaves one that doesn't."""
    return record["array"] is not None or any(entry["jobs"] for entry in record["runs"])

