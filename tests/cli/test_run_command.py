"""What `miles-submit run` is asked for: a recipe or a run directory, and what an existing run keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.cli.run import asked_for, differences
from miles.config.compose import dump_config, load_config
from miles.data.store.results import has_results
from miles.data.store.run_dir import RunDir

LINEAR = ["train.optimizer.lr_schedule=linear", "train.optimizer.lr_warmup_steps=2"]


@pytest.fixture
def linear(tmp_path: Path) -> RunDir:
    """A run of 10 rollouts, with a line of metrics."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.run_yaml.write_text(dump_config(load_config(["recipes/tiny"], ["num_rollout=10", *LINEAR])))
    run.metrics.write_text('{"step": 1, "kind": "rollout"}\n')
    return run


def test_a_run_extended_by_its_recipe_keeps_its_decay(linear: RunDir) -> None:
    old = load_config([linear.run_yaml])
    assert old.train.optimizer.lr_decay_steps == 8
    _, longer = asked_for(["recipes/tiny", *LINEAR, "--num-rollout", "15"], linear.path)
    assert (longer.num_rollout, longer.train.optimizer.lr_decay_steps) == (15, 8)
    assert differences(old, longer) == []
    _, other = asked_for(["recipes/tiny", *LINEAR, "num_rollout=15", "train.optimizer.lr_decay_steps=13"], linear.path)
    assert differences(old, other) == ["train.optimizer.lr_decay_steps"]
    _, iterations = asked_for(["recipes/tiny", *LINEAR, "num_rollout=15", "--lr-decay-iters", "15"], linear.path)
    assert differences(old, iterations) == ["train.optimizer.lr_decay_steps"]
    linear.metrics.unlink()
    _, fresh = asked_for(["recipes/tiny", *LINEAR, "num_rollout=15"], linear.path)
    assert fresh.train.optimizer.lr_decay_steps == 13


@pytest.mark.parametrize("words", [["num_rollout=90"], ["--num-rollout", "90"], ["--num-rollout=90"], ["--num-rollout", "7", "num_rollout=90"]])
def test_a_run_directory_takes_overrides_and_flags(linear: RunDir, words: list[str]) -> None:
    for line in ([str(linear.path), *words], [*words, str(linear.path)]):
        folder, config = asked_for(line, None)
        assert folder.path == linear.path
        assert config.num_rollout == 90
        assert differences(load_config([linear.run_yaml]), config) == []


def test_what_counts_as_a_result(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not has_results(run)
    run.attempt(1).mkdir(parents=True)
    run.journal.mkdir(parents=True)
    run.journal_file(0, 1).touch()
    run.checkpoint(3).mkdir(parents=True)
    run.batch(2).mkdir()
    run.metrics.touch()
    assert not has_results(run), "begun, and nothing done"
    for path in (run.metrics, run.journal_file(0, 1), run.checkpoint(3) / "COMPLETE", run.batch(2) / "manifest.json"):
        before = path.read_bytes() if path.exists() else None
        path.write_text("damaged")
        assert has_results(run), path
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert not has_results(run)
