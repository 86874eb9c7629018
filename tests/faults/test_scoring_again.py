"""Recorded batches scored again: the recorded weights give the recorded bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import whole_runs as runs

from miles.data.store.events import read_events
from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import open_shard
from miles.data.store.train_record import open_train_record


def logs_of(run_dir: Path) -> set[str]:
    """Names of the logs of all attempts."""
    return {path.name for path in run_dir.glob("attempts/*/logs/*.log")}


def trained_tokens(run_dir: Path, step: int) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    """(shard, row) -> bits of log-prob and entropy of every token, as recorded by whichever rank."""
    found = {}
    for path in RunDir(run_dir).train(step).glob("*.h5"):
        with open_train_record(path) as record:
            table = record.sequences()
            for i, place in enumerate(zip(table["shard"].tolist(), table["row"].tolist(), strict=True)):
                values = record.tokens(i, i + 1, ["train_logprob", "entropy"])
                found[place] = values["train_logprob"].tobytes(), values["entropy"].tobytes()
    return found


def test_scoring_again_has_the_recorded_bits(calm: Path, tmp_path: Path) -> None:
    """The weights after step 6 are those that training saw at step 7; step 4 was made by others. On two ranks, where one trained."""
    scored = tmp_path / "scored"
    checkpoint = RunDir(calm).checkpoint(6)
    words = [str(calm / "run.yaml"), f"debug.rescore={calm}", f"checkpoint.load={checkpoint}", "train.num_gpus_per_node=2"]
    runs.run(scored, *words, "debug.rescore_steps=[4, 7]")
    assert trained_tokens(scored, 7) == trained_tokens(calm, 7)
    assert trained_tokens(scored, 4) != trained_tokens(calm, 4)

    four, seven = runs.metrics(scored)
    assert (four["step"], seven["step"]) == (4, 7)
    waits = [event["step"] for event in read_events(RunDir(scored)) if event["phase"] == "wait"]
    assert sorted(waits) == [4, 4, 7, 7], "of each rank"
    assert seven["train/train_rollout_logprob_abs_diff"] == 0.0
    folder = RunDir(calm).batch(4)
    k3 = []
    with open_shard(folder / read_manifest(folder).shards[0].name) as shard:
        for (_, row), (logprob, _) in trained_tokens(scored, 4).items():
            tokens = shard.tokens(row, row + 1, ["rollout_logprob", "loss_mask"])
            d = (np.frombuffer(logprob, np.float32) - tokens["rollout_logprob"])[tokens["loss_mask"] != 0].astype(np.float64)
            k3 += (np.exp(d) - d - 1).tolist()
    assert np.mean(k3) > 0
    np.testing.assert_allclose(four["train/train_rollout_kl"], np.mean(k3), rtol=1e-3)
    assert logs_of(scored) == {"service.0.log", "trainer.0.log", "trainer.1.log"}
