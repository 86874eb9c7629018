"""`make quickstart-slurm` in small: two nodes train and one of another kind generates, under Slurm, with the bits of a run without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import whole_runs as runs

from miles.config.compose import configs_dir
from miles.config.exits import WRONG
from miles.data.store.run_dir import RunDir, read_provenance
from miles.slurm.minicluster import same_bits

# Hardly anybody is rewarded in so few steps: the entropy bonus makes the weights move.
SHORT = ["num_rollout=2", "warm_start.steps=1", "eval.interval=null", "algorithm.entropy_coef=0.01"]


def test_a_heterogeneous_job_has_the_bits_of_a_run_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(configs_dir().parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
    here, there = tmp_path / "local", tmp_path / "slurm"
    assert same_bits.main(["recipes/tiny", str(tmp_path), *SHORT]) == 0
    assert "the final weights are equal, bit for bit" in capsys.readouterr().out
    runs.same_run(here, there)
    assert runs.weights(there) != (there / "model" / "model.safetensors").read_bytes()
    assert read_provenance(RunDir(there))["attempts"][0]["nodes"] == ["train0", "train1", "infer0"]
    script = (there / "slurm" / "train-rollout.sbatch").read_text()
    for line in ("--partition=gb300", "--gres=gpu:gb300:4", "--nodes=2", "--partition=h200", "--gres=gpu:h200:8", "hetjob"):
        assert f"#SBATCH {line}\n" in script

    changed = bytearray(runs.weights(here))
    changed[-1] ^= 1
    (here / "hf" / "model.safetensors").write_bytes(changed)
    assert same_bits.compare(there, here) == 1
    assert "THE FINAL WEIGHTS DIFFER" in capsys.readouterr().out


def test_a_reference_of_another_world_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started."""
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "run.yaml").write_text("defaults: [recipes/tiny]\n")
    assert same_bits.main(["recipes/tiny", str(tmp_path), "--reference", str(tmp_path / "run")]) == WRONG
    assert "model.safetensors: not there" in capsys.readouterr().err
    (tmp_path / "run" / "hf" / "model.safetensors").write_bytes(b"0")
    assert same_bits.main(["recipes/tiny", str(tmp_path), "--reference", str(tmp_path / "run")]) == WRONG
    assert "has 1 trainer rank(s)" in capsys.readouterr().err
    assert not (tmp_path / "slurm").exists()
