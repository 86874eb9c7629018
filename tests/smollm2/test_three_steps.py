"""Three GRPO steps of the recipe through the command line: they complete, in 8 GB, with a signal and without any mismatch."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import memory
import numpy as np
import pytest
from safetensors import safe_open

from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import open_shard
from miles.data.store.train_record import open_train_record

LIMIT = 8e9  # bytes, of all processes together


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The run's folder and the greatest memory of all its processes together [bytes]."""
    folder = tmp_path_factory.mktemp("smollm2")
    run_dir = folder / "run"
    command = [sys.executable, "-m", "miles.cli", "run", "recipes/smollm2_135m", f"model.hf_checkpoint={model_folder}", "--run-dir", str(run_dir)]
    code, most, each = memory.watch(command, folder / "output")
    logs = "\n".join(path.read_text()[-1500:] for path in sorted(run_dir.glob("attempts/*/logs/*")))
    assert code == 0, f"exit code {code}\n{(folder / 'output').read_text()}\n{logs}"
    print(f"\npeak memory {most / 1e9:.2f} GB:", ", ".join(f"{role} {size / 1e9:.2f}" for role, size in sorted(each.items())))
    for path in sorted((run_dir / "events").glob("*.jsonl")):
        for event in map(json.loads, path.read_text().splitlines()):
            seconds = event["end"] - event["start"]
            speed = f", {event['tokens'] / seconds:.0f} tokens/s" if event.get("tokens") else ""
            print(f"{path.name.split('.')[0]:>8} step {event['step']}: {event['phase']} {seconds:.1f} s{speed}")
    return run_dir, most


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def test_all_processes_together_stay_under_8_gb(finished: tuple[Path, int]) -> None:
    assert 2e9 < finished[1] < LIMIT, "weights, gradients and AdamW's moments alone are 2.2 GB"


def test_mismatch_is_exactly_zero_over_every_token(finished: tuple[Path, int]) -> None:
    """The bits of the decode step that sampled a token, as the shard holds them, against the trainer's recomputed ones."""
    folder, compared = RunDir(finished[0]), 0
    for step in (1, 2, 3):
        manifest = read_manifest(folder.batch(step))
        shards = [open_shard(folder.batch(step) / entry.name) for entry in manifest.shards]
        (path,) = folder.train(step).glob("*.h5")
        with open_train_record(path) as record:
            table = record.sequences()
            offset = table["offset"].astype(int)
            trained = record.tokens(0, len(offset) - 1, ["train_logprob"])["train_logprob"]
            for i, (shard, row) in enumerate(zip(table["shard"], table["row"], strict=True)):
                rollout = shards[shard].tokens(int(row), int(row) + 1, ["rollout_logprob"])["rollout_logprob"]
                generated = ~np.isnan(rollout)
                assert rollout[generated].tobytes() == trained[offset[i] : offset[i + 1]][generated].tobytes()
                compared += int(generated.sum())
    assert compared == sum(line["train/mismatch_tokens"] for line in lines(finished[0], "rollout")) > 1000
    print(f"\n{compared} log-probs have the same bits")


def test_metrics_are_sane(finished: tuple[Path, int]) -> None:
    steps = lines(finished[0], "rollout")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        print(f"\nstep {line['step']}: reward {line['rollout/raw_reward']:.3f}, entropy {line['train/entropy_loss']:.2f}, gradient {line['train/grad_norm']:.2f}")
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert line["rollout/samples"] == 32
        assert 0.5 < line["train/entropy_loss"] < 5.0  # an even choice among 49152 tokens: 10.8
        assert 0.01 < line["train/grad_norm"] < 100
        assert line["train/train_rollout_equal_bits"] == 1.0
        assert line["train/ppo_kl"] == line["train/pg_clipfrac"] == 0.0, "one optimizer step a rollout is on-policy"
    assert 0.05 < np.mean([line["rollout/raw_reward"] for line in steps]) < 0.95, "right now and then"
    assert np.mean([line["rollout/zero_std/ratio"] for line in steps]) <= 0.5, "most groups hold right and wrong responses"
    before, after = lines(finished[0], "eval")
    assert (before["step"], after["step"]) == (0, 3)
    assert before["eval/n"] == after["eval/n"] >= 25
    assert before["eval/accuracy"] > 0.2


def test_the_weights_moved_a_little(finished: tuple[Path, int], model_folder: Path) -> None:
    """AdamW moves a weight by about the learning rate a step: 3 steps of 1e-5."""
    with safe_open(model_folder / "model.safetensors", "np") as old, safe_open(finished[0] / "hf" / "model.safetensors", "np") as new:
        assert sorted(old.keys()) == sorted(new.keys())
        moved = {name: float(np.abs(new.get_tensor(name) - old.get_tensor(name)).max()) for name in new.keys()}  # noqa: SIM118  (not a mapping)
    assert min(moved.values()) > 1e-6
    assert max(moved.values()) < 1e-4
