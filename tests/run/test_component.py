"""The supervisor, with real processes: shared fate, the primary's end, and what is said of a failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles.config.address import is_loopback
from miles.run.component import RoleProcess, stop, watch

FOREVER = "import time; time.sleep(600)"


def process(folder: Path, name: str, code: str, rank: int = 0) -> RoleProcess:
    log = (folder / f"{name}.{rank}.log").open("ab")
    return RoleProcess(name, rank, subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log), log)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "attempts" / "000001" / "logs").mkdir(parents=True)
    return tmp_path


def test_primary_end_finishes_and_the_rest_is_stopped(run_dir: Path) -> None:
    roles = [process(run_dir, "service", FOREVER), process(run_dir, "trainer", "pass")]
    assert watch(roles, "trainer", run_dir, 1) == {"code": 0, "role": "trainer", "rank": 0, "reason": "finished", "killed": False}
    stop(roles)
    assert roles[0].code == -signal.SIGTERM


def test_a_killed_role_means_try_again_and_is_named(run_dir: Path) -> None:
    roles = [process(run_dir, "engine", FOREVER), process(run_dir, "worker", FOREVER)]
    os.kill(roles[0].process.pid, signal.SIGKILL)
    outcome = watch(roles, "worker", run_dir, 1)
    stop(roles)
    assert (outcome["code"], outcome["reason"]) == (75, "engine 0 was killed by SIGKILL")


def test_a_users_mistake_outweighs_its_echoes(run_dir: Path) -> None:
    line = "data.prompt_data: no such file"
    (run_dir / "attempts" / "000001" / "logs" / "fault.worker.0.json").write_text(json.dumps({"code": 78, "role": "worker", "rank": 0, "message": line}))
    roles = [process(run_dir, "engine", "raise SystemExit(75)"), process(run_dir, "worker", "import time; time.sleep(0.05); raise SystemExit(78)")]
    outcome = watch(roles, "worker", run_dir, 1)
    stop(roles)
    assert (outcome["code"], outcome["role"], outcome["reason"]) == (78, "worker", line)


def test_the_one_that_holds_the_run_up_outweighs_those_that_it_ended(run_dir: Path) -> None:
    """The service is still there, for those who ask, when the first trainer has heard and left."""
    left = {"code": 75, "role": "trainer", "rank": 5, "node": "train3", "message": "trainer 5 on node train3 hangs"}
    (run_dir / "attempts" / "000001" / "logs" / "fault.service.0.json").write_text(json.dumps(left))
    roles = [process(run_dir, "service", FOREVER), process(run_dir, "trainer", "raise SystemExit(75)")]
    outcome = watch(roles, "trainer", run_dir, 1)
    stop(roles)
    assert (outcome["code"], outcome["rank"], outcome["node"], outcome["reason"]) == (75, 5, "train3", "trainer 5 on node train3 hangs")


def test_a_bug_names_its_log(run_dir: Path) -> None:
    roles = [process(run_dir, "service", FOREVER), process(run_dir, "trainer", "raise RuntimeError('bug')", rank=1)]
    outcome = watch(roles, "trainer", run_dir, 1)
    stop(roles)
    assert outcome["code"] == 1
    assert "attempts/000001/logs/trainer.1.log" in outcome["reason"]


def test_a_role_that_ignores_the_request_is_killed(run_dir: Path) -> None:
    stubborn = process(run_dir, "engine", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)")
    while not (run_dir / "engine.0.log").read_text():
        time.sleep(0.02)
    stop([stubborn], grace=0.3)
    assert stubborn.code == -signal.SIGKILL


def test_a_killed_rank_outweighs_the_exception_that_it_caused(run_dir: Path) -> None:
    first = process(run_dir, "trainer", "raise SystemExit(1)", rank=0)
    second = process(run_dir, "trainer", FOREVER, rank=1)
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait()
    first.process.wait()
    service = process(run_dir, "service", FOREVER)
    outcome = watch([service, first, second], "trainer", run_dir, 1)
    stop([service])
    assert (outcome["code"], outcome["reason"]) == (75, "trainer 1 was killed by SIGKILL")


@pytest.mark.parametrize(("host", "yes"), [("127.0.0.1", True), ("127.3.2.1", True), ("localhost", True), ("::1", True), ("10.0.0.1", False), ("0.0.0.0", False), ("node7", False)])
def test_loopback(host: str, yes: bool) -> None:
    assert is_loopback(host) is yes
