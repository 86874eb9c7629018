import json
from pathlib import Path

import numpy
import pytest
import yaml

from miles.data.store.files import Damaged, seal_bytes
from miles.data.store.run_dir import (
    RunDir,
    newest_complete_checkpoint,
    read_provenance,
    read_run_yaml,
    record_attempt,
    steps_in,
    write_plan,
)


def test_paths_of_the_format():
    run_dir = RunDir(Path("run"))
    found = [
        run_dir.run_yaml, run_dir.plan, run_dir.provenance, run_dir.attempt(7), run_dir.latest, run_dir.metrics, run_dir.event_file("trainer", 0, 7),
        run_dir.journal_file("w0", 7), run_dir.batch(12), run_dir.batch_of("sft", 12), run_dir.batch_of("eval", 10), run_dir.train(12), run_dir.checkpoint(10), run_dir.report, run_dir.hf,
    ]  # fmt: skip
    assert [str(path) for path in found] == [
        "run/run.yaml", "run/plan.json", "run/provenance.json", "run/attempts/000007", "run/latest", "run/metrics.jsonl", "run/events/trainer.0.7.jsonl",
        "run/batches/journal/w0.7.log", "run/batches/step_000012", "run/batches/step_000012", "run/evals/step_000010", "run/train/step_000012", "run/checkpoints/step_000010",
        "run/report", "run/hf",
    ]  # fmt: skip


def test_steps_pass_over_what_is_no_step(tmp_path):
    for name in ("step_000002", "step_000010", "step_1000000", "step_000003.aside.2", "journal", ".foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000004").touch()
    assert steps_in(tmp_path) == [2, 10, 1000000]
    assert steps_in(tmp_path / "none") == []


def test_run_yaml_round_trip_and_damage(run_dir):
    config = {"name": "größe", "train": {"lr": 1e-6, "list": [1, None, True]}}
    seal_bytes(run_dir.run_yaml, yaml.safe_dump(config, allow_unicode=True).encode())
    assert read_run_yaml(run_dir) == config
    run_dir.run_yaml.write_text("- 1")
    with pytest.raises(Damaged, match=r"run\.yaml: a mapping expected, list found"):
        read_run_yaml(run_dir)
    run_dir.run_yaml.write_text("a: [")
    with pytest.raises(Damaged, match=r"run\.yaml: not YAML"):
        read_run_yaml(run_dir)


def test_provenance_has_one_entry_an_attempt(run_dir):
    assert read_provenance(run_dir) == {"schema": "miles.provenance/1", "run_id": "run", "attempts": []}
    record_attempt(run_dir, 2, tier="exact")
    record_attempt(run_dir, 1)
    record_attempt(run_dir, 2, layout={"dp": 2})
    attempts = read_provenance(run_dir)["attempts"]
    assert [entry["epoch"] for entry in attempts] == [1, 2]
    assert (attempts[1]["tier"], attempts[1]["layout"]) == ("exact", {"dp": 2})
    assert attempts[0]["versions"]["numpy"] == numpy.__version__
    assert attempts[0]["time"] > 1.7e9


def test_plan_carries_its_schema(run_dir):
    write_plan(run_dir, {"nodes": 3})
    assert json.loads(run_dir.plan.read_text()) == {"schema": "miles.plan/1", "nodes": 3}


def test_a_checkpoint_without_its_mark_is_not_complete(run_dir):
    for step in (2, 4):
        run_dir.checkpoint(step).mkdir(parents=True)
    assert newest_complete_checkpoint(run_dir) is None
    (run_dir.checkpoint(2) / "COMPLETE").touch()
    assert newest_complete_checkpoint(run_dir) == 2


@pytest.mark.parametrize("content", ["[]", '{"schema": "miles.provenance/1"}', '{"schema": "miles.provenance/1", "attempts": 3}', '{"schema": "miles.provenance/1", "attempts": [3]}'])
def test_provenance_of_another_shape_is_named(run_dir, content):
    run_dir.path.mkdir(parents=True, exist_ok=True)
    run_dir.provenance.write_text(content)
    with pytest.raises(Damaged, match=r"provenance\.json: .* expected, .* found"):
        read_provenance(run_dir)
