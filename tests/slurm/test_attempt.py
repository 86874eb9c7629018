"""What an attempt records of itself before anything is started, and what it says when it can promise less than the one before."""

from __future__ import annotations

import json

import pytest

from miles.cli.status import state_of, status
from miles.config.compose import dump_config, load_config
from miles.data.store.epoch import newest_epoch
from miles.data.store.run_dir import RunDir, read_provenance
from miles.report.build import build_report
from miles.slurm.attempt import Attempt
from miles.slurm.launch import start_here


@pytest.fixture
def begin(tmp_path):
    run, said = RunDir(tmp_path / "run"), []

    def make(*overrides: str) -> list[str]:
        config = load_config(["recipes/tiny"], list(overrides))
        run.path.mkdir(exist_ok=True)
        run.run_yaml.write_text(dump_config(config))
        said.clear()
        Attempt(run, config, said.append, start_here)
        return said

    make.run = run
    return make


def has_saved(run: RunDir) -> None:
    """A checkpoint of the newest attempt."""
    run.checkpoint(2).mkdir(parents=True, exist_ok=True)
    (run.checkpoint(2) / "state.json").write_text(json.dumps({"epoch": newest_epoch(run)}))
    (run.checkpoint(2) / "COMPLETE").touch()


def has_sealed(run: RunDir) -> None:
    run.batch(1).mkdir(parents=True)
    (run.batch(1) / "manifest.json").write_text(json.dumps({"epoch": newest_epoch(run)}))


def has_evaluated(run: RunDir) -> None:
    run.eval(0).mkdir(parents=True)
    (run.eval(0) / "manifest.json").write_text(json.dumps({"epoch": newest_epoch(run)}))


def has_finished_groups(run: RunDir) -> None:
    path = run.journal_file(0, newest_epoch(run))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"groups")


def has_sealed_a_shard(run: RunDir) -> None:
    run.batch(2).mkdir(parents=True)
    (run.batch(2) / "rollout.0.h5").write_bytes(b"rows")
    run.journal.mkdir()
    run.journal_file(0, newest_epoch(run)).touch()


def test_an_attempt_records_what_bits_depend_on(begin):
    assert begin("cluster.threads=2") == []
    (entry,) = read_provenance(begin.run)["attempts"]
    assert (entry["tier"], entry["promise"]) == ("exact", "an interrupted and resumed run has the bits of an undisturbed one")
    assert "batch-invariant float32 on cpu" in entry["why"]
    assert (entry["threads"], entry["layout"]["ranks"], entry["layout"]["backend"], entry["schedule"]) == (2, 1, "fsdp", "synchronous")
    assert entry["kernels"] == "embedded, batch-invariant, float32, cpu"
    assert {"cpu", "gpus", "machine", "host"} <= set(entry)
    assert {"torch", "numba", "transformers", "numpy", "llvmlite", "tokenizers"} <= set(entry["versions"])


def test_a_promise_that_falls_is_said_recorded_and_shown(begin, capsys):
    begin("cluster.threads=2")
    has_saved(begin.run)
    assert begin("cluster.threads=2") == []
    assert state_of(begin.run.path).tier_since is None
    assert begin("cluster.threads=1") == ["guarantee: replayed from attempt 3 on (before: exact): threads 2 → 1"]
    has_saved(begin.run)
    assert begin("cluster.threads=1") == []
    entries = read_provenance(begin.run)["attempts"]
    assert [(entry["tier"], entry["changed"]) for entry in entries] == [("exact", []), ("exact", []), ("replayed", ["threads 2 → 1"]), ("replayed", [])]
    status(begin.run.path, as_json=False)
    assert "guarantee: replayed since attempt 3: threads 2 → 1" in capsys.readouterr().out.splitlines()
    status(begin.run.path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["tier"], told["tier_since"], told["tier_why"]) == ("replayed", 3, "threads 2 → 1")
    assert "since attempt 3: threads 2 → 1" in build_report(begin.run.path).read_text()


def test_an_attempt_that_left_nothing_binds_nobody(begin):
    begin("cluster.threads=2")
    assert begin("cluster.threads=1") == []
    assert [entry["tier"] for entry in read_provenance(begin.run)["attempts"]] == ["exact", "exact"]
    has_saved(begin.run)
    assert begin("cluster.threads=1") == []


def test_an_attempt_between_two_binds_nobody_if_it_left_nothing(begin):
    begin("cluster.threads=2")
    has_saved(begin.run)
    assert begin("cluster.threads=1") == ["guarantee: replayed from attempt 2 on (before: exact): threads 2 → 1"]
    has_sealed_a_shard(begin.run)  # without a manifest it counts for nothing
    assert begin("cluster.threads=2") == []
    assert [entry["tier"] for entry in read_provenance(begin.run)["attempts"]] == ["exact", "replayed", "exact"]
    assert (state_of(begin.run.path).tier, state_of(begin.run.path).tier_since) == ("exact", None)


@pytest.mark.parametrize("leave", [has_saved, has_sealed, has_evaluated, has_finished_groups])
def test_whatever_an_attempt_leaves_binds_those_after_it(begin, leave):
    begin("cluster.threads=2")
    leave(begin.run)
    begin("cluster.threads=2")
    assert begin("cluster.threads=1") == ["guarantee: replayed from attempt 3 on (before: exact): threads 2 → 1"]
