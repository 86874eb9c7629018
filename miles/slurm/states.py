"""What Slurm knows of a job, in words: from its controller while that remembers the job, then from its accounting where there is one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from miles.config.exits import AGAIN, WRONG, UserError
from miles.slurm import queue
from miles.slurm.command import TIMEOUT_SECONDS, slurm_command

FORGOTTEN = "FORGOTTEN"
ENDINGS = {  # of a run's job, by its exit code
    AGAIN: "the run goes on in another job, or its attempts brought nothing new",
    WRONG: "the configuration or the input is wrong",
    130: "stopped by miles-submit cancel",
}
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "REVOKED")
WORDS = {
    "Resources": "waits for enough free nodes",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for the jobs that it depends on",
    "DependencyNeverSatisfied": "never starts: a job that it depends on failed; cancel it",
    "BeginTime": "may not start yet (a requeued job waits for a while)",
    "JobHeldUser": "held by its user; release it with scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "launch_failed_requeued_held": "held after a failed start; look at the node, then scontrol release",
    "PartitionTimeLimit": "asks for more time than its partition allows",
    "PartitionNodeLimit": "asks for more nodes than its partition allows",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is closed",
    "ReqNodeNotAvail": "a node that it asks for, or enough nodes, are not available",
    "BadConstraints": "no nodes are as it asks",
    "Licenses": "waits for a licence",
    "Reservation": "waits for its reservation",
    "ReservationDeleted": "its reservation is gone",
    "InvalidAccount": "its account is unknown",
    "InvalidQOS": "its qos is unknown",
    "AccountNotAllowed": "its account may not use the partition",
    "QOSNotAllowed": "its qos may not use the partition",
    "NodeDown": "a node that it needs is down",
    "FrontEndDown": "no front end is up",
    "Cleaning": "its last execution is being cleaned up",
    "Prolog": "its nodes are being prepared",
    "NonZeroExitCode": "ended with an error",
    "TimeLimit": "reached its time limit",
    "OutOfMemory": "out of memory",
    "NodeFail": "a node failed",
    "JobLaunchFailure": "couldn't be started on its nodes",
    "RaisedSignal:9(Killed)": "killed",
    "None": "",
}


@dataclass(frozen=True)
class ComponentState:
    """One group of a job: its own id, its state, and the nodes it has (Slurm's notation, empty while it has none)."""

    job_id: str
    group: int
    state: str
    reason: str
    nodes: str
    exit_code: int | None


@dataclass(frozen=True)
class JobState:
    """A job by its leader's id. reason is in words, empty when there is nothing to say; restarts counts requeues; exit_code is None until it ended."""

    job_id: str
    state: str
    reason: str
    components: tuple[ComponentState, ...]
    nodes: str
    restarts: int
    exit_code: int | None

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in ALIVE

    @property
    def words(self) -> str:
        """Its id, its state, and the reason."""
        return f"job {self.job_id} {self.state.lower()}{': ' + self.reason if self.reason else ''}"

    @property
    def meant(self) -> str:
        """What a run's own exit code says, since Slurm calls every code but 0 a failure; empty where it says nothing more than Slurm does."""
        return ENDINGS.get(self.exit_code or 0, "") if self.state == "FAILED" else ""


@dataclass(frozen=True)
class Marks:
    """What tells a job from another that has its id: a controller that lost its state counts from the start again.

    writes: whether a batch log (StdOut, which a requeue leaves as it is) is the job's. name and since (time of its submission as Slurm
    says it; a requeue's is later) tell it apart in the accounting, which has no logs. cluster: where it was submitted.
    """

    writes: Callable[[str], bool]
    name: str = ""
    since: str = ""
    cluster: str = ""


def job_state(job_id: str, marks: Marks | None = None) -> JobState:
    """The state of a job, asked now. A job that nobody remembers is FORGOTTEN, and (marks) so is one whose id is another's now.

    Raises UserError when Slurm can't be asked.
    """
    try:
        found = from_controller(job_id, marks)
    except UserError:
        found = from_accounting(job_id, marks)  # the controller may be down while the database answers
        if found is None:
            raise
    found = found or from_accounting(job_id, marks)
    if found is not None:
        return found
    where = f" of cluster {marks.cluster}" if marks and marks.cluster else ""
    reason = f"Slurm no longer knows job {job_id}{where}: its controller forgets ended jobs, and there is no record of it in the accounting"
    return JobState(job_id, FORGOTTEN, reason, (), "", 0, None)


def watched(ask: Callable[[], list[JobState]], say: Callable[[str], None], every: float) -> Iterator[list[JobState]]:
    """The states of jobs, asked again every so many seconds until all are over; those come last. While Slurm doesn't answer that is said: the jobs go on."""
    said = ""
    while True:
        try:
            states = ask()
        except UserError as error:
            if said != str(error):
                say(f"warning: {error}; asked again until it answers")
            said = str(error)
        else:
            said = ""
            yield states
            if all(state.over for state in states):
                return
        time.sleep(every)


def from_controller(job_id: str, marks: Marks | None = None) -> JobState | None:
    """What the controller says; None when it doesn't know the job. Raises UserError when it doesn't answer."""
    parts = queue.parts(job_id, TIMEOUT_SECONDS)
    return of_parts(parts) if not marks or not parts or marks.writes(parts[0].output) else None


def of_parts(parts: list[queue.Part]) -> JobState | None:
    """The state of a job by its parts, the leader first."""
    if not parts:
        return None
    components = tuple(ComponentState(part.job_id, part.group, part.state, words(part.reason, part.state), part.nodes, exit_code(part.exit_code, part.state)) for part in parts)
    return _whole(parts[0].leader or parts[0].job_id, components, max(part.restarts for part in parts))


def from_accounting(job_id: str, marks: Marks | None = None) -> JobState | None:
    """What the accounting has on record; None without accounting, or without a record."""
    fields = "JobID,JobIDRaw,State,ExitCode,NodeList,Reason,Submit,JobName"
    # -D: every execution of a requeued job, in the order of time.
    done = slurm_command(["sacct", "-X", "-D", "-n", "-P", "-j", job_id, "-o", fields], check=False)
    return None if done.returncode else parse_accounting(done.stdout, marks)


def parse_accounting(text: str, marks: Marks | None = None) -> JobState | None:
    """`sacct -X -D -n -P`: rows `J` or `J+k`, one for each execution."""
    latest: dict[int, list[str]] = {}
    executions = 0
    for row in (line.split("|", 7) for line in text.splitlines() if line):
        if marks and (row[6] < marks.since or marks.name not in ("", row[7])):
            continue
        group = int(row[0].partition("+")[2] or 0)
        executions += group == 0
        latest[group] = row
    if not latest:
        return None
    components = []
    for group, (_, raw, spelt, code, nodes, reason, *_) in sorted(latest.items()):
        state = spelt.split()[0]  # CANCELLED by 1000
        components.append(ComponentState(raw, group, state, words(reason, state), "" if nodes == "None assigned" else nodes, exit_code(code, state)))
    return _whole(latest[min(latest)][0].partition("+")[0], tuple(components), max(executions - 1, 0))


def _whole(job_id: str, components: tuple[ComponentState, ...], restarts: int) -> JobState:
    """The leader's state is the job's; a component that ended alone is mentioned."""
    leader, *others = components
    reason = leader.reason or next((other.reason for other in others if other.reason), "")
    ended = [other for other in others if other.state not in ALIVE]
    if leader.state == "RUNNING" and ended:
        reason = ", ".join(f"component {other.group} is {other.state.lower()}" for other in ended)
    nodes = ",".join(component.nodes for component in components if component.nodes)
    return JobState(job_id, leader.state, reason, components, nodes, restarts, leader.exit_code)


def words(reason: str, state: str) -> str:
    """Slurm's reason as a person would say it; one that we have no words for is spelt out. A job that completed has none: what stands there is of an execution before."""
    if state == "COMPLETED":
        return ""
    reason = reason.strip("()")
    if reason in WORDS:
        return WORDS[reason] if state != "RUNNING" else ""
    name = reason.partition(",")[0]
    if name in WORDS and name != "None":
        return f"{WORDS[name]} ({reason.partition(',')[2].strip('_ ').replace('_', ' ')})"
    limit = re.fullmatch(r"(QOS|Assoc)(Max|Grp|Min|Usage)(.+)", reason)
    if limit:
        return f"limit of its {'qos' if limit[1] == 'QOS' else 'account'} reached: {_spelt(limit[2] + limit[3])}"
    return _spelt(reason)


def _spelt(name: str) -> str:
    """ReqNodeNotAvail as words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).lower()


def exit_code(text: str, state: str) -> int | None:
    """`code:signal` as a shell would give it, None while the job goes on."""
    if state in ALIVE or not text:
        return None
    code, _, number = text.partition(":")
    return int(code) if int(code) or not int(number or 0) else 128 + int(number)
