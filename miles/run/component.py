"""The supervisor of one component on one node: starts its role processes, shares their fate, says how they ended.

Roles of `train`: the rollout service (first node) and the trainer ranks. Roles of `rollout`: the engines and one worker. Which of
them run here says the attempt's start list.
The first role that fails stops the others; when the primary role (trainer, worker) ends well, the rest is stopped.

SIGTERM ends all of it. With MILES_TERM_ASKS=1 it only asks the run to stop (save, then end), roles are shielded from it, and SIGUSR2 ends all at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from miles.config.exits import AGAIN, OK, WRONG, first_cause
from miles.config.process import Process
from miles.data.service_call import call
from miles.data.store.start_list import StartList
from miles.engine.child import die_with_parent
from miles.run.environment import Node, environment

PRIMARY = {"train": "trainer", "rollout": "worker"}
SETTLE_SECONDS = 1.0
GRACE_SECONDS = 10.0


@dataclass
class RoleProcess:
    """A started role."""

    name: str
    rank: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal, None while it runs."""
        return self.process.poll()


def start(wanted: StartList, run_dir: Path, epoch: int, role: Process, node: Node) -> RoleProcess:
    """Start one role with its own log."""
    log = (run_dir / "attempts" / f"{epoch:06d}" / "logs" / f"{role.role}.{role.rank}.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", f"miles.run.{role.role}"],
        env=environment(wanted, run_dir, epoch, role, node),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=shielded if term_asks() else die_with_parent,
    )
    return RoleProcess(role.role, role.rank, process, log)


def term_asks() -> bool:
    """Whether a SIGTERM is Slurm's word that the job must go, which it tells every process of it at once."""
    return os.environ.get("MILES_TERM_ASKS") == "1"


def shielded() -> None:
    """For preexec_fn: as die_with_parent; besides, SIGTERM does nothing, so that a role and what it starts can still save."""
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # servers handle what is ignored; multiprocessing unblocks what is blocked


def stop(roles: list[RoleProcess], grace: float = GRACE_SECONDS) -> None:
    """Ask the roles to end, then kill those that don't."""
    for role in roles:
        if role.code is None:
            if not term_asks():
                role.process.terminate()
            elif role.name == "engine":
                role.process.send_signal(signal.SIGINT)
            else:
                role.process.kill()
            role.process.send_signal(signal.SIGCONT)  # one that is stopped wouldn't hear it
    deadline = time.monotonic() + grace
    while any(role.code is None for role in roles) and time.monotonic() < deadline:
        time.sleep(0.05)
    for role in roles:
        if role.code is None:
            role.process.kill()
            role.process.wait()
        role.log.close()


def verdict(role: RoleProcess, run_dir: Path, epoch: int) -> dict[str, Any]:
    """How a role ended, as the launcher wants to know it."""
    code = role.code
    assert code is not None, "only ended roles are judged"
    if code in (WRONG, AGAIN) and (told := word_of(role, run_dir, epoch)) is not None:
        return told
    if code < 0:
        reason = f"{role.name} {role.rank} was killed by {signal.Signals(-code).name}"
    elif code == OK:
        reason = "finished"
    else:
        reason = f"{role.name} {role.rank} ended with exit code {code}; its log is attempts/{epoch:06d}/logs/{role.name}.{role.rank}.log"
    # A process that was killed says nothing about the run itself: try again, as after a lost node.
    return {"code": AGAIN if code < 0 else code, "role": role.name, "rank": role.rank, "reason": reason, "killed": code < 0}


def word_of(role: RoleProcess, run_dir: Path, epoch: int) -> dict[str, Any] | None:
    """The outcome that a role has left a line about (miles.run.role.leave_fault): a user's mistake, or who holds the run up."""
    fault = run_dir / "attempts" / f"{epoch:06d}" / "logs" / f"fault.{role.name}.{role.rank}.json"
    if not fault.exists():
        return None
    left = json.loads(fault.read_text())
    node = {"node": left["node"]} if "node" in left else {}
    return {"code": left["code"], "role": left["role"], "rank": left["rank"], **node, "reason": left["message"], "killed": False, "told": True}


def words_of(roles: list[RoleProcess], run_dir: Path, epoch: int) -> list[dict[str, Any]]:
    """word_of() of every role that left one."""
    return [word for role in roles if (word := word_of(role, run_dir, epoch)) is not None]


class Stopped(Exception):
    """The executor wants this component gone."""


class Signals:
    """What the executor says by signals: end now (Stopped is raised), or, where a SIGTERM only asks, stop when it suits."""

    def __init__(self, asks: bool) -> None:
        self.asks, self.asked = asks, False
        signal.signal(signal.SIGTERM, self._terminate)
        signal.signal(signal.SIGUSR2, self._end)

    def _terminate(self, signum: int, frame: Any) -> None:
        if not self.asks:
            self._end(signum, frame)
        self.asked = True  # however often: Slurm may say it several times

    def _end(self, signum: int, frame: Any) -> None:
        self.ignore()  # said again while the outcome is made, it would cost that
        raise Stopped

    @staticmethod
    def ignore() -> None:
        """From now on: we are ending."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def supervise(run_dir: str, component: str, epoch: int, node: int | None = None) -> dict[str, Any]:
    """Body of the component's job on one node (called by import name): run the roles until the first failure or the primary's end.

    node: which of the component's nodes this is; None: what MILES_NODE says, else the first. Returns {code, role, rank, reason, node},
    code as in docs/formats.md, node the name of the machine.
    """
    signals = Signals(asks=term_asks())
    if os.getpgrp() != os.getpid():
        os.setsid()  # away from the terminal: its Ctrl-C is for the launcher, which asks the run to stop
    root, here = Path(run_dir), Node.here(component, int(os.environ.get("MILES_NODE", "0")) if node is None else node)
    wanted = StartList.read(root / "attempts" / f"{epoch:06d}")
    roles: list[RoleProcess] = []
    try:
        for role in wanted.components[component][here.number]:
            roles.append(start(wanted, root, epoch, role, here))
        outcome = watch(roles, PRIMARY[component], root, epoch, ask_to_stop(root, epoch, signals))
    except Stopped:
        stopped = {"code": AGAIN, "role": component, "rank": here.number, "reason": f"component {component} was stopped"}
        # What ended the other component may have ended ours, and here is who knows why.
        outcome = first_cause([*words_of(roles, root, epoch), stopped])
    finally:
        signals.ignore()
        stop(roles)
    if component == "rollout" and outcome["code"] != OK:
        tell(root, epoch, "/leave", place=here.place, code=outcome["code"], why=outcome["reason"])  # where nodes may leave, others go on at once
    return {"node": here.name, **outcome}


def tell(run_dir: Path, epoch: int, path: str, **fields: Any) -> bool:
    """A word to the attempt's rollout service; False where it isn't there, or is busy."""
    attempt = run_dir / "attempts" / f"{epoch:06d}"
    url, token = json.loads((attempt / "service.json").read_text())["url"], (attempt / "token").read_text()
    return call(url, token, "POST", path, {"epoch": epoch, **fields}) is not None


def ask_to_stop(run_dir: Path, epoch: int, signals: Signals) -> Callable[[], None]:
    """A function that passes a stop request on to the rollout service, once it is there; until then, and without a request, it does nothing."""
    told = False

    def pass_on() -> None:
        nonlocal told
        if signals.asked and not told:
            told = tell(run_dir, epoch, "/stop")

    return pass_on


def watch(roles: list[RoleProcess], primary: str, run_dir: Path, epoch: int, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Wait for the first failure, or for the end of every primary role."""
    while True:
        meanwhile()
        failed = [role for role in roles if role.code not in (None, OK)]
        if failed:
            # One failure brings others: on a busy machine the first that is seen is not always the one that began it.
            deadline = time.monotonic() + SETTLE_SECONDS
            while any(role.code is None for role in roles) and time.monotonic() < deadline:
                time.sleep(0.05)
            failed = [role for role in roles if role.code not in (None, OK)]
            # The service tells why before it ends, since others ask it first.
            return first_cause([*words_of(roles, run_dir, epoch), *(verdict(role, run_dir, epoch) for role in failed)])
        primaries = [role for role in roles if role.name == primary]
        if all(role.code == OK for role in primaries):
            return verdict(primaries[0], run_dir, epoch)
        time.sleep(0.05)
