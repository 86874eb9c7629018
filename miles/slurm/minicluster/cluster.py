"""A private Slurm: start it, talk to it, break it, end it.

    with Cluster(Path("/tmp/mini")) as cluster:
        cluster.run(["srun", "-p", "h200", "-N2", "hostname"])
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from miles.config.exits import UserError
from miles.slurm.minicluster import conf, database, packages
from miles.slurm.minicluster.command_env import command_env
from miles.slurm.minicluster.ending import POLL_SECONDS, end, members
from miles.slurm.minicluster.folder import CLUSTER, SOCKET, ClusterError, create, recorded, remove_empty, write
from miles.slurm.minicluster.layout import DEFAULT, Layout, Settings
from miles.slurm.minicluster.ports import reserve
from miles.slurm.minicluster.processes import CONF, DAEMONS, NODES, Process, descendants, everybody, node_of

START_SECONDS = 60.0
FOLDERS = ("conf", "log", "run", "state", "spool", "munge", "dev", "keeper")


class Cluster:
    """A private Slurm in a folder of its own. As a context it begins and ends there; `up` and `down` do it across processes."""

    def __init__(
        self,
        folder: Path,
        version: str | None = None,
        accounting: bool = False,
        nodes: Layout | Mapping[str, int] = DEFAULT,
        settings: Settings | None = None,
        keep: bool = False,
        elsewhere: Path | None = None,
    ) -> None:
        """version: like 22.05; None for the machine's own. folder: new or empty, with a short path. nodes: a layout, or {group: count} for the default one. keep: leave the folder behind.
        elsewhere: where a version that isn't the machine's is unpacked. UserError when that version, or a part of it, is not installed.
        """
        self.folder = folder.absolute()
        self.layout = nodes if isinstance(nodes, Layout) else DEFAULT.with_counts(nodes)
        self.settings = settings or Settings()
        self.accounting = accounting
        self.keep = keep
        self.programs = packages.find(version, accounting, elsewhere)
        year, month = self.programs.version
        self.version = f"{year}.{month:02}"
        self.conf = self.folder / CONF  # for SLURM_CONF
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        self.up(owned=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    def up(self, owned: bool = False) -> None:
        """Start everything, and return when all nodes are idle. owned: it ends when this process does, however that ends."""
        above = create(self.folder)
        try:
            self._mark()
            for name in FOLDERS:
                (self.folder / name).mkdir(mode=0o700 if name == "keeper" else 0o755)
            for name in self.layout.nodes:
                (self.folder / NODES / name).mkdir(parents=True)
            ports, holder = reserve(2 + len(self.layout.nodes))
            with holder:
                self._write(ports)
                self._start_keeper(holder, owned)
            self._start_daemons()
        except BaseException:
            self.down()
            remove_empty(above)
            raise

    def down(self) -> None:
        """Kill all of it, and remove the folder unless it is to be kept. Nothing happens when it is down already."""
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
        end(self.folder, self.keep)
        if self._keeper is not None:
            self._keeper.wait()
            self._keeper = None

    def env(self) -> dict[str, str]:
        """Environment for Slurm's commands, and for what submits with them: this cluster, and nothing of another."""
        return command_env(self.conf, self.programs.commands)

    def run(self, arguments: Sequence[str | Path], check: bool = True, timeout: float = 60.0, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster, output captured as text. more: for subprocess.run. ClusterError with its stderr when check is set."""
        words = [str(word) for word in arguments]
        more = {"env": self.env(), **({} if "input" in more else {"stdin": subprocess.DEVNULL}), **more}
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, **more)
        if check and done.returncode:
            raise ClusterError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr or done.stdout}")
        return done

    def daemons(self) -> dict[str, Process]:
        """{name: process} of those that live: keeper, munged, slurmctld, slurmd-NODE, and for accounting mariadbd, slurmdbd."""
        return recorded(self.folder)

    def processes(self) -> list[Process]:
        """Everything that belongs to the cluster: daemons, slurmstepds, tasks and their children, orphans too."""
        return members(self.folder)

    def kill_node(self, name: str, tasks: bool = False) -> None:
        """SIGKILL a node's slurmd; with tasks also all that it started, as when a machine loses power."""
        self._node(name)
        if (slurmd := self.daemons().get(f"slurmd-{name}")) is not None:
            slurmd.kill()
            self._until(lambda: not slurmd.alive(), f"slurmd of {name} does not end")
        while tasks and (found := [p for p in self.processes() if node_of(p, self.folder) == name]):
            found += descendants({p.pid for p in found}, everybody())
            for process in sorted(found, key=lambda p: p.name not in DAEMONS):  # a slurmstepd would report the end of its tasks
                process.kill()
            time.sleep(POLL_SECONDS)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a killed node, and return when slurmctld has its registration."""
        self._node(name)
        assert f"slurmd-{name}" not in self.daemons(), f"slurmd of {name} runs"
        self._start_slurmd(name)
        self._until(lambda: self.node_state(name) not in ("down", "unknown") and "*" not in self.node_state(name), f"{name} does not come back", f"slurmd-{name}")

    def restart_controller(self, crash: bool = False) -> None:
        """End slurmctld (it saves its state; with crash it has no time to) and start it again. Returns when it answers."""
        controller = self.daemons()["slurmctld"]
        controller.kill(signal.SIGKILL if crash else signal.SIGTERM)
        self._until(lambda: not controller.alive(), "slurmctld does not end")
        self._start_controller()

    def node_state(self, name: str) -> str:
        """As sinfo says it: idle, mixed, allocated, down, drained, ...; with * when the node does not answer."""
        self._node(name)
        return self.run(["sinfo", "-h", "-n", name, "-o", "%T"]).stdout.split()[0]

    def _node(self, name: str) -> None:
        if name not in self.layout.nodes:
            raise UserError(f"node {name}: nodes of this cluster are {', '.join(self.layout.nodes)}")

    def _mark(self) -> None:
        commands = self.programs.commands
        write(
            self.folder / CLUSTER,
            {
                "version": self.version,
                "accounting": self.accounting,
                "keep": self.keep,
                "commands": str(commands) if commands else None,
                "nodes": self.layout.nodes,
                "settings": asdict(self.settings),
            },
        )

    def _write(self, ports: list[int]) -> None:
        place = conf.Place(self.folder, ports, self.programs.version, self.programs.plugins, self.accounting)
        for name, text in conf.files(place, self.layout, self.settings).items():
            path = self.folder / "conf" / name
            path.touch(0o600 if name == "slurmdbd.conf" else 0o644)
            path.write_text(text)
        for index in range(max(group.gpus for group in self.layout.groups)):
            (self.folder / "dev" / f"nvidia{index}").symlink_to(os.devnull)
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))

    def _start_keeper(self, holder: socket.socket, owned: bool) -> None:
        words = [sys.executable, "-m", "miles.slurm.minicluster.keeper", str(self.folder), "own" if owned else "stay", "keep" if self.keep else "remove"]
        root = str(Path(__file__).resolve().parents[3])
        inherited = os.environ.get("PYTHONPATH")
        variables = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root}
        with open(self.folder / "log" / "keeper.out", "ab") as log:
            self._keeper = subprocess.Popen(
                words, stdin=subprocess.PIPE if owned else subprocess.DEVNULL, stdout=log, stderr=log, env=variables, pass_fds=[holder.fileno()], start_new_session=True, cwd="/"
            )  # fmt: skip
        keeper = self._keeper
        self._until(lambda: "keeper" in self.daemons() or keeper.poll() is not None, "the keeper does not start")
        if keeper.poll() is not None:
            raise ClusterError(f"the keeper ended{_ends_of_logs(self.folder)}")

    def _start_daemons(self) -> None:
        munge = self.folder / "munge"
        options = {"key-file": "key", "socket": "s", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", [self.programs["munged"], "--foreground", "--force", *(f"--{option}={munge / name}" for option, name in options.items())])
        self._until((munge / "s").exists, "munged does not start", "munged")
        if self.accounting:
            database.prepare(self.folder, self.programs)
            self._start("mariadbd", database.command(self.folder, self.programs), database.without_sync())
            self._until(database.socket(self.folder).exists, "mariadbd does not start", "mariadbd")
            self._start("slurmdbd", [self.programs["slurmdbd"], "-D"])
            self._until(lambda: self.run(["sacctmgr", "-n", "list", "cluster"], check=False).returncode == 0, "slurmdbd does not answer", "slurmdbd")
            self.run(["sacctmgr", "-i", "add", "cluster", "mini"])
            for words in database.account_commands():
                self.run(words)
        self._start_controller()
        for name in self.layout.nodes:
            self._start_slurmd(name)
        self._until(lambda: set(self.run(["sinfo", "-h", "-N", "-o", "%T"], check=False).stdout.split()) == {"idle"}, "the nodes do not register", "slurmctld")

    def _start_controller(self) -> None:
        self._start("slurmctld", [self.programs["slurmctld"], "-D", "-i", "-f", str(self.conf)])
        self._until(lambda: self.run(["scontrol", "ping"], check=False).returncode == 0, "slurmctld does not answer", "slurmctld")

    def _start_slurmd(self, name: str) -> None:
        words = [self.programs["slurmd"], "-D", "-N", name, "-f", str(self.conf)]
        self._start(f"slurmd-{name}", words + (["-d", str(self.programs.stepd)] if self.programs.stepd else []), place=f"{NODES}/{name}")

    def _start(self, name: str, words: list[str], more: Mapping[str, str] | None = None, place: str = ".") -> None:
        variables = self.env() | {"MYSQL_UNIX_PORT": str(database.socket(self.folder))} | dict(more or {})
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.folder / SOCKET))
            with connection.makefile("rw") as stream:
                stream.write(json.dumps({"name": name, "command": words, "environment": variables, "place": place}) + "\n")
                stream.flush()
                reply = json.loads(stream.readline())
        if "error" in reply:
            raise ClusterError(f"{name} can't be started: {reply['error']}")

    def _until(self, condition: Callable[[], bool], complaint: str, daemon: str | None = None) -> None:
        """Wait for a condition; ClusterError with the ends of the logs after START_SECONDS, or as soon as the daemon that it needs has died."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline or (daemon is not None and daemon not in self.daemons()):
                raise ClusterError(f"{complaint}{_ends_of_logs(self.folder)}")
            time.sleep(POLL_SECONDS)


def _ends_of_logs(folder: Path) -> str:
    logs = [*sorted((folder / "log").iterdir()), folder / "munge" / "log"]
    texts = {path.name: path.read_text(errors="replace").splitlines()[-8:] for path in logs if path.exists()}
    return "".join(f"\n{name}: {line}" for name, lines in texts.items() for line in lines)
