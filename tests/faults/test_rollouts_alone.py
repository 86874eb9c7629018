"""Rollouts alone: in two attempts, and trained on later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import whole_runs as runs

from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir, steps_in
from miles.data.store.shard import open_shard
from miles.models.hf_folder import load_state, weight_checksum


def test_rollouts_alone_go_on_after_what_is_sealed(tmp_path: Path) -> None:
    """What the first attempt sealed stays as it is."""
    words = ["recipes/tiny", "num_rollout=3", "warm_start.steps=0", "debug.rollout_only=true"]
    made = RunDir(tmp_path / "rollouts")
    assert "go on with: miles-submit run" in runs.run(made.path, *words, "debug.stop_after=2")
    assert steps_in(made.batches) == [1, 2]
    sealed = (made.batch(2) / "manifest.json").read_bytes()
    runs.run(made.path, *words)
    assert steps_in(made.batches) == [1, 2, 3]
    assert (made.batch(2) / "manifest.json").read_bytes() == sealed
    assert [draw for step in (1, 2, 3) for draw in read_manifest(made.batch(step)).draws] == list(range(3 * 4))


def test_rollouts_alone_and_then_training_on_them(tmp_path: Path) -> None:
    """All batches by the first weights; trained on later, the weights differ from the second rollout on, which is said once."""
    words = ["recipes/tiny", "num_rollout=3", "warm_start.steps=0", "eval.interval=1", "algorithm.entropy_coef=0.01", "debug.rollout_only=true"]
    made = RunDir(tmp_path / "rollouts")
    runs.run(made.path, *words)
    assert steps_in(made.batches) == [1, 2, 3]
    manifests = [read_manifest(made.batch(step)) for step in (1, 2, 3)]
    first = weight_checksum(load_state(made.path / "model"))
    assert {(manifest.policy.weight_version, manifest.policy.weight_checksum) for manifest in manifests} == {(0, first)}
    assert [draw for manifest in manifests for draw in manifest.draws] == list(range(3 * 4))
    lines = runs.metrics(made.path)
    assert [(line["kind"], line["step"]) for line in lines] == [("eval", 0), ("rollout", 1), ("rollout", 2), ("rollout", 3)]
    for line, manifest in zip(lines[1:], manifests, strict=True):
        with open_shard(made.batch(manifest.step) / manifest.shards[0].name) as shard:
            assert line["rollout/raw_reward"] == np.mean(shard.sequences()["reward"], dtype=np.float64)
    assert not any((made.path / name).exists() for name in ("checkpoints", "train", "hf"))

    trained = tmp_path / "trained"
    said = runs.run(trained, str(made.run_yaml), "debug.rollout_only=false", f"debug.train_only={made.path}")
    notices = [line for line in (trained / "latest/logs/trainer.0.log").read_text().splitlines() if "made the recorded batch" in line]
    assert len(notices) == 1, said
    assert f"step 2: weights {first} made the recorded batch" in notices[0]
    assert said.count("made the recorded batch") == 1, said
    assert [line["step"] for line in runs.metrics(trained)] == [1, 2, 3]

    shard = made.batch(3) / "rollout.0.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused = runs.Launched(tmp_path / "refused", str(made.run_yaml), "debug.rollout_only=false", f"debug.train_only={made.path}")
    assert refused.wait() == 78
    assert f"{shard}: xxh3 " in refused.text()
    assert not (tmp_path / "refused").exists(), "nothing was started"
