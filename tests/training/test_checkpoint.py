"""Damaged, unfinished and hostile checkpoints; retention; fencing."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import tiny
import torch

from miles.config.exits import UserError
from miles.data.store.checkpoint import verify_checkpoint
from miles.data.store.epoch import Fence, Fenced, new_epoch
from miles.data.store.files import Damaged, checksum
from miles.data.store.run_dir import RunDir
from miles.training.checkpoint import newest_good, retain, write_checkpoint
from miles.training.dcp import load_tensors, read_metadata, save_tensors
from miles.training.fsdp import FsdpTrainer
from miles.training.rng import load_rng, save_rng


def write_one(folder, step, ranks, text="weights", fence=None):
    def write(draft):
        (draft / "model").mkdir()
        (draft / "model" / "data").write_text(text)

    return write_checkpoint(folder, step, ranks, write, {"step": step, "progress": {}}, fence)


def test_complete_names_every_file(ranks, tmp_path):
    folder = write_one(tmp_path / "checkpoints", 10, ranks)
    assert folder.name == "step_000010"
    listing = json.loads((folder / "COMPLETE").read_text())
    assert listing["schema"] == "miles.checkpoint/1"
    assert [entry["name"] for entry in listing["files"]] == ["model/data", "state.json"]
    assert listing["files"][0]["bytes"] == 7
    assert listing["files"][0]["xxh3"] == checksum(folder / "model" / "data")
    assert newest_good(tmp_path / "checkpoints") == (folder, [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000010"]


def damage_byte(folder):
    (folder / "model" / "data").write_text("WEIGHTS")


def damage_size(folder):
    (folder / "model" / "data").write_text("weigh")


def damage_missing(folder):
    (folder / "model" / "data").unlink()


def damage_unfinished(folder):
    (folder / "COMPLETE").unlink()


def damage_mark(folder):
    (folder / "COMPLETE").write_text("{")


def damage_listing(folder):
    (folder / "COMPLETE").write_text(json.dumps({"schema": "miles.checkpoint/1", "files": [{"name": "state.json"}]}))


def damage_empty_listing(folder):
    (folder / "COMPLETE").write_text(json.dumps({"schema": "miles.checkpoint/1", "files": []}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_byte, "xxh3"), (damage_size, "7 bytes expected, 5 found"), (damage_missing, "missing"), (damage_unfinished, "unfinished"),
        (damage_mark, "not JSON"), (damage_listing, "name, bytes and xxh3"), (damage_empty_listing, "names no state.json"),
    ],
)  # fmt: skip
def test_damaged_checkpoint_is_passed_over_and_said(ranks, tmp_path, damage, said):
    good = write_one(tmp_path, 5, ranks)
    bad = write_one(tmp_path, 10, ranks)
    damage(bad)
    found, lines = newest_good(tmp_path)
    assert found == good
    assert len(lines) == 1
    assert str(bad) in lines[0]
    assert said in lines[0]
    assert "\n" not in lines[0]


def test_nothing_good(ranks, tmp_path):
    assert newest_good(tmp_path / "none") == (None, [])
    damage_unfinished(write_one(tmp_path, 1, ranks))
    found, lines = newest_good(tmp_path)
    assert found is None
    assert len(lines) == 1


def test_another_major_version_is_refused_by_name(ranks, tmp_path):
    folder = write_one(tmp_path, 1, ranks)
    (folder / "COMPLETE").write_text(json.dumps({"schema": "miles.checkpoint/2", "files": []}))
    with pytest.raises(ValueError, match=r"miles\.checkpoint/2"):
        newest_good(tmp_path)


def test_retention_keeps_the_newest_and_never_deletes_the_only_good_one(ranks, tmp_path):
    folders = [write_one(tmp_path, step, ranks) for step in (1, 2, 3, 4)]
    damage_unfinished(folders[1])
    assert retain(tmp_path, 2) == [folders[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003", "step_000004"]
    damage_byte(folders[3])
    assert retain(tmp_path, 1) == []
    assert verify_checkpoint(folders[2])["step"] == 3


def test_retention_does_not_read_again_what_was_just_written(ranks, tmp_path, monkeypatch):
    folders = [write_one(tmp_path, step, ranks) for step in (1, 2, 3)]
    damage_byte(folders[2])
    assert retain(tmp_path, 2, written=folders[1]) == [], "the newest is another one: it is read"
    write_one(tmp_path, 3, ranks)
    read = []
    monkeypatch.setattr("miles.data.store.checkpoint.verify", lambda path, *rest: read.append(path))
    assert retain(tmp_path, 2, written=folders[2]) == [folders[0]]
    assert not read


def test_same_step_again_replaces_the_folder(ranks, tmp_path):
    damage_byte(write_one(tmp_path, 3, ranks))
    again = write_one(tmp_path, 3, ranks, text="others.")
    assert newest_good(tmp_path) == (again, [])
    assert (again / "model" / "data").read_text() == "others."
    assert len(list(tmp_path.iterdir())) == 1


def test_killed_while_writing_leaves_the_older_one(ranks, tmp_path):
    good = write_one(tmp_path, 3, ranks)

    def write(draft):
        (draft / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 4, ranks, write, {"step": 4, "progress": {}})
    assert newest_good(tmp_path) == (good, [])
    assert newest_good(tmp_path)[0] != write_one(tmp_path, 4, ranks), "and the next try is not disturbed by the draft"


def test_superseded_attempt_writes_no_checkpoint(ranks, tmp_path):
    run_dir = RunDir(tmp_path)
    old = Fence(run_dir, new_epoch(run_dir))
    write_one(run_dir.checkpoints, 1, ranks, fence=old)

    def write(draft):
        new_epoch(run_dir)  # a newer attempt begins meanwhile

    with pytest.raises((Fenced, OSError)):
        write_checkpoint(run_dir.checkpoints, 2, ranks, write, {"step": 2, "progress": {}}, old)
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step_000001"]
    with pytest.raises(Fenced):
        write_one(run_dir.checkpoints, 2, ranks, fence=old)


class Hostile:
    def __init__(self, action):
        self.action = action

    def __reduce__(self):
        return self.action


@pytest.mark.parametrize("action", [(os.system, ("touch {}",)), (eval, ("open('{}', 'w')",)), (getattr, ("", "join"))])
def test_malicious_metadata_is_refused_and_not_run(ranks, tmp_path, action):
    trace = tmp_path / "trace"
    arguments = tuple(text.format(trace) for text in action[1])
    folder = tmp_path / "dcp"
    save_tensors(folder, {"a": torch.arange(3.0)})
    content = pickle.loads((folder / ".metadata").read_bytes())
    content.planner_data = Hostile((action[0], arguments))
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(Damaged, match="has no place in a checkpoint's metadata"):
        load_tensors(folder, {"a": torch.zeros(3)})
    assert not trace.exists()


def test_metadata_may_not_point_outside(ranks, tmp_path):
    folder = tmp_path / "dcp"
    save_tensors(folder, {"a": torch.arange(3.0)})
    content = pickle.loads((folder / ".metadata").read_bytes())
    for info in content.storage_data.values():
        info.relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(Damaged, match="outside the checkpoint"):
        read_metadata(folder)


def test_metadata_that_is_something_else_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(Damaged, match="a dict in place of the metadata"):
        read_metadata(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(Damaged, match="refused"):
        read_metadata(tmp_path)


def test_bytes_entries_are_refused(ranks, tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.zeros(2), "opaque": {"x": object}}, checkpoint_id=tmp_path)
    with pytest.raises(Damaged, match="is no tensor"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("target", "said"),
    [({"a": torch.zeros(4)}, r"\[3\], this model's"), ({"a": torch.zeros(3).half()}, "float16"), ({"b": torch.zeros(3)}, "a is not part"), ({"a": torch.zeros(3), "b": torch.zeros(1)}, "b is missing")],
)
def test_tensors_of_another_model_are_named(ranks, tmp_path, target, said):
    save_tensors(tmp_path / "dcp", {"a": torch.arange(3.0)})
    with pytest.raises(Damaged, match=said):
        load_tensors(tmp_path / "dcp", target)


def test_random_generators_come_back(tmp_path):
    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    np.random.standard_normal()  # leaves a cached normal behind
    random.gauss(0, 1)
    save_rng(tmp_path / "rng.safetensors")

    def draws():
        return [float(torch.rand(())), float(np.random.standard_normal()), random.gauss(0, 1), random.random(), float(torch.randn(()))]

    expected = draws()
    assert draws() != expected
    load_rng(tmp_path / "rng.safetensors")
    assert draws() == expected


def test_state_of_a_real_checkpoint(ranks, tmp_path):
    model = tiny.make_model(tmp_path / "hf", "llama")
    trainer = FsdpTrainer(tiny.make_config(checkpoint={"retain": 1}), model, ranks)
    fresh = trainer.save(tmp_path / "c", 0, {"next_draw": 0})
    assert not (fresh / "optimizer").exists()
    trainer.start_phase("sft")
    first = trainer.save(tmp_path / "c", 1, {"next_draw": 3})
    assert not fresh.exists(), "retention"
    state = verify_checkpoint(first)
    assert (state["step"], state["phase"], state["phase_steps"]) == (1, "sft", 0)
    assert state["parent"] == "step_000000"
    assert state["weight_checksum"] == trainer.weight_checksum()
    assert state["progress"] == {"next_draw": 3}
    names = {entry["name"].split("/")[0] for entry in json.loads((first / "COMPLETE").read_text())["files"]}
    assert names == {"model", "optimizer", "rng", "state.json"}
    found = read_metadata(first / "model").state_dict_metadata
    assert "model.layers.0.self_attn.q_proj.weight" in found
    other = FsdpTrainer(tiny.make_config(), tiny.make_model(tmp_path / "hf2", "llama", seed=9), ranks)
    assert other.weight_checksum() != trainer.weight_checksum()
    assert other.load(first) == {"next_draw": 3}
    assert other.weight_checksum() == trainer.weight_checksum()
    third = FsdpTrainer(tiny.make_config(), tiny.make_model(tmp_path / "hf3", "qwen3_moe"), ranks)
    with pytest.raises(Damaged, match=r"is missing|not part|this model's"):
        third.load(first)


def test_weights_that_are_not_those_of_the_state_are_refused(ranks, tmp_path):
    trainer = FsdpTrainer(tiny.make_config(), tiny.make_model(tmp_path / "hf", "llama"), ranks)
    folder = trainer.save(tmp_path / "c", 1, {})
    state = json.loads((folder / "state.json").read_text())
    found = state["weight_checksum"]
    (folder / "state.json").write_text(json.dumps(state | {"weight_checksum": "0" * 32}))
    with pytest.raises(UserError, match=rf"{folder}: its weights have checksum {found}, its state.json says 0{{32}}; restore the folder"):
        trainer.load(folder)


def test_reference_moves_with_its_run(ranks, tmp_path):
    """Inside the run directory its path is kept relative, elsewhere as it is."""
    model = tiny.make_model(tmp_path / "here" / "reference", "llama")
    trainer = FsdpTrainer(tiny.make_config(), model, ranks)
    trainer.load_reference(model)
    folder = trainer.save(tmp_path / "here" / "checkpoints", 1, {})
    (tmp_path / "here").rename(tmp_path / "there")
    moved = FsdpTrainer(tiny.make_config(), tmp_path / "there" / "reference", ranks)
    moved.load(tmp_path / "there" / "checkpoints" / folder.name)
    assert moved.reference_folder == tmp_path / "there" / "reference"
    elsewhere = moved.save(tmp_path / "another" / "checkpoints", 1, {})
    assert verify_checkpoint(elsewhere)["reference"] == str(tmp_path / "there" / "reference")
    moved.load(elsewhere)
