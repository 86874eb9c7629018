"""The Slurm executor inside an allocation: one `srun` a component, one task a node, ranks counted within the component.

The interface is that of miles.slurm.local: submit, running, outcome, terminate, kill. Folders and files are submitit's, keyed by the
leader's job id, which is SLURM_JOB_ID in every group.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.config.exits import AGAIN, WRONG, UserError, first_cause
from miles.slurm.command import OF_PROCESSES
from miles.slurm.hostlist import expand
from miles.slurm.options import Options, arguments, srun_options
from miles.slurm.patience import patiently
from miles.slurm.script import ENVIRONMENT_FD, FAILED_SETUP, setup_lines
from miles.slurm.step import LOOPBACK, delayed

if TYPE_CHECKING:
    from miles.config.schema import RunConfig

SETTLE_SECONDS = 1.0  # one failure brings others: how long to listen before the rest is stopped
GRACE_SECONDS = 20.0  # for a supervisor to stop its roles
RESULT_SECONDS = 5.0  # a shared file system may show a file later than it was written
GONE_SECONDS = 40.0  # srun waits for tasks that it killed
# Of Slurm's variables only those that say which job this is: srun takes its options from many of the others.
KEPT = re.compile(r"SLURM_(CONF|JWT|JOB_ID|JOBID|JOB_NAME|JOB_NODELIST|JOB_NUM_NODES|HET_SIZE|\w+_HET_GROUP_\d+|SUBMIT_\w+|RESTART_COUNT|CLUSTER_NAME|WORKING_CLUSTER)$")
DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")
SAID = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
ENDED = re.compile(r"Node failure on \S+|(STEP|JOB) \S+ ON \S+ CANCELLED .*?(?= \*\*\*|$)")
# What will be said again, however often it is tried.
HOPELESS = ("unrecognized option", "invalid option", "Requested node configuration is not available", "Memory required by task is not available", "More processors requested", "Invalid generic resource")


@dataclass(frozen=True)
class Step:
    """Where a component's processes run: `nodes` nodes of a group from first_node on (het_group None: the job has one group), and how."""

    het_group: int | None
    first_node: int
    nodes: int
    tasks_per_node: int = 1
    options: Options = field(default_factory=dict)
    python: tuple[str, ...] = (sys.executable,)
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    architecture: str | None = None


def steps(config: RunConfig, run_dir: Path) -> dict[str, Step]:
    """The step of every component of a run, by name; het groups are counted as they stand in the job."""
    from miles.config.placement import node_groups, parts

    groups = {group.name: (number, group) for number, group in enumerate(node_groups(config))}
    het = config.cluster.placement == "het" and len(groups) > 1
    found = {}
    for part in parts(config):
        number, group = groups[part.group]
        ask = group.ask
        found[part.component] = Step(
            het_group=number if het else None,
            first_node=part.first_node,
            nodes=part.nodes,
            options=srun_options(group, config.cluster.device, mounts=(f"{run_dir}:{run_dir}",)),
            python=(ask.python or sys.executable,),
            setup=tuple(ask.setup),
            environment=ask.environment,
            architecture=ask.architecture,
        )
    return found


def srun(step: Step, name: str, log: Path, command: Sequence[str], merged: bool = True) -> list[str]:
    """The srun that runs command in every task. Steps share the allocation, and leave it free for an srun inside of a task.

    Each task writes to LOG_RANK_log.out and .err; merged: all to the former.
    """
    kinds = ("out",) if merged else ("out", "err")
    # %n, a node's number, is the rank where a node has one task. Slurm 24.11 counts %t from -1 in heterogeneous jobs: several tasks open their own.
    alone = step.tasks_per_node == 1
    files = {option: f"{str(log).replace('%', '%%')}_%n_log.{kind}" for option, kind in zip(("output", "error"), kinds, strict=False)}
    wanted: Options = {
        **({} if step.het_group is None else {"het-group": step.het_group}),
        "nodes": step.nodes,
        "ntasks": step.nodes * step.tasks_per_node,
        "ntasks-per-node": step.tasks_per_node,
        "relative": step.first_node,
        "job-name": name,
        "overlap": None,
        "mem": 0,
        "mpi": "none",
        "cpu-bind": "none",  # the task is a supervisor of many processes
        "kill-on-bad-exit": 0,  # the others shall stop their roles and say how they ended
        "wait": 0,
        "unbuffered": None,
        "input": "none",
        **(files if alone else {}),
        "open-mode": "append",
    }
    begin = f"miles_log={shlex.quote(str(log))}_${{SLURM_PROCID}}_log; exec " + ('>>"$miles_log.out" 2>&1' if merged else '>>"$miles_log.out" 2>>"$miles_log.err"')
    lines = [*([] if alone else [begin]), *setup_lines(step.setup)]
    inner = ["bash", "-c", "\n".join((*lines, 'exec "$@"')), name, *command] if lines else list(command)
    return ["srun", *arguments({**wanted, **step.options}), *inner]


def batch_environment() -> dict[str, str]:
    """The environment that steps start from: what sbatch brought along, without what the first group set up for itself."""
    given = dict(os.environ)
    if "MILES_ENVIRONMENT_FD" in given:
        given = _before_setup()
    kept = {key: value for key, value in given.items() if not key.startswith("SLURM_") or KEPT.match(key)}
    return {key: value for key, value in kept.items() if key not in DEVICES and key not in OF_PROCESSES and not key.startswith(("PMI_", "PMIX_"))}


_READ: dict[str, str] = {}


def _before_setup() -> dict[str, str]:
    """What the batch script saw before the first group's setup (miles.slurm.script); a pipe, so it is read once."""
    if not _READ:
        with os.fdopen(ENVIRONMENT_FD, "rb") as pipe:
            entries = [entry.decode(errors="surrogateescape").partition("=") for entry in pipe.read().split(b"\0") if entry]
        _READ.update({key: value for key, _, value in entries})
    return dict(_READ)


def nodelists() -> list[str]:
    """The allocation's nodes as Slurm writes them, group by group."""
    size = int(os.environ.get("SLURM_HET_SIZE", 0))
    suffixes = [f"_HET_GROUP_{group}" for group in range(size)] or [""]
    return [os.environ[f"SLURM_JOB_NODELIST{suffix}"] for suffix in suffixes]


def job_nodes(het_group: int | None = None) -> list[str]:
    """Names of the nodes of a group, in the order of ranks."""
    return expand(nodelists()[het_group or 0])


def addresses(reachable: bool = False) -> dict[str, str]:
    """Slurm's address of every node of the job, by name; loopback for a job on one node, unless it must be reachable from outside."""
    lists = nodelists()
    nodes = [node for each in lists for node in expand(each)]
    if len(nodes) == 1 and not reachable:
        return {nodes[0]: LOOPBACK}
    text = patiently(["scontrol", "--oneliner", "show", "node", ",".join(lists)]).stdout
    return dict(re.findall(r"^NodeName=(\S+) .*?\bNodeAddr=(\S+)", text, re.MULTILINE))


class _PlainUnpickler(pickle.Unpickler):
    """Reads submitit's result of a supervisor, which is plain values: a file that names any class or function is refused, so none is run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a supervisor's result is plain values, not {module}.{name}")


class SrunComponent:
    """A submitted component: an srun and its tasks, one a node."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], folder: Path, leader: str, step: Step, said: Path) -> None:
        self.name, self.step = name, step
        self.process = process
        self.folder, self.leader, self.said = folder, leader, said
        self.failed: dict[int, tuple[str, str]] = {}  # node, and srun's word, by rank
        self.first: tuple[int, ...] = ()  # who had failed before the rest was told to stop
        self.noticed = self.told = self.asked = 0.0

    def running(self) -> bool:
        """Whether srun lives. Shared fate within the component is kept here: a failed node stops the others, then srun ends."""
        alive = self.process.poll() is None
        if not self.told:
            self.listen()
            self.first = tuple(self.failed)
        if alive and self.failed:
            now = time.monotonic()
            self.noticed = self.noticed or now
            if not self.told and now - self.noticed > SETTLE_SECONDS:
                self.terminate()
            elif self.told and now - self.told > GRACE_SECONDS:
                self.process.send_signal(signal.SIGTERM)
        return alive

    def listen(self) -> None:
        """Take in what srun has said of tasks that failed."""
        self.failed = {**failures(self.said), **self.failed}

    def terminate(self) -> None:
        """Ask every node to stop its roles at once and end. srun passes this signal on; it takes SIGTERM for itself, as an order to kill."""
        if self.process.poll() is None:
            self.told = self.told or time.monotonic()
            self.process.send_signal(signal.SIGUSR2)

    def kill(self) -> None:
        """End it at once: tasks are killed, and their roles die with them."""
        if self.process.poll() is None:
            self.told = self.told or time.monotonic()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(GONE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def outcome(self) -> dict[str, Any]:
        """{code, role, rank, reason, node, …} of an ended component: the first cause over its nodes."""
        self.listen()
        self.asked = self.asked or time.monotonic()
        outcomes = {rank: self.of_node(rank) for rank in range(self.step.nodes)}
        # Who failed first is the cause, unless another one knows who was to blame: a supervisor that heard of it may end before the one that said it.
        return first_cause([outcome for rank, outcome in outcomes.items() if not self.first or rank in self.first or outcome.get("told")])

    def of_node(self, rank: int) -> dict[str, Any]:
        """How the process of one node ended: its own word, or what can be said of one that left none."""
        path = self.result(rank)
        word = self.failed.get(rank, ("", ""))[1]
        if not word or word.startswith("Exited"):
            self.wait_for(path)
        if not path.exists():
            return self.vanished(rank)
        kind, result = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        if kind == "success":
            return dict(result)
        last = str(result).strip().splitlines()[-1]
        return {**self.about(rank), "code": 1, "reason": f"the supervisor of component {self.name} failed: {last}; its log is {self.log(rank)}"}

    def wait_for(self, path: Path) -> None:
        """Until a file is there; all nodes share one allowance, which begins when the outcome is asked for."""
        while not path.exists() and time.monotonic() < self.asked + RESULT_SECONDS:
            self.folder.chmod(self.folder.stat().st_mode)  # makes NFS look again
            time.sleep(0.1)

    def vanished(self, rank: int) -> dict[str, Any]:
        """A process that left no word: killed with its node, refused by srun, or never started."""
        where = self.about(rank)
        word = self.failed.get(rank, ("", ""))[1]
        tail = last_line(self.log(rank))
        code = int(word.rpartition(" ")[2]) if word.startswith("Exited") else 0
        said = f": {tail}" if tail else ""
        if code == WRONG and tail.startswith(FAILED_SETUP):
            return {**where, "code": WRONG, "reason": f"component {self.name} didn't start on {where['node']}: {tail.removeprefix('error: ')}; mend that line of its group's setup"}
        if code and code <= 128:
            unstarted = "execve()" in tail or "No module named" in tail
            mend = "; look at the group's python and container_image" if unstarted else ""
            reason = f"the supervisor of component {self.name} on {where['node']} ended with exit code {code}{said}{mend}; its log is {self.log(rank)}"
            return {**where, "code": WRONG if unstarted else 1, "reason": reason}
        if not word and (line := self.ended_by()):
            return {**where, "code": AGAIN, "reason": f"component {self.name} was ended on {where['node']}: {line}", "killed": True}
        if not word and (line := self.refusal()):
            code = WRONG if any(sign in line for sign in HOPELESS) else AGAIN
            return {**where, "code": code, "reason": f"component {self.name} didn't start: {line}", "killed": code == AGAIN}
        lost = f" ({word.lower()})" if word.lower() not in ("", "killed") else ""
        return {**where, "code": AGAIN, "reason": f"the supervisor of component {self.name} on {where['node']} was killed{lost}", "killed": True}

    def about(self, rank: int) -> dict[str, Any]:
        """Which process this is."""
        nodes = job_nodes(self.step.het_group)
        return {"role": self.name, "rank": rank, "node": nodes[self.step.first_node + rank]}

    def result(self, rank: int) -> Path:
        """Where the process of a node leaves its own word."""
        return self.folder / f"{self.leader}_{rank}_result.pkl"

    def log(self, rank: int) -> Path:
        """What the process of a node has printed."""
        return self.folder / f"{self.leader}_{rank}_log.out"

    def ended_by(self) -> str:
        """srun's word on a step that ran, and was ended as a whole."""
        return next((found[0].strip() for line in self.said.read_text(errors="replace").splitlines() if (found := ENDED.search(line))), "")

    def refusal(self) -> str:
        """srun's own complaint, when it isn't about a task."""
        lines = [line for line in self.said.read_text(errors="replace").splitlines() if line.startswith("srun: ")]
        lines = [line.removeprefix("srun: ").removeprefix("error: ") for line in lines if not SAID.match(line) and "support for cpu binding" not in line]
        return next((line for line in lines if any(sign in line for sign in HOPELESS)), lines[-1] if lines else "")


class SrunRunner:
    """Starts the components of one attempt in the allocation that this process runs in.

    reachable: nodes need addresses that lead in from outside of the job, even where it has one node. term_asks: a first SIGTERM asks the run
    to stop; otherwise the component alone ends.
    """

    def __init__(self, folder: Path, reachable: bool = False, term_asks: bool = True) -> None:
        self.folder, self.reachable, self.term_asks = folder, reachable, term_asks
        self.leader = os.environ["SLURM_JOB_ID"]
        self.base = batch_environment()
        self.addresses: dict[str, str] | None = None

    def submit(self, component: str, function: str, *arguments: Any, step: Step) -> SrunComponent:
        """Start `function(*arguments)` on every node of the step; its files lie in folder/component."""
        if self.addresses is None:
            self.addresses = addresses(self.reachable)
        folder = self.folder / component
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.leader}_submitted.pkl").write_bytes(pickle.dumps(_Payload(function, arguments)))
        command = [*step.python, "-u", "-m", "miles.slurm.task", str(folder)]
        said = folder / f"{self.leader}_srun.err"
        with said.open("wb") as log:
            process = start(srun(step, component, folder / self.leader, command), self.environment(component, step), log)
        return SrunComponent(component, process, folder, self.leader, step, said)

    def environment(self, component: str, step: Step) -> dict[str, str]:
        """Environment of the component's processes."""
        ours = {
            "SUBMITIT_EXECUTOR": "hetslurm",
            "MILES_COMPONENT": component,
            "MILES_HET_GROUP": str(step.het_group or 0),
            "MILES_ADDRESSES": json.dumps(self.addresses),
            "MILES_TERM_ASKS": "1" if self.term_asks else "0",
            **({"MILES_ARCHITECTURE": step.architecture} if step.architecture else {}),
        }
        return {**self.base, **step.environment, **ours}


class _Payload:
    """Pickles as a call of step.delayed."""

    def __init__(self, function: str, arguments: tuple[Any, ...]) -> None:
        self.payload = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return delayed, self.payload


def start(command: list[str], environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    """Start an srun in a session of its own: signals of the batch step and of a terminal are the batch process's affair. Raises UserError."""
    try:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    except FileNotFoundError:
        raise UserError("srun: command not found on the first node of the job; is Slurm's bin folder in PATH there?") from None


def failures(said: Path) -> dict[int, tuple[str, str]]:
    """Tasks that failed, by rank, from what srun has said: their node, and how they ended."""
    found: dict[int, tuple[str, str]] = {}
    for node, ranks, word in SAID.findall(said.read_text(errors="replace")):
        for rank in numbers(ranks):
            found.setdefault(rank, (node, word.strip()))
    return found


def numbers(ranges: str) -> list[int]:
    """0,2-4 as [0, 2, 3, 4]."""
    pairs = [part.partition("-") for part in ranges.split(",")]
    return [number for low, _, high in pairs for number in range(int(low), int(high or low) + 1)]


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    if not log.exists():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-50:]]
    return next((line for line in reversed(lines) if line), "")
