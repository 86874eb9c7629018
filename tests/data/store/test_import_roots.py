"""Functions by import path are found in the folders of the run's first start, from wherever the run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles.config.compose import dump_config, load_config
from miles.data.store.epoch import new_epoch
from miles.data.store.import_roots import import_roots, recorded_roots
from miles.data.store.run_dir import RunDir, record_attempt

CODE = "def build(folder, seed):\n    return '{}'\n"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Folders with a module own_build each, that says where it is from; `run with spaces; $HOME` is a name that a shell would mangle."""
    found = {name: tmp_path / name for name in ("start $(touch broken); here", "library", "elsewhere")}
    for name, folder in found.items():
        folder.mkdir()
        (folder / "own_build.py").write_text(CODE.format(name))
    (found["elsewhere"] / "own_build.py").unlink()
    return {"start": found["start $(touch broken); here"], "library": found["library"], "elsewhere": found["elsewhere"], "run": tmp_path / "run"}


def start(run: RunDir) -> int:
    """What the launcher does at the start of an attempt."""
    epoch = new_epoch(run)
    record_attempt(run, epoch, import_roots=import_roots(run))
    return epoch


def test_the_start_wins_wherever_it_goes_on(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(places["run"])
    monkeypatch.setenv("PYTHONPATH", str(places["library"]))
    monkeypatch.chdir(places["start"])
    start(run)
    assert recorded_roots(run) == [str(places["start"]), str(places["library"])]
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(places["elsewhere"])
    epoch = start(run)
    assert recorded_roots(run) == [str(places["start"]), str(places["library"]), str(places["elsewhere"])]
    program = (
        "import sys; from pathlib import Path; from miles.data.store.run_dir import RunDir; from miles.data.store.import_roots import use_import_roots\n"
        "use_import_roots(RunDir(Path(sys.argv[1])), int(sys.argv[2])); import own_build; print(own_build.build(0, 0))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program, str(run.path), str(epoch)], cwd=places["elsewhere"], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == places["start"].name, done.stderr
    assert not (places["elsewhere"] / "broken").exists()


def test_folders_that_are_gone_are_left_out(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(places["run"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(places["start"])
    start(run)
    moved = places["start"].rename(places["start"].with_name("moved"))
    monkeypatch.chdir(moved)
    assert import_roots(run) == [str(moved)]


def test_an_older_run_records_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    record_attempt(run, new_epoch(run))
    assert recorded_roots(run) == []


@pytest.mark.parametrize(("recorded", "code", "said"), [(True, 0, "already finished"), (False, 78, "model.build: no module own_build (own_build.build)")])
def test_the_command_finds_them_too(places: dict[str, Path], recorded: bool, code: int, said: str) -> None:
    """A finished run is enough: its functions are looked for before that is noticed."""
    run = RunDir(places["run"])
    epoch = new_epoch(run)
    record_attempt(run, epoch, **({"import_roots": [str(places["start"])]} if recorded else {}))
    config = load_config(["recipes/tiny"], ["model.build=own_build.build"])
    run.run_yaml.write_text(dump_config(config))
    (run.attempt(epoch) / "exit.json").write_text(json.dumps({"code": 0, "reason": "finished"}))
    run.metrics.write_text("".join(json.dumps({"step": step, "kind": "sft" if step < 3 else "rollout", "train/loss": 1.0}) + "\n" for step in range(1, 6)))
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "miles.cli", "run", str(run.path), "num_rollout=2"], cwd=places["elsewhere"], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "warning" not in done.stderr, "defaults that run.yaml writes out are nobody's mistake"
