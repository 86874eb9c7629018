"""What the service tells a person about a run that has not made its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miles.config.compose import load_config
from miles.data.prompts import load_prompts
from miles.data.store.epoch import new_epoch
from miles.data.store.manifest import Manifest, Policy
from miles.data.store.run_dir import RunDir
from miles.rollout.jobs import Job
from miles.rollout.service import RolloutService


def service(tmp_path: Path, *overrides: str) -> RolloutService:
    config, run = load_config(["recipes/tiny"], overrides), RunDir(tmp_path)
    return RolloutService(config, run, new_epoch(run), load_prompts(config))


def waiting(found: RolloutService) -> Any:
    return found.status().get("waiting")


def test_every_process_that_is_waited_for_is_named(tmp_path: Path) -> None:
    found = service(tmp_path, "rollout.num_gpus=2")
    assert waiting(found) == "the trainer to start (the first start on a machine compiles kernels)"
    found.register("trainer", 0)
    assert waiting(found) == "the model to be built"
    found.values["model"] = "somewhere"
    assert waiting(found) == "the trainer to load the model"
    found.sealed["sft", 1] = Job("sft", 1), Manifest(run_id="run", epoch=1, step=1, kind="sft", policy=Policy(weight_version=0, weight_checksum=""), shards=[])
    assert waiting(found) is None, "the trainer has its first batch"
    found.announced = {"phase": "train", "kind": "sft", "step": 2}
    assert waiting(found) is None
    found.announced["phase"] = "sft"
    assert waiting(found) == "2 of 2 engines to start"
    found.register("engine", 0)
    assert waiting(found) == "1 of 2 engines to start"
    found.register("engine", 1)
    assert waiting(found) is None


def test_a_resumed_run_waits_for_trainer_and_engine_at_once(tmp_path: Path) -> None:
    found = service(tmp_path, "warm_start.steps=0", "model.build=null", "model.hf_checkpoint=somewhere")
    found.register("trainer", 0)
    assert waiting(found) == "the trainer to read the model's folder"
    found.values["model"] = "somewhere"
    assert waiting(found) == "the trainer to load the model, and an engine to start"


def test_demonstrations_have_no_speed_of_generation(tmp_path: Path) -> None:
    found = service(tmp_path)
    for job in (Job("sft", 1), Job("rollout", 3, weight_checksum="aa", next_draw=0)):
        key = job.kind, job.step
        found.jobs[key] = found._begin(job)
        found._asked = key, 0.0
        assert ("tokens_per_second" in found.status()) == (job.kind == "rollout")


def test_nobody_waits_for_engines_beside_recorded_batches(tmp_path: Path) -> None:
    found = service(tmp_path, "debug.train_only=somewhere")
    found.register("trainer", 0)
    found.values["model"] = "somewhere"
    found.announced = {"phase": "sft", "kind": "sft", "step": 2}
    assert waiting(found) is None


def test_notices_are_told_until_somebody_has_read_them(tmp_path: Path) -> None:
    found = service(tmp_path)
    found.notices += ["checkpoint passed over", "other weights"]
    assert found.notices_told == 0
    assert found.status()["notices"] == ["checkpoint passed over", "other weights"]
    assert found.notices_told == 2
