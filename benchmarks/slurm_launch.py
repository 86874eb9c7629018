"""What miles adds to a job's start: from sbatch to the first line of user code in the last rank, against a hand-written batch script of the same shape.

And from a job's requeue to its first new step, beside the time that the cluster itself takes to start a requeued job. On a private Slurm.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.child import ROOT
from benchmarks.cli_start import installed
from benchmarks.table import Row
from miles.config.compose import load_config
from miles.config.exits import UserError
from miles.config.placement import components, part, processes
from miles.config.schema import RunConfig
from miles.data.store.metrics import read_lines
from miles.data.store.run_dir import RunDir
from miles.slurm.executor import HetSlurmExecutor
from miles.slurm.minicluster import Cluster

STAMPS = Path(__file__).parent / "stamps"
NODES = {"train": 2, "infer": 1, "cpu": 0}
TURNS, REQUEUES = 7, 3
PATIENCE = 240.0
RUN = [
    "recipes/tiny", "warm_start.steps=0", "num_rollout=200", "eval.interval=null", "train.num_nodes=2", "train.num_gpus_per_node=1",
    "cluster.executor=slurm", "cluster.placement=het", "cluster.slurm.lead_seconds=60", "cluster.groups.all.mem=100", "cluster.groups.all.time=30",
    "cluster.groups.train.partition=gb300", "cluster.groups.rollout.partition=h200",
]  # fmt: skip
EACH = "--ntasks-per-node=1 --mem=100 --time=30"
Say = Callable[[str], None]


class Bench:
    """A private cluster, and what is started on it."""

    def __init__(self, cluster: Cluster, folder: Path, say: Say) -> None:
        self.cluster, self.folder, self.say = cluster, folder, say
        self.stamps = folder / "stamps"
        self.environment = {**installed(cluster.env(), folder), "PYTHONPATH": os.pathsep.join([str(STAMPS), str(ROOT)]), "MILES_BENCH_STAMPS": str(self.stamps)}

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not within {PATIENCE:g} s")
            time.sleep(0.02)

    def sbatch(self, script: Path) -> str:
        """Submit; the job's id."""
        return self.cluster.run(["sbatch", "--parsable", str(script)], env=self.environment, cwd=self.folder).stdout.strip()

    def last(self, name: str, count: int, submit: Callable[[], str]) -> float:
        """Seconds from submission until the last of so many processes has stamped; the job is gone afterwards."""
        shutil.rmtree(self.stamps, ignore_errors=True)
        self.stamps.mkdir()
        began = time.time()
        job = submit()
        self.until(lambda: len(list(self.stamps.glob(f"{name}.*"))) >= count, f"{count} first lines of {name}")
        stamps = [float(path.read_text()) for path in self.stamps.glob(f"{name}.*")]
        self.over(job)
        return max(stamps) - began

    def over(self, job: str) -> None:
        """End a job, and wait until its nodes are free."""
        self.cluster.run(["scancel", job], check=False)
        self.until(lambda: set(self.cluster.run(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split()) == {"idle"}, "nodes are free again")
        self.until(lambda: not [each for each in self.cluster.processes() if each.name == "slurmstepd"], "the steps have ended")

    def render(self, name: str) -> tuple[RunDir, Path]:
        """A run directory and its batch script, written but not submitted."""
        run = RunDir(self.folder / name)
        shutil.rmtree(run.path, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "miles.cli", "render", str(run.path), *RUN], check=True, capture_output=True, env=self.environment, cwd=self.folder)
        return run, run.path / "slurm" / "train-rollout.sbatch"

    def script(self, name: str, groups: Mapping[str, str]) -> Path:
        """A batch script as one writes it by hand. groups: {"--partition=… --nodes=…": command of a task}, a group each."""
        blocks = "#SBATCH hetjob\n".join("".join(f"#SBATCH {word}\n" for word in options.split()) for options in groups)
        starts = "".join(f"srun --het-group={number} {command} &\n" for number, command in enumerate(groups.values()))
        path = self.folder / f"{name}.sh"
        path.write_text(f"#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --requeue\n{blocks}{starts}wait\n")
        return path


def by_hand(config: RunConfig) -> dict[str, str]:
    """The groups of a run as one would write them: a task a node, which starts as many processes as the run has there, each with its imports."""
    found = {}
    for component, partition in zip(components(config), ("gb300", "h200"), strict=True):
        nodes = part(config, component).nodes
        everywhere = [process.role for process in processes(config, component, nodes - 1)]
        starts = [f"{sys.executable} -m imports {role} &" for role in everywhere]
        for process in processes(config, component, 0):
            if process.role not in everywhere:  # the service is on the first node alone
                starts.insert(0, f"[ $SLURM_PROCID != 0 ] || {sys.executable} -m imports {process.role} &")
        found[f"--partition={partition} --nodes={nodes} {EACH}"] = f"bash -c '{' '.join(starts)} wait'"
    return found


def ratio(name: str, found: list[float], reference: list[float], what: str) -> Row:
    """The median over turns of the ratio within a turn, but for turn 0: it leaves the compiled modules, as an installed package has them."""
    found, reference = found[1:], reference[1:]
    middle = statistics.median(a / b for a, b in zip(found, reference, strict=True))
    note = f"{statistics.median(found):.2f} s and {statistics.median(reference):.2f} s from sbatch to the first line in the last of {what}"
    return Row(name, middle, 1.2, False, note, {"seconds": found, "by_hand_seconds": reference})


def launch_of_runs(bench: Bench, turns: int) -> Row:
    """A miles run with two trainer ranks on two nodes and an engine on another."""
    found, reference = [], []
    for turn in range(1 + turns):
        run, script = bench.render(f"run_{turn}")
        config = load_config([run.run_yaml])
        found.append(bench.last("trainer", 2, lambda script=script: bench.sbatch(script)))
        hand = bench.script("run_by_hand", by_hand(config))
        reference.append(bench.last("trainer", 2, lambda hand=hand: bench.sbatch(hand)))
        bench.say(f"launch of a run, turn {turn}: {found[-1]:.2f} s, by hand {reference[-1]:.2f} s")
    return ratio("first line of a run's trainer / by hand", found, reference, "2 trainer ranks")


def launch_of_functions(bench: Bench, turns: int) -> Row:
    """A function of a user on two nodes of one kind and one of another."""
    found, reference = [], []
    executor = HetSlurmExecutor(bench.folder / "jobs")
    executor.update_parameters(job_name="bench", time="30", mem="100")
    executor.component("client", nodes=2, partition="gb300")
    executor.component("server", partition="h200")
    command = f"{sys.executable} -c 'import payload; payload.first_line()'"
    hand = bench.script("functions_by_hand", {f"--partition=gb300 --nodes=2 {EACH}": command, f"--partition=h200 --nodes=1 {EACH}": command})
    with environment(bench.environment):
        for turn in range(1 + turns):
            found.append(bench.last("payload", 3, lambda: executor.submit_components({name: ("payload.first_line",) for name in ("client", "server")}).job_id))
            reference.append(bench.last("payload", 3, lambda: bench.sbatch(hand)))
            bench.say(f"launch of functions, turn {turn}: {found[-1]:.2f} s, by hand {reference[-1]:.2f} s")
    return ratio("first line of functions under the executor / by hand", found, reference, "3 tasks")


def requeue(bench: Bench, turns: int) -> Row:
    """A run that is requeued while it works: seconds to the end of its first new step, and what the cluster takes to start a job again that does nothing."""
    new_step, delays = [], []
    hand = bench.script("requeued_by_hand", {f"--partition=gb300 --nodes=2 {EACH}": "sleep 600", f"--partition=h200 --nodes=1 {EACH}": "sleep 600"})
    hand.write_text(hand.read_text().replace("srun", f"date +%s.%N > {bench.stamps}/batch.$SLURM_RESTART_COUNT\nsrun", 1))
    for turn in range(turns):
        run, script = bench.render(f"requeued_{turn}")
        job = bench.sbatch(script)
        bench.until(lambda run=run: steps(run, 1) >= 2, "two steps")
        began = time.time()
        bench.cluster.run(["scontrol", "requeue", job])
        bench.until(lambda run=run: steps(run, 2) >= 1, "a new step")
        new_step.append(time.time() - began)
        bench.over(job)
        shutil.rmtree(bench.stamps, ignore_errors=True)
        bench.stamps.mkdir()
        job = bench.sbatch(hand)
        bench.until(lambda: list(bench.stamps.glob("batch.*")), "the hand-written job's start")
        began = time.time()
        bench.cluster.run(["scontrol", "requeue", job])
        again = bench.stamps / "batch.1"
        bench.until(lambda again=again: again.exists() and again.read_text().strip(), "its second start")
        delays.append(float(again.read_text()) - began)
        bench.over(job)
        bench.say(f"requeue, turn {turn + 1}: first new step after {new_step[-1]:.1f} s; a job that does nothing starts again after {delays[-1]:.1f} s")
    own = statistics.median(a - b for a, b in zip(new_step, delays, strict=True))
    note = f"first new step after {statistics.median(new_step):.1f} s; the cluster takes {statistics.median(delays):.1f} s to start a job again, so {own:.1f} s are the run's own (it saves, starts, meets)"
    return Row("a requeued run's first new step / the cluster's own delay", statistics.median(a / b for a, b in zip(new_step, delays, strict=True)), note=note, found={"seconds": new_step, "cluster_seconds": delays})


def steps(run: RunDir, epoch: int) -> int:
    """Steps that an attempt has trained on."""
    return sum(event["phase"] == "train" for event in read_lines(run.event_file("trainer", 0, epoch)))


@contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """This process's, for what is submitted from within it."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(say: Say, quick: bool = False) -> list[Row]:
    """Three rows; none, and a line that says why, where no private Slurm can be had."""
    folder = Path(tempfile.mkdtemp(prefix="miles-bench-", dir="/tmp"))
    try:
        with Cluster(folder / "slurm", nodes=NODES) as cluster:
            bench = Bench(cluster, folder, say)
            turns = 1 if quick else TURNS
            return [launch_of_runs(bench, turns), launch_of_functions(bench, turns), requeue(bench, 1 if quick else REQUEUES)]
    except UserError as error:
        say(f"launching under Slurm is not measured: {error}")
        return []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
