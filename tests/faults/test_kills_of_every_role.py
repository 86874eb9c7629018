"""Death of each process, once each in one run: it goes on by itself and ends with the bits of an calm one."""

from __future__ import annotations

import json
from pathlib import Path

import whole_runs as runs

VICTIMS = {3: "worker", 4: "trainer", 5: "engine", 7: "service"}


def test_kill_9_of_every_role(calm: Path, tmp_path: Path) -> None:
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
    runs.same_run(calm, tmp_path / "run")
