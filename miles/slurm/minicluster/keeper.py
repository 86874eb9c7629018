"""The parent of a cluster's daemons: nothing that they start can get away from it.

The kernel gives it every orphan below it (a slurmstepd whose slurmd died, a task whose slurmstepd died), so the end is certain: kill what
is below until nothing is. It runs until it is told to stop, or until the pipe to its owner closes. `python -m miles.slurm.minicluster.keeper FOLDER`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles.slurm.minicluster.folder import PROCESSES, SOCKET, remove, write
from miles.slurm.minicluster.processes import Process, descendants, everybody, look

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
END_SECONDS = 30.0
REQUEST_SECONDS = 10.0
LIBC = ctypes.CDLL(None, use_errno=True)


class Keeper:
    """Starts daemons when asked through a socket; its folder always says which run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, Process] = {}
        if LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")

    def start(self, name: str, command: list[str], environment: dict[str, str], place: str) -> Process:
        """Start a daemon, in a folder of ours, that dies with us. Its output goes to log/NAME.out."""
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.folder / place, start_new_session=True,
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
            )  # fmt: skip
        process = look(child.pid) or Process(child.pid, -1, os.getpid(), name)
        child.returncode = 0  # reap() does it: Popen would wait for a pid that is gone
        self.daemons[name] = process
        self.record()
        return process

    def record(self) -> None:
        """Write {name: [pid, start]} of ourselves and all daemons."""
        me = look(os.getpid())
        assert me is not None
        write(self.folder / PROCESSES, {name: [p.pid, p.started] for name, p in {"keeper": me, **self.daemons}.items()})

    def end(self) -> None:
        """Kill all that is below us. Returns when the kernel says that we have no child left."""
        deadline = time.monotonic() + END_SECONDS
        while reap():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes below {os.getpid()} can't be killed; {self.folder} stays")
            for process in descendants({os.getpid()}, everybody()):
                process.kill()
            time.sleep(0.01)

    def answer(self, connection: socket.socket) -> None:
        """One request a connection: {"name", "command", "environment", "place"} -> {"pid", "started"} or {"error"}."""
        connection.settimeout(REQUEST_SECONDS)
        with connection, contextlib.suppress(BrokenPipeError, TimeoutError), connection.makefile("rw") as stream:  # who asked may be killed
            line = stream.readline()
            if not line.endswith("\n"):
                return
            request: dict[str, Any] = json.loads(line)
            try:
                process = self.start(request["name"], request["command"], request["environment"], request["place"])
                reply: dict[str, Any] = {"pid": process.pid, "started": process.started}
            except OSError as error:
                reply = {"error": str(error)}
            stream.write(json.dumps(reply) + "\n")


def reap() -> bool:
    """Collect ended children; whether any child is left, ended or not."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


@contextlib.contextmanager
def _wakeups() -> Iterator[int]:
    """A descriptor that is readable after a signal: children that ended, and requests to stop."""
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    yield readable


def serve(keeper: Keeper, owned: bool) -> None:
    """Answer until SIGTERM, or until our standard input ends when somebody owns us."""
    with _wakeups() as wakeup, socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as selector:
        server.bind(str(keeper.folder / SOCKET))
        server.listen()
        selector.register(server, selectors.EVENT_READ)
        selector.register(wakeup, selectors.EVENT_READ)
        if owned:
            selector.register(0, selectors.EVENT_READ)
        keeper.record()
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    keeper.answer(server.accept()[0])
                elif key.fileobj == 0:
                    return  # the owner is gone: nothing is ever written to us
                elif signal.SIGTERM in os.read(wakeup, 4096):
                    return
            reap()


def main() -> None:
    """Arguments: the folder, whether somebody owns us (own) or not (stay), and whether the folder stays afterwards (keep) or goes (remove)."""
    folder, owned, keep = Path(sys.argv[1]), sys.argv[2] == "own", sys.argv[3] == "keep"
    keeper = Keeper(folder)
    try:
        serve(keeper, owned)
    finally:
        keeper.end()
    if keep:
        (folder / PROCESSES).unlink()
    else:
        remove(folder)


if __name__ == "__main__":
    main()
