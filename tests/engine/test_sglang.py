"""SGLang's start: the run's token is neither in its command line nor in the log; the child does not outlive the role."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from miles.config.schema import RunConfig
from miles.engine import sglang
from miles.engine.child import around_proxies

TOKEN = "secret-of-the-run"
# Where SGLang would be: prints what its server prints at its start, then sleeps.
SERVER = """
import pathlib, sys, time
print("server_args=ServerArgs(api_key=%r)" % pathlib.Path(sys.argv[sys.argv.index("--config") + 1]).read_text(), flush=True)
time.sleep(600)
"""
ROLE = """
import sys, time
from pathlib import Path
from miles.config.schema import RunConfig
from miles.engine import sglang
server = sglang.start(RunConfig(), "model", "127.0.0.1", 1234, sys.argv[1], Path(sys.argv[2]))
print(server.process.pid, flush=True)
time.sleep(600)
"""
# One that refuses its arguments, and leaves it to a process of its own to say why, a little later.
REFUSES = """
import os, sys, time
if os.fork() == 0:
    time.sleep(2)
    print("last words", flush=True)
    os._exit(0)
sys.exit(2)
"""
STARTS = """
import sys
from pathlib import Path
from miles.config.schema import RunConfig
from miles.engine import sglang
sglang.wait_ready(sglang.start(RunConfig(), "model", "127.0.0.1", 9, "token", Path(sys.argv[1])), "http://127.0.0.1:9")
"""
RELAYS = """
import os, subprocess, sys
from miles.engine.child import relay
talker = subprocess.Popen([sys.executable, "-c", "for _ in range(20000): print('a line of some length, and many of them')"], stdout=subprocess.PIPE)
relay(talker.stdout, "token")
os._exit(talker.wait(60))
"""


def installed(folder: Path, server: str) -> dict[str, str]:
    """Environment in which `server` is what sglang.launch_server runs."""
    package = folder / "packages" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(server)
    return {**os.environ, "PYTHONPATH": f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def test_arguments_do_not_have_the_token() -> None:
    config = RunConfig.model_validate({"rollout": {"num_gpus_per_engine": 2, "sglang": {"mem_fraction_static": 0.5, "disable_radix_cache": True}}})
    words = sglang.arguments(config, "folder", "::1", 77)
    assert "--api-key" not in words
    assert words[words.index("--tp-size") + 1] == "2"
    assert words[words.index("--mem-fraction-static") + 1] == "0.5"
    assert "--disable-radix-cache" in words


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_token_stays_private_and_the_child_dies_with_the_role(tmp_path: Path, how: signal.Signals) -> None:
    env = installed(tmp_path, SERVER)
    private, log = tmp_path / "sglang.0.yaml", tmp_path / "log"
    private.write_text("an older one")
    with log.open("wb") as out:
        role = subprocess.Popen([sys.executable, "-c", ROLE, TOKEN, str(private)], stdout=out, stderr=out, env=env)
    deadline = time.monotonic() + 60
    while "server_args" not in log.read_text():
        assert role.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert yaml.safe_load(private.read_text()) == {"api-key": TOKEN}
    assert TOKEN not in log.read_text()
    assert "[token]" in log.read_text()
    (child,) = psutil.Process(role.pid).children()
    assert TOKEN not in " ".join(child.cmdline())
    assert "sglang.launch_server" in child.cmdline()
    role.send_signal(how)
    role.wait(30)
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it outlives the role"
        time.sleep(0.02)


def test_last_lines_of_a_server_that_ends_are_in_the_log(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STARTS, str(tmp_path / "sglang.0.yaml")], env=installed(tmp_path, REFUSES), capture_output=True, text=True)
    assert "UserError: rollout.sglang: SGLang refused its arguments" in done.stderr
    assert done.stdout == "last words\n"


def test_a_child_is_heard_out_when_the_log_is_full() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", RELAYS], stdout=full, stderr=subprocess.PIPE, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({}, ("::1", "::1")),
        ({"NO_PROXY": "a.example"}, ("a.example,::1", "a.example,::1")),
        ({"NO_PROXY": "a.example", "no_proxy": "b.example,c"}, ("a.example,::1", "b.example,c,::1")),
        ({"no_proxy": "*"}, ("*", "*")),
    ],
)
def test_hosts_that_need_no_proxy_stay(monkeypatch: pytest.MonkeyPatch, present: dict[str, str], expected: tuple[str, str]) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in present.items():
        monkeypatch.setenv(name, value)
    found = around_proxies("::1")
    assert (found["NO_PROXY"], found["no_proxy"]) == expected
