"""Rollouts alone, in two attempts: what the first sealed stays as it is, and the second goes on after it."""

from __future__ import annotations

from pathlib import Path

import whole_runs as runs

from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir, steps_in


def test_rollouts_alone_go_on_after_what_is_sealed(tmp_path: Path) -> None:
    words = ["recipes/tiny", "num_rollout=3", "warm_start.steps=0", "debug.rollout_only=true"]
    made = RunDir(tmp_path / "rollouts")
    assert "go on with: miles-submit run" in runs.run(made.path, *words, "debug.stop_after=2")
    assert steps_in(made.batches) == [1, 2]
    sealed = (made.batch(2) / "manifest.json").read_bytes()
    runs.run(made.path, *words)
    assert steps_in(made.batches) == [1, 2, 3]
    assert (made.batch(2) / "manifest.json").read_bytes() == sealed
    assert [draw for step in (1, 2, 3) for draw in read_manifest(made.batch(step)).draws] == list(range(3 * 4))
