"""A run over two nodes that is stopped and loses one of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import whole_runs as runs

from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir


def test_two_nodes_interrupted_and_a_supervisor_killed(calm_two: Path, tmp_path: Path) -> None:
    """Two nodes of one rank, engine and worker each have the bits of one node of two ranks, also after a stop and the loss of a node."""
    run_dir, words = tmp_path / "run", runs.TWO_NODES
    launched = runs.Launched(run_dir, *words)
    launched.until(lambda: runs.trained(run_dir) >= 4, "step 4")
    os.killpg(launched.process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    assert launched.wait() == 130
    assert (run_dir / f"checkpoints/step_{runs.trained(run_dir):06d}/COMPLETE").exists()
    assert f"resume with: miles-submit run {run_dir}" in launched.text()
    assert 4 <= runs.trained(run_dir) < 8
    launched = runs.Launched(run_dir, *words)
    launched.until(lambda: (run_dir / "attempts/000002").exists() and runs.status(run_dir).get("phase") == "generate", "generation in attempt 2")
    launched.kill_supervisor("worker", rank=1)
    launched.until((run_dir / "attempts/000002/exit.json").exists, "end of attempt 2")
    ending = json.loads((run_dir / "attempts/000002/exit.json").read_text())
    assert (ending["code"], ending["reason"]) == (75, "the supervisor of component rollout on node 1 was killed")
    assert launched.wait() == 0, launched.text() + runs.logs(run_dir)
    runs.same_run(calm_two, run_dir)
    workers = {entry.name for step in range(3, 9) for entry in read_manifest(RunDir(run_dir).batch(step)).shards}
    assert workers == {"rollout.0.h5", "rollout.1.h5"}, "both nodes made samples"
    assert {path.name for path in RunDir(run_dir).train(8).iterdir()} == {"node_0000.h5", "node_0001.h5"}
