"""Twenty recorded steps trained on again, killed on the way: the same losses, records and weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import whole_runs as runs


def test_twenty_recorded_steps_have_the_same_bits_again(tmp_path: Path) -> None:
    live, replay = tmp_path / "live", tmp_path / "replay"
    runs.run(live, *runs.TWO_RANKS, "warm_start.steps=3", "num_rollout=17")
    trained = [line for line in runs.metrics(live) if line["kind"] != "eval"]
    assert [line["step"] for line in trained] == list(range(1, 21))
    assert len({line["train/loss"] for line in trained}) == 20, "every step has a loss of its own"

    launched = runs.Launched(replay, str(live / "run.yaml"), f"debug.train_only={live}")
    launched.until(lambda: runs.trained(replay) >= 9, "step 9")
    launched.kill_role("trainer", rank=1)
    assert launched.wait() == 0, launched.text() + runs.logs(replay)
    assert (replay / "attempts/000002").exists()
    assert runs.metrics(replay) == trained
    assert runs.train_records(replay) == runs.train_records(live)
    assert runs.weights(replay) == runs.weights(live)
