"""What an attempt records of itself before anything is started, and what it says when it can promise less than the one before."""

from __future__ import annotations

import json

import pytest

from miles.cli.status import state_of, status
from miles.config.compose import dump_config, load_config
from miles.data.store.run_dir import RunDir, read_provenance
from miles.report.build import build_report
from miles.slurm.launch import Attempt


@pytest.fixture
def begin(tmp_path):
    run, said = RunDir(tmp_path / "run"), []

    def make(*overrides: str) -> list[str]:
        config = load_config(["recipes/tiny"], list(overrides))
        run.path.mkdir(exist_ok=True)
        run.run_yaml.write_text(dump_config(config))
        said.clear()
        Attempt(run, config, said.append)
        return said

    make.run = run
    return make


def has_saved(run: RunDir) -> None:
    run.checkpoint(2).mkdir(parents=True, exist_ok=True)
    (run.checkpoint(2) / "COMPLETE").touch()


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
