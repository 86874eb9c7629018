"""Two trainer ranks through three deaths in one run: it ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import whole_runs as runs


def test_two_ranks_survive_a_killed_rank_a_killed_sync_and_a_stop_in_evaluation(tmp_path: Path) -> None:
    calm, run_dir = tmp_path / "calm", tmp_path / "run"
    runs.run(calm, *runs.TWO_RANKS)
    launched = runs.Launched(run_dir, *runs.TWO_RANKS, "cluster.restarts=4")
    launched.until(lambda: runs.trained(run_dir) >= 3, "step 3")
    launched.kill_role("trainer", rank=1)
    launched.until((run_dir / "attempts/000001/exit.json").exists, "end of attempt 1")
    assert json.loads((run_dir / "attempts/000001/exit.json").read_text())["reason"] == "trainer 1 was killed by SIGKILL"
    launched.until((run_dir / "attempts/000002/sync/version_000004").exists, "sync after step 4 in attempt 2")
    launched.kill_role("engine")
    launched.until((run_dir / "attempts/000002/exit.json").exists, "end of attempt 2")
    assert json.loads((run_dir / "attempts/000002/exit.json").read_text())["code"] == 75
    launched.until(lambda: (run_dir / "attempts/000003").exists() and runs.status(run_dir).get("kind") == "eval", "an evaluation in attempt 3")
    launched.process.send_signal(signal.SIGINT)
    assert launched.wait() == 130, launched.text()
    runs.run(run_dir, *runs.TWO_RANKS)
    runs.same_run(calm, run_dir)
