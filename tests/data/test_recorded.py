"""Recorded batches of another run: what is refused, by name, and how they are divided anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.config.compose import dump_config, load_config
from miles.config.exits import UserError
from miles.config.schema import RunConfig
from miles.data.recorded import check_recording, chosen_steps, differences, reassigned, recorded_batch
from miles.data.sample import Sample, Status
from miles.data.store.manifest import Manifest, Policy, ShardEntry, read_manifest, seal_manifest, set_aside
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import write_shard

SETTINGS = ["warm_start.steps=1", "num_rollout=2", "rollout.batch_size=2", "rollout.n_samples_per_prompt=2"]


def sample(draw: int, index: int, length: int) -> Sample:
    mask = (np.arange(length) > 0).astype(np.uint8)
    return Sample(
        draw, index, seed=1, token_id=np.arange(length, dtype=np.int32), prompt_length=1, rollout_logprob=np.full(length, -1.0, np.float32),
        loss_mask=mask, flags=mask, status=Status.COMPLETED, reward=float(index), runs=[(0, 0)], turns=[(0, 0)], engine="",
    )  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path) -> RunDir:
    """Three steps of a run of two ranks: one of the warm start, two rollouts of two draws with two samples each."""
    run = RunDir(tmp_path / "recorded")
    for step in (1, 2, 3):
        samples = [sample(2 * step + draw, index, 3 + draw + index) for draw in (0, 1) for index in (0, 1)]
        sealed = write_shard(run.batch(step) / "rollout.0.h5", samples)
        entry = ShardEntry(name=sealed.name, bytes=sealed.bytes, xxh3=sealed.xxh3, sequences=4, tokens=sum(len(each.token_id) for each in samples))
        manifest = Manifest(
            run_id="recorded", epoch=1, step=step, kind="sft" if step == 1 else "rollout", policy=Policy(weight_version=0, weight_checksum="ab"),
            shards=[entry], draws=[2 * step, 2 * step + 1], next_draw=2 * step + 2, assignment=[[[[(0, 0, 2)]], [[(0, 2, 4)]]]],
        )  # fmt: skip
        seal_manifest(run.batch(step), manifest)
    run.run_yaml.write_text(dump_config(load_config([], [*SETTINGS, "train.num_gpus_per_node=2"])))
    return run


def replay(run: RunDir, *more: str, mode: str = "train_only") -> RunConfig:
    return load_config([run.run_yaml], [f"debug.{mode}={run.path}", *more])


def refused(config: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        check_recording(config)
    return str(error.value)


def test_a_whole_recording_is_accepted(recorded: RunDir) -> None:
    check_recording(replay(recorded))
    assert recorded_batch(replay(recorded), 2) == read_manifest(recorded.batch(2))


def test_damage_is_named(recorded: RunDir) -> None:
    path = recorded.batch(2) / "rollout.0.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    line = refused(replay(recorded))
    assert line.startswith(f"{path}: xxh3 ")
    assert line.endswith("restore the file, or debug.stop_after=1 trains on those before it")
    check_recording(replay(recorded, "debug.stop_after=1"))
    path.unlink()
    assert refused(replay(recorded)).startswith(f"{path}: missing")
    assert refused(replay(recorded, mode="rescore")).endswith("choose others by debug.rescore_steps")


def test_a_batch_that_is_missing_or_set_aside_is_named(recorded: RunDir) -> None:
    set_aside(recorded.batch(3), "1")
    assert f"{recorded.batch(3)}: no recorded batch; one was set aside as step_000003.aside.1" in refused(replay(recorded))
    assert f"{recorded.batch(4)}: no recorded batch; debug.stop_after=3" in refused_step(replay(recorded, "num_rollout=4"), 4)
    assert chosen_steps(replay(recorded, mode="rescore")) == [1, 2]
    assert "step_000003: no recorded batch" in refused(replay(recorded, "debug.rescore_steps=[1, 3]", mode="rescore"))


def refused_step(config: RunConfig, step: int) -> str:
    with pytest.raises(UserError) as error:
        recorded_batch(config, step)
    return str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.num_gpus_per_node=1", ["is divided among 2 trainer ranks, and this run has 1; set train.num_gpus_per_node=2, or debug.reassign=true"]),
        ("train.num_steps_per_rollout=2", ["step_000002: is divided into 1 optimizer steps, and this run takes 2; set train.num_steps_per_rollout=1"]),
        ("warm_start.steps=2", ["step_000002: is a batch of kind rollout, and step 2 of this run is of kind sft; set warm_start.steps"]),
    ],
)
def test_another_shape_is_refused_with_the_mend(recorded: RunDir, setting: str, said: list[str]) -> None:
    more = ["train.global_batch_size=null"] if "steps_per" in setting else []
    line = refused(replay(recorded, setting, *more))
    assert all(part in line for part in said), line


def test_divided_anew_every_sequence_is_trained_on_once(recorded: RunDir) -> None:
    config = replay(recorded, "train.num_gpus_per_node=1", "train.num_steps_per_rollout=2", "train.global_batch_size=null", "debug.reassign=true")
    check_recording(config)
    found = reassigned(recorded_batch(config, 3), recorded.batch(3), config)
    assert len(found.assignment) == 2
    for step, ranks in enumerate(found.assignment):
        assert len(ranks) == 1
        rows = sorted(row for micro_batch in ranks[0] for _, first, last in micro_batch for row in range(first, last))
        assert rows == [2 * step, 2 * step + 1], "the samples of one draw, siblings together"


@pytest.mark.parametrize("mode", ["train_only", "rescore"])
def test_too_few_draws_for_the_optimizer_steps_are_found_by_check(recorded: RunDir, mode: str) -> None:
    more = ["debug.reassign=true"] if mode == "train_only" else []
    steps = ["rollout.batch_size=3", "rollout.over_sampling_batch_size=3", "train.num_steps_per_rollout=3", "train.global_batch_size=null"]
    config = replay(recorded, "train.num_gpus_per_node=1", *steps, *more, mode=mode)
    assert refused(config) == f"{recorded.batch(2)}: its 2 prompt draws can't be divided over 3 optimizer steps; lower train.num_steps_per_rollout"


def test_settings_that_change_the_bits_are_named(recorded: RunDir) -> None:
    changes: dict[str, Any] = {"train.optimizer.lr": "0.5", "algorithm.eps_clip": "0.1", "num_rollout": "1", "checkpoint.retain": "7", "cluster.port": "99"}
    assert differences(replay(recorded)) == []
    found = differences(replay(recorded, *(f"{name}={value}" for name, value in changes.items())))
    assert found == ["algorithm.eps_clip", "train.optimizer.lr"], "a constant learning rate does not depend on the number of rollouts"
    assert "train.optimizer.lr_decay_steps" in differences(replay(recorded, "num_rollout=1", "train.optimizer.lr_schedule=linear"))
