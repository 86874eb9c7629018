"""A stop while Slurm's controller stands still: the run hears of it at once, and nothing waits for Slurm's answer."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from miles.config.compose import dump_config, load_config
from miles.data.store.files import read_json
from miles.data.store.run_dir import RunDir
from miles.slurm.attempt import Attempt
from miles.slurm.job_here import JobHere
from miles.slurm.launch import start_here
from miles.slurm.minicluster import Cluster
from miles.slurm.signals import Signals
from miles.slurm.trainer_job import TrainerJob


@pytest.fixture
def signals() -> Iterator[Signals]:
    """Ours, for as long as a test lasts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    yield Signals()
    for number, handler in before.items():
        signal.signal(number, handler)


class Listener(BaseHTTPRequestHandler):
    """Stands at the service's address, and notes what it is told, and whether Slurm had been asked by then."""

    heard: list[tuple[str, bool]]
    slurm_asked: Path

    def do_POST(self) -> None:
        self.heard.append((self.path, self.slurm_asked.exists()))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *words: Any) -> None:
        pass


def test_a_stop_does_not_wait_for_the_controller(slurm: Cluster, signals: Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm.env().items():
        monkeypatch.setenv(name, value)
    number = int(slurm.run(["sbatch", "--parsable", "--hold", "--output=/dev/null", "--partition=cpu", "--wrap=true"]).stdout)
    run, said = RunDir(tmp_path), []
    config = load_config(["recipes/tiny"], ["cluster.executor=slurm", "cluster.slurm.lead_seconds=100"])
    run.run_yaml.write_text(dump_config(config))
    attempt = Attempt(run, config, said.append, start_here)
    job = TrainerJob(run, config, JobHere(number, (("cpu0",),), 0), signals, said.append)
    host, port = attempt.meeting.url.removeprefix("http://").split(":")
    heard: list[tuple[str, bool]] = []
    slurm_asked = tmp_path / "slurm_asked"
    server = HTTPServer((host, int(port)), type("Mine", (Listener,), {"heard": heard, "slurm_asked": slurm_asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(f"#!/bin/sh\ntouch {slurm_asked}\nexec {shutil.which('squeue')} \"$@\"\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    controller = slurm.daemons()["slurmctld"]
    controller.kill(signal.SIGSTOP)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        asked = time.monotonic()
        job.pass_on(attempt)
        assert time.monotonic() - asked < 8  # as long as squeue itself would wait
    finally:
        controller.kill(signal.SIGCONT)
        server.shutdown()
        slurm.run(["scancel", str(number)])
    assert heard == [("/stop", False)], "before Slurm is asked anything"
    assert slurm_asked.exists()
    assert attempt.stop_told is not None
    assert said[-1] == "asked to stop: saving, for at most 70 s"
    assert (read_json(attempt.folder / "stop.json")["by"], read_json(attempt.folder / "stop.json")["time_is_up"]) == ("slurm", False)
