"""The supervisor of one component on one node: starts its role processes, shares their fate, says how they ended.

Roles of `train`: the rollout service (first node) and the trainer ranks. Roles of `rollout`: the engines and one worker.
The first role that fails stops the others; when the primary role (trainer, worker) ends well, the rest is stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from miles.config.address import bind_host, is_loopback
from miles.config.exits import AGAIN, OK, WRONG, first_cause
from miles.config.schema import RunConfig
from miles.engine.child import die_with_parent
from miles.run.role import load_run

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


def roles_of(component: str, config: RunConfig) -> list[tuple[str, int, int]]:
    """(role, rank, number of its kind) of every process of the component on one node."""
    ranks = config.train.num_gpus_per_node
    engines = config.rollout.num_gpus // config.rollout.num_gpus_per_engine
    if component == "train":
        return [("service", 0, 1), *(("trainer", rank, ranks) for rank in range(ranks))]
    return [*(("engine", rank, engines) for rank in range(engines)), ("worker", 0, 1)]


def environment(config: RunConfig, run_dir: Path, epoch: int, name: str, rank: int, world_size: int) -> dict[str, str]:
    """Environment of a role: its identity, and pinned threads, since bits depend on their number."""
    rendezvous = json.loads((run_dir / "attempts" / f"{epoch:06d}" / "service.json").read_text())
    token = (run_dir / "attempts" / f"{epoch:06d}" / "token").read_text()
    threads = str(1 if name in ("service", "worker") else config.cluster.threads)
    return {
        **os.environ,
        "MILES_RUN_DIR": str(run_dir),
        "MILES_EPOCH": str(epoch),
        "MILES_RANK": str(rank),
        "MILES_WORLD_SIZE": str(world_size),
        "MILES_TOKEN": token,
        "MILES_SERVICE": rendezvous["url"],
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        # A thread that waits for others burns its core for milliseconds by default; where cores are shared, those were taken from the others.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # A log is read by lines; a bar that is drawn over itself is none.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "1"),
        "PYTHONUNBUFFERED": "1",
        # A worker's arrays come and go by the megabyte: each a mapping of its own, so that its memory goes back at once and leaves no holes.
        **({"MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(1 << 20))} if name == "worker" else {}),
        **({"GLOO_SOCKET_IFNAME": "lo"} if is_loopback(bind_host(config.cluster.host)) else {}),
    }


def start(config: RunConfig, run_dir: Path, epoch: int, name: str, rank: int, world_size: int) -> RoleProcess:
    """Start one role with its own log."""
    log = (run_dir / "attempts" / f"{epoch:06d}" / "logs" / f"{name}.{rank}.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", f"miles.run.{name}"],
        env=environment(config, run_dir, epoch, name, rank, world_size),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent,
    )
    return RoleProcess(name, rank, process, log)


def stop(roles: list[RoleProcess], grace: float = GRACE_SECONDS) -> None:
    """Ask the roles to end, then kill those that don't."""
    for role in roles:
        if role.code is None:
            role.process.terminate()
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
    fault = run_dir / "attempts" / f"{epoch:06d}" / "logs" / f"fault.{role.name}.{role.rank}.json"
    if code == WRONG and fault.exists():
        reason = json.loads(fault.read_text())["message"]
    elif code < 0:
        reason = f"{role.name} {role.rank} was killed by {signal.Signals(-code).name}"
    elif code == OK:
        reason = "finished"
    else:
        reason = f"{role.name} {role.rank} ended with exit code {code}; its log is attempts/{epoch:06d}/logs/{role.name}.{role.rank}.log"
    # A process that was killed says nothing about the run itself: try again, as after a lost node.
    return {"code": AGAIN if code < 0 else code, "role": role.name, "rank": role.rank, "reason": reason, "killed": code < 0}


class Stopped(Exception):
    """The executor wants this component gone."""


def _on_terminate(signum: int, frame: Any) -> None:
    raise Stopped


def supervise(run_dir: str, component: str, epoch: int) -> dict[str, Any]:
    """Body of the component's job (called by import name): run the roles until the first failure or the primary's end.

    Returns {code, role, rank, reason}; code as in docs/formats.md.
    """
    signal.signal(signal.SIGTERM, _on_terminate)
    if os.getpgrp() != os.getpid():
        os.setsid()  # away from the terminal: its Ctrl-C is for the launcher, which asks the run to stop
    root = Path(run_dir)
    config = load_run(root)
    roles: list[RoleProcess] = []
    try:
        for name, rank, count in roles_of(component, config):
            roles.append(start(config, root, epoch, name, rank, count))
        return watch(roles, PRIMARY[component], root, epoch)
    except Stopped:
        return {"code": AGAIN, "role": component, "rank": 0, "reason": f"component {component} was stopped"}
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop(roles)


def watch(roles: list[RoleProcess], primary: str, run_dir: Path, epoch: int) -> dict[str, Any]:
    """Wait for the first failure, or for the end of every primary role."""
    while True:
        failed = [role for role in roles if role.code not in (None, OK)]
        if failed:
            # One failure brings others: on a busy machine the first that is seen is not always the one that began it.
            deadline = time.monotonic() + SETTLE_SECONDS
            while any(role.code is None for role in roles) and time.monotonic() < deadline:
                time.sleep(0.05)
            failed = [role for role in roles if role.code not in (None, OK)]
            return first_cause([verdict(role, run_dir, epoch) for role in failed])
        primaries = [role for role in roles if role.name == primary]
        if all(role.code == OK for role in primaries):
            return verdict(primaries[0], run_dir, epoch)
        time.sleep(0.05)
