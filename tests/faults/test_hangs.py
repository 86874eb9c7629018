"""A trainer rank that hangs in a whole run of two ranks: it is named, all stacks are in the logs, and the run goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import whole_runs as runs

HANG = ["cluster.hang_seconds=12", "cluster.restarts=1"]

@pytest.mark.parametrize("silent", [True, False], ids=["stopped", "stuck_in_a_file"])
def test_a_rank_that_hangs(calm_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    run_dir = tmp_path / "run"
    if not silent:
        monkeypatch.setenv("STUCK", "1:1:4")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([runs.STUCK, *filter(None, [os.environ.get("PYTHONPATH")])]))
    launched = runs.Launched(run_dir, *runs.TWO_RANKS, *HANG)
    if silent:
        launched.until(lambda: runs.trained(run_dir) >= 3, "step 3")
        launched.role("trainer", rank=1).send_signal(signal.SIGSTOP)
    launched.until((run_dir / "attempts/000001/exit.json").exists, "end of attempt 1")
    ending = json.loads((run_dir / "attempts/000001/exit.json").read_text())
    assert (ending["code"], ending["role"], ending["rank"], ending["node"]) == (75, "trainer", 1, socket.gethostname())
    assert ending["reason"].startswith(f"trainer 1 on node {socket.gethostname()} hangs: it {'says nothing' if silent else 'lags behind the others'}")
    logs = {rank: (run_dir / f"attempts/000001/logs/trainer.{rank}.log").read_text() for rank in (0, 1)}
    assert "distributed_c10d.py" in logs[0], "the stack of rank 0 is in its log: it waits in a collective"
    assert silent or "in audit" in logs[1]
    assert launched.wait() == 0, launched.text() + runs.logs(run_dir)
    runs.same_run(calm_two, run_dir)
