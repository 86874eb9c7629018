"""What is known of a dead run: its attempts' outcomes, Slurm's states of its jobs, and the last lines of its logs. Plain values, so diagnosers are pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from miles.slurm.states import JobState


@dataclass(frozen=True)
class Line:
    """A line of evidence. where: the file from the run directory on and the line's number (from 1), or the command that said it. log: its name in `homes`."""

    where: str
    text: str
    log: str = ""


@dataclass(frozen=True)
class Ended:
    """An attempt: its exit.json (None: it left none), the faults its roles left, the job and nodes it had, and who
    asked it to stop (stop.json: user, slurm, or a placement job's partner; empty: nobody)."""

    epoch: int
    outcome: dict[str, Any] | None
    faults: tuple[tuple[str, dict[str, Any]], ...] = ()
    job: int | None = None
    nodes: tuple[str, ...] = ()
    stop_by: str = ""

    @property
    def where(self) -> str:
        """Its exit.json."""
        return f"attempts/{self.epoch:06d}/exit.json"


@dataclass(frozen=True)
class Evidence:
    """All of it. jobs: oldest first; logs: of the newest attempt and the newest job; homes: the node of each role's log; free_bytes: of the run's disk."""

    run: str
    attempts: tuple[Ended, ...] = ()
    jobs: tuple[JobState, ...] = ()
    cancelled: frozenset[int] = frozenset()
    logs: tuple[Line, ...] = ()
    homes: dict[str, str] = field(default_factory=dict)
    broken_nodes: dict[str, str] = field(default_factory=dict)
    free_bytes: int | None = None
    restarts: int = 3
    requeue: str = "requeue"
    unasked: str = ""  # why Slurm could not be asked
    lives: bool = False  # its newest attempt goes on, as far as its own machine and its service tell
    saved: bool = True  # whether a whole checkpoint is there
    submitted: tuple[int, ...] = ()  # jobs, oldest first, whether or not Slurm still knows them

    @property
    def last(self) -> Ended | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def outcome(self) -> dict[str, Any]:
        """How the newest attempt ended, empty when it left no word."""
        return (self.last.outcome or {}) if self.last else {}

    @property
    def job(self) -> JobState | None:
        """The newest job."""
        return self.jobs[-1] if self.jobs else None

    def node_of(self, line: Line) -> str | None:
        """The node that wrote a line."""
        return self.homes.get(line.log)


@dataclass(frozen=True)
class Diagnosis:
    """cause: its name, for scripts. weight: how surely it is the cause rather than an echo of it (0 to 100). node: None when not known."""

    cause: str
    weight: int
    happened: str
    mend: str
    evidence: tuple[Line, ...]
    node: str | None = None
