"""Resumes that cost several whole runs: past damaged checkpoints, and in a run directory that has moved."""

from __future__ import annotations

from pathlib import Path

import whole_runs as runs


def test_damaged_and_unfinished_checkpoints_are_passed_over(calm: Path, tmp_path: Path) -> None:
    launched = runs.Launched(tmp_path / "run")
    launched.until(lambda: (tmp_path / "run/checkpoints/step_000006/COMPLETE").exists(), "checkpoint 6")
    launched.end()
    launched.wait()
    newest = tmp_path / "run/checkpoints/step_000006"
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (tmp_path / "run/checkpoints/step_000007").mkdir(exist_ok=True)
    runs.run(tmp_path / "run")
    said = (tmp_path / "run/latest/logs/trainer.0.log").read_text()
    assert victim.name in said
    assert "step_000007" in said
    runs.same_run(calm, tmp_path / "run")


def test_a_run_goes_on_in_another_place(tmp_path: Path) -> None:
    """The reference of the KL loss lies in the run directory: it is found again there."""
    words = ["recipes/tiny", "warm_start.steps=1", "algorithm.use_kl_loss=true", "algorithm.kl_loss_coef=0.1", "eval.interval=null"]
    runs.run(tmp_path / "here", *words, "num_rollout=1")
    (tmp_path / "here").rename(tmp_path / "there")
    runs.run(tmp_path / "there", *words, "num_rollout=2")
    assert [line["step"] for line in runs.metrics(tmp_path / "there")] == [1, 2, 3]
    assert runs.metrics(tmp_path / "there")[-1]["train/kl_loss"] > 0
    assert not (tmp_path / "here").exists()
