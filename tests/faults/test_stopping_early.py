"""A run that stops after a step and goes on, with traces of two of its steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import whole_runs as runs

from miles.data.store.run_dir import RunDir


def test_stopping_early_and_tracing_leave_the_bits_alone(calm: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    said = runs.run(run_dir, *runs.STEPS, "debug.stop_after=5", "profile.steps=[5, 6]")
    assert f"stopped after step 5 of 8 (debug.stop_after); go on with: miles-submit run {run_dir} debug.stop_after=null" in said
    assert (run_dir / "checkpoints/step_000005/COMPLETE").exists()
    assert not (run_dir / "hf").exists()
    assert json.loads((run_dir / "latest/exit.json").read_text())["reason"] == "stopped after step 5 (debug.stop_after)"
    runs.run(run_dir, *runs.STEPS, "profile.steps=[5, 6]")
    runs.same_run(calm, run_dir)

    assert sorted(path.name for path in (run_dir / "profile").iterdir()) == ["step_000005", "step_000006"]
    for step in (5, 6):
        with gzip.open(RunDir(run_dir).profile(step) / "rank_0.json.gz", "rt") as file:
            names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
        assert "aten::embedding" in names
        assert sum(name.startswith("Optimizer.step") for name in names) == 1
