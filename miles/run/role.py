"""What every role process (service, trainer, worker, engine) knows about itself, and how it ends.

A role is started by the supervisor (miles.run.component) with its identity in the environment. A user's mistake ends it with one
line and exit 78, a lost coordinator or a newer attempt with 75, a bug with a traceback and 1.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from miles.config.compose import load_config
from miles.config.exits import AGAIN, OK, WRONG, TryAgain, UserError, disk_full, file_fault
from miles.config.schema import RunConfig
from miles.data.store.epoch import Fence, Fenced
from miles.data.store.import_roots import use_import_roots
from miles.data.store.run_dir import RunDir


@dataclass(frozen=True)
class Role:
    """Identity of a role process within one attempt of a run."""

    name: str
    run_dir: Path
    epoch: int
    rank: int
    world_size: int
    token: str
    service: str
    node: int = 0  # of its component
    node_name: str = ""
    place: str = ""  # its supervisor: roles of one place are on one machine, and end together

    @classmethod
    def from_environment(cls, name: str) -> Role:
        """Read what the supervisor set (MILES_*); a missing variable is a bug of ours."""
        env = os.environ
        return cls(
            name=name,
            run_dir=Path(env["MILES_RUN_DIR"]),
            epoch=int(env["MILES_EPOCH"]),
            rank=int(env["MILES_RANK"]),
            world_size=int(env["MILES_WORLD_SIZE"]),
            token=env["MILES_TOKEN"],
            service=env["MILES_SERVICE"],
            node=int(env.get("MILES_NODE", "0")),
            node_name=env.get("MILES_NODE_NAME", ""),
            place=env.get("MILES_PLACE", ""),
        )

    @property
    def fault_file(self) -> Path:
        """Where the one line about a user's mistake, or about who holds the run up, is left for the supervisor."""
        return self.run_dir / "attempts" / f"{self.epoch:06d}" / "logs" / f"fault.{self.name}.{self.rank}.json"


def user_fault(error: BaseException, run_dir: Path | None = None) -> str | None:
    """The one line that a user should read, or None where the error is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"{error.strerror or 'address already in use'}: choose another cluster.port, or 0 for a free one"
    return disk_full(error, run_dir) or (file_fault(error) if isinstance(error, OSError) else None)


def main(name: str, body: Callable[[Role], None]) -> None:
    """Run a role to its end and exit with the code that says how it ended. A crash of native code leaves its stacks in the log."""
    faulthandler.enable()
    role = Role.from_environment(name)
    code = OK
    try:
        use_import_roots(RunDir(role.run_dir), role.epoch)
        body(role)
    except TryAgain as error:
        _tell(f"{name}: {error}")
        code = AGAIN
    except Exception as error:
        line = user_fault(error, role.run_dir)
        if superseded := superseding(role):  # whatever went wrong then, a newer attempt's taking over is the reason
            _tell(f"{name}: {superseded} ({type(error).__name__}: {error})")
            code = AGAIN
        elif line is None:
            _tell("".join(traceback.format_exception(error)))
            code = 1
        else:
            _tell(f"{name}: {line}")
            code = WRONG
            leave_fault(role, WRONG, line)
    _tell("", sys.stdout)
    # Straight out: threads of servers and process groups must not hold a dead role back.
    os._exit(code)


def _tell(text: str, stream: TextIO | None = None) -> None:
    """Write to the log, and all that waits to be written; a log on a full disk must not cost the exit code, which says the rest."""
    stream = sys.stderr if stream is None else stream
    try:
        stream.write(f"{text.rstrip()}\n" if text else "")
        stream.flush()
    except (OSError, ValueError):  # full, or closed: nothing else is there to say it with
        return


def superseding(role: Role) -> str | None:
    """What is said when a newer attempt exists; None while this one is the newest."""
    try:
        Fence(RunDir(role.run_dir), role.epoch).check()
    except Fenced as error:
        return str(error)
    return None


def leave_fault(role: Role, code: int, line: str, whose: dict[str, Any] | None = None) -> None:
    """Leave the line for the supervisor (whose: role, rank and node, if it is another's fault); on a full disk the log has it already."""
    draft = role.fault_file.with_suffix(".tmp")
    try:
        draft.write_text(json.dumps({"code": code, "role": role.name, "rank": role.rank, "message": line, **(whose or {})}))
        draft.rename(role.fault_file)
    except OSError as error:
        _tell(f"{role.name}: could not leave the message: {error}")


def load_run(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run."""
    return load_config([run_dir / "run.yaml"])
