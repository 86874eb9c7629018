"""Debug modes: training alone has the bits of the live run (the others are with the long tests)."""

from __future__ import annotations

from pathlib import Path

import whole_runs as runs

from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir


def logs_of(run_dir: Path) -> set[str]:
    """Names of the logs of all attempts."""
    return {path.name for path in run_dir.glob("attempts/*/logs/*.log")}


def test_training_alone_has_the_bits_of_the_live_run(undisturbed_two: Path, tmp_path: Path) -> None:
    """Two ranks, two optimizer steps a rollout, a KL reference made after the warm start: losses, records and weights."""
    live = [line for line in runs.metrics(undisturbed_two) if line["kind"] != "eval"]
    assert any(line.get("train/kl_loss", 0.0) > 0 for line in live)
    assert len(read_manifest(RunDir(undisturbed_two).batch(3)).assignment) == 2

    replay = tmp_path / "replay"
    said = runs.run(replay, str(undisturbed_two / "run.yaml"), f"debug.train_only={undisturbed_two}")
    assert "warning" not in said
    assert runs.metrics(replay) == live
    assert runs.train_records(replay) == runs.train_records(undisturbed_two)
    assert runs.weights(replay) == runs.weights(undisturbed_two)
    assert logs_of(replay) == {"service.0.log", "trainer.0.log", "trainer.1.log"}
    assert not (replay / "batches").exists()
