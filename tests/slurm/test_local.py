"""The local executor with real submitit jobs: results, a killed component, a component that survives Ctrl-C, a stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from miles.cli.run import refuse_foreign
from miles.config.exits import TryAgain, UserError
from miles.data.store.epoch import new_epoch
from miles.data.store.run_dir import RunDir
from miles.run.service import listen
from miles.slurm.local import LocalComponent, LocalRunner
from miles.slurm.meeting import hold_port
from miles.slurm.sole import refuse_if_running


def wait_for(path: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def ended(component: LocalComponent, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while component.running():
        assert time.monotonic() < deadline, "the component goes on"
        time.sleep(0.02)


def sleeper(tmp_path: Path) -> LocalComponent:
    component = LocalRunner(tmp_path / "jobs").submit("sleeper", "slow_component.wait", str(tmp_path / "up"))
    wait_for(tmp_path / "up")
    return component


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "slow_component.py").write_text(
        "import pathlib, time\n"
        "def add(a, b): return {'code': 0, 'reason': str(a + b)}\n"
        "def wait(path):\n    pathlib.Path(path).touch()\n    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_function_by_its_import_name(tmp_path: Path) -> None:
    component = LocalRunner(tmp_path / "jobs").submit("adder", "slow_component.add", 40, 2)
    ended(component)
    assert component.outcome() == {"code": 0, "reason": "42"}


def test_interrupt_of_the_terminal_does_not_reach_components(tmp_path: Path) -> None:
    component = sleeper(tmp_path)
    for process in psutil.Process(component.jobs[0]._process.pid).children(recursive=True):  # type: ignore[union-attr]
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert component.running()
    component.kill()
    assert not component.running()


def test_a_killed_component_says_try_again(tmp_path: Path) -> None:
    component = sleeper(tmp_path)
    children = psutil.Process(component.jobs[0]._process.pid).children(recursive=True)  # type: ignore[union-attr]
    component.kill()
    outcome = component.outcome()
    assert outcome["code"] == 75
    assert "sleeper" in outcome["reason"]
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert gone


def test_port_in_use_is_one_line() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cluster.port: 127.0.0.1:{port} can't be used .*; choose another, or 0"):
            hold_port("127.0.0.1", port)


def test_a_held_port_is_given_to_nobody_else() -> None:
    """Neither to a server nor to a connection that takes any, even where that port alone is left to them; whoever wants this one can listen there."""
    import socket
    import struct

    own_range = 51  # IP_LOCAL_PORT_RANGE, of Linux 6.3

    def takes_any(of: int) -> list[int]:
        found = []
        for take in (lambda made: made.bind(("127.0.0.1", 0)), lambda made: made.connect(server.getsockname())):
            with socket.socket() as made:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.setsockopt(socket.IPPROTO_IP, own_range, struct.pack("I", of << 16 | of))
                with contextlib.suppress(OSError):
                    take(made)
                    found.append(made.getsockname()[1])
        return found

    with socket.create_server(("127.0.0.1", 0)) as server, hold_port("127.0.0.1", 0) as holder:
        port = holder.getsockname()[1]
        listen("127.0.0.1", port).close()
        try:
            assert takes_any(port) == []
        except OSError:
            pytest.skip("this kernel gives no socket a range of its own")
        holder.close()
        assert takes_any(port)[:1] == [port]


def test_a_free_port_that_is_lost_is_no_mistake_of_the_users() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=r"cluster.port: can't serve at"):
            listen("127.0.0.1", port)
        with pytest.raises(TryAgain, match="the next attempt takes another"):
            listen("127.0.0.1", port, chosen=False)


@pytest.mark.parametrize("left", [{}, {"token": "secret"}, {"token": "secret", "service.json": ""}, {"token": "secret", "service.json": '{"url": "http://127.0.0.1:9", "run_dir": "RUN"}'}])
def test_a_launcher_killed_while_it_made_an_attempt_holds_nobody_up(tmp_path: Path, left: dict[str, str]) -> None:
    run = RunDir(tmp_path)
    epoch = new_epoch(run)
    for name, content in left.items():
        (run.attempt(epoch) / name).write_text(content.replace("RUN", str(tmp_path)))
    refuse_if_running(run)


def test_a_launcher_killed_while_it_wrote_run_yaml_holds_nobody_up(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".run.yaml.17.abcd.tmp").write_text("name: ti")
    refuse_foreign(run_dir)
    (run_dir / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty, and not a run"):
        refuse_foreign(run_dir)
