"""Death of each process, once each in one run: it goes on by itself and ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import whole_runs as runs

VICTIMS = {3: "worker", 4: "trainer", 5: "engine", 7: "service"}


def test_kill_9_of_every_role(undisturbed: Path, tmp_path: Path) -> None:
    launched = runs.Launched(tmp_path / "run", *runs.STEPS, "cluster.restarts=4")
    for attempt, (step, role) in enumerate(VICTIMS.items(), 1):
        launched.until(
            lambda step=step, attempt=attempt: runs.trained(tmp_path / "run") >= step and len(list((tmp_path / "run").glob("attempts/0*"))) == attempt,
            f"step {step} of attempt {attempt}",
        )
        launched.kill_role(role)
        launched.until(lambda attempt=attempt: (tmp_path / "run" / f"attempts/{attempt:06d}/exit.json").exists(), f"end of attempt {attempt}")
        ending = json.loads((tmp_path / "run" / f"attempts/{attempt:06d}/exit.json").read_text())
        assert ending["code"] == 75, ending
    assert launched.wait() == 0, launched.text() + runs.logs(tmp_path / "run")
    runs.same_run(undisturbed, tmp_path / "run")


def test_interrupt_saves_and_resumes(undisturbed: Path, tmp_path: Path) -> None:
    launched = runs.Launched(tmp_path / "run")
    launched.until(lambda: runs.trained(tmp_path / "run") >= 4, "step 4")
    os.killpg(launched.process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    assert launched.wait() == 130
    assert (tmp_path / f"run/checkpoints/step_{runs.trained(tmp_path / 'run'):06d}/COMPLETE").exists()
    assert f"resume with: miles-submit run {tmp_path / 'run'}" in launched.text()
    assert 4 <= runs.trained(tmp_path / "run") < 8
    runs.run(tmp_path / "run")
    runs.same_run(undisturbed, tmp_path / "run")
