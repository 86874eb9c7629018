"""What the fault tests share: the run they disturb, its processes, and what must be true of it afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from miles.data.store.epoch import newest_epoch
from miles.data.store.journal import read_journal
from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir, journal_paths, steps_in

WARM_STEPS, STEPS = 2, 10
BATCH = 4  # of recipes/tiny: groups
SAMPLES = {"rollout": 4, "eval": 1}  # of a group
TAKEN = 16 + 16 // 2  # samples that a worker has taken and not finished, at most: half as many wait as it has places
SUMMARIES = Path(__file__).parents[2] / "runs" / "faults"
now = time.monotonic


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to, and how long it took."""

    folder: Path
    seconds: float


def words(ranks: int = 1) -> list[str]:
    """The recipe: ten steps with a warm start, evaluations and checkpoints.

    Samples of so small a model are hardly ever rewarded; the entropy bonus makes every step move the weights.
    """
    return [
        "recipes/tiny", f"warm_start.steps={WARM_STEPS}", f"num_rollout={STEPS - WARM_STEPS}", "checkpoint.save_interval=2", "eval.interval=3",
        "rollout.generate_path=counted.generate", "cluster.restarts=1000", "algorithm.entropy_coef=0.01",
        f"train.num_gpus_per_node={ranks}",
    ]  # fmt: skip


@contextlib.contextmanager
def environment(generated: Path) -> Iterator[None]:
    """Processes started in here find counted.py, and it its folder."""
    generated.mkdir(exist_ok=True)
    added = {"FAULTS_GENERATED": str(generated), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def say(line: str) -> None:
    """Progress, also where pytest captures."""
    print(line, file=sys.__stderr__, flush=True)


def summary(name: str, value: dict[str, Any]) -> None:
    """Leave figures below runs/, which is not tracked."""
    SUMMARIES.mkdir(parents=True, exist_ok=True)
    (SUMMARIES / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")


# Processes.


def family(launcher: psutil.Process) -> dict[str, list[psutil.Process]]:
    """Living processes below a launcher (itself under "launcher") by role; trainers as "trainer 0", "trainer 1", reward processes as "others"."""
    found: dict[str, list[psutil.Process]] = {"launcher": [launcher], "supervisors": []}
    for process in launcher.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            role = next((word.removeprefix("miles.run.") for word in command if word.startswith("miles.run.")), None)
            if role == "trainer":
                role = f"trainer {process.environ()['MILES_RANK']}"
            if role is None and process.status() == psutil.STATUS_ZOMBIE:
                continue
            found.setdefault(role or ("supervisors" if any("submitit" in word for word in command) else "others"), []).append(process)
    return found


# What must be true afterwards.


def no_draw_lost_or_used_twice(run_dir: Path, warm: int = WARM_STEPS, steps: int = STEPS) -> None:
    """Draws of all rollout batches: consecutive, each in one batch or dropped on record. warm, steps: of the run."""
    folder, following = RunDir(run_dir), 0
    assert steps_in(folder.batches) == list(range(1, steps + 1))
    for step in range(warm + 1, steps + 1):
        manifest = read_manifest(folder.batch(step))
        consumed = sorted([*manifest.draws, *(each.draw for each in manifest.dropped)])
        assert consumed == list(range(following, manifest.next_draw)), f"step {step}: draws {consumed}, {following} to {manifest.next_draw} expected"
        assert len(manifest.draws) == BATCH
        following = manifest.next_draw


Key = tuple[str, int, int]  # kind, weight version, draw


class Journals:
    """Hard links to every journal of a run, since a resumed run deletes those that it no longer needs."""

    def __init__(self, run_dir: Path, folder: Path) -> None:
        self.source, self.folder = RunDir(run_dir).journal, folder
        folder.mkdir()

    def look(self) -> None:
        for path in self.source.glob("*.log"):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(path, self.folder / path.name)

    def groups(self) -> dict[int, list[tuple[Key, str]]]:
        """By attempt: (kind, weight version, draw) and checksum of the weights of every record."""
        found: dict[int, list[tuple[Key, str]]] = {}
        for path in journal_paths(self.folder):
            records = [((c["kind"], c["weight_version"], group[0].draw), c["weight_checksum"]) for c, group in read_journal(path)]
            found.setdefault(int(path.name.split(".")[-2]), []).extend(records)
        return found


def generated_groups(folder: Path) -> dict[int, set[Key]]:
    """By attempt: groups of which a sample was begun."""
    found = {}
    for path in folder.iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[int(path.name)] = {(kind, version, draw) for kind, version, draw, _ in lines}
    return found


def repeats(generated: dict[int, set[Key]], journalled: dict[int, list[tuple[Key, str]]]) -> dict[str, int]:
    """Assert that nothing journalled was made again, and no attempt left more unfinished than a worker takes.

    Returns the groups generated, those generated again, and those in flight at the ends of attempts (in all, and the most samples of one).
    """
    records = Counter(record for records in journalled.values() for record in records)
    assert max(records.values(), default=1) == 1, f"journalled more than once: {[record for record, n in records.items() if n > 1]}"
    done: set[Key] = set()
    begun: set[Key] = set()
    again, in_flight = 0, []
    for epoch in sorted(generated.keys() | journalled.keys()):
        own = generated.get(epoch, set())
        assert not own & done, f"attempt {epoch} generated again what was in the journal: {sorted(own & done)}"
        again += len(own & begun)
        begun |= own
        done |= {key for key, _ in journalled.get(epoch, [])}
        in_flight.append(own - done)
    groups = sum(len(keys) for keys in in_flight)
    most = max(sum(SAMPLES[kind] for kind, _, _ in keys) for keys in in_flight)
    assert again <= groups
    assert most <= TAKEN, f"{most} samples were in flight; a worker takes {TAKEN}"
    return {"generated": len(begun) + again, "again": again, "in_flight": groups, "most_samples": most}


def newest(run_dir: Path) -> int:
    """Newest attempt, 0 before the first."""
    return newest_epoch(RunDir(run_dir))


