"""Faults that only the processes of a run can see: every process ends, the launcher says one line, exit code 78.

A case of each way: what a worker, an engine or a trainer finds. What else a worker can find is in tests/rollout/test_faults.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import inputs
import psutil
import pytest
from inputs import ROWS, Case, replace

AT_ONCE = 2
OWN = "rollout.reward.type=null rollout.reward.path=own_functions."
TOLD = ("step ", "starting", "waiting for ", "failed, step ", "stopped, step ", "report: ", "resuming ")  # what the launcher of a run says besides
PATIENCE = 480.0


def row(number: int, prompt: str):
    """Another prompt in line `number` of train.jsonl."""

    def make(folder: Path) -> None:
        rows = [*ROWS]
        rows[number - 1] = json.dumps({"question": prompt, "answer": "1"}) + "\n"
        replace(folder / "train.jsonl", "".join(rows))

    return make


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    replace(folder / "model/tokenizer.json", '{"version": "1.0"}')


CASES = [
    Case("reward raises", f"{OWN}raises", ["reward own_functions.raises, draw ", ": KeyError: 'no such\\nanswer'"]),
    Case("prompt longer than the engine takes", "", ["draw 2: the engine refuses the request: ", "lower max_response_len of its sampling section, or shorten the prompt"], row(3, "1234567890" * 60)),
    Case("tokenizer is none", "", ["tokenizer.json: not a tokenizer ("], no_tokenizer),
    Case("weights lack a tensor", "", ["model: model.norm.weight is missing or of another shape than config.json says (1 such); restore the folder from its origin"], lose_a_tensor),
]


def of_run(done: subprocess.CompletedProcess[str], parts: list[str]) -> str:
    """The one line of a fault among what a launcher says."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(TOLD)]
    return inputs.fault_line(subprocess.CompletedProcess(done.args, done.returncode, done.stdout, "\n".join(lines)), parts)


def command(words: str) -> list[str]:
    return [sys.executable, "-m", "miles.cli", *words.split()]


def prepared(folder: Path, model: Path) -> Path:
    inputs.prepare(folder, model)
    (folder / "own_functions.py").write_text((Path(__file__).parent / "own_functions.py").read_text())
    return folder


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Role processes of a run that live."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MILES_RUN_DIR") == str(run_dir):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def done(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Every chosen case, two runs at a time: what the launcher said, the inputs before and after, and who was left."""
    top = tmp_path_factory.mktemp("runs")
    chosen = [item.callspec.params["case"] for item in request.session.items if getattr(item, "callspec", None) and "case" in item.callspec.params and item.path == request.path]

    def run(number: int, case: Case):
        folder = prepared(top / f"{number:03d}", tiny_model)
        case.make(folder)
        before = inputs.tree(folder)
        result = inputs.submit(folder, f"run recipe {case.words} --run-dir here", PYTHONDONTWRITEBYTECODE="1")
        return result, before, inputs.tree(folder, but=("here",)), processes_of(folder / "here")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip((case.name for case in chosen), pool.map(run, range(len(chosen)), chosen), strict=True))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused(case: Case, done) -> None:
    result, before, after, left = done[case.name]
    of_run(result, ["error: ", *case.parts])
    assert before == after
    assert not left


def test_what_a_failed_start_was_given_does_not_bind(tiny_model: Path, tmp_path: Path) -> None:
    """A builder that raises. Nothing is done yet: the same folder takes the mended settings, and makes the model anew."""
    folder = prepared(tmp_path / "own", tiny_model)
    before = inputs.tree(folder)
    failed = inputs.submit(folder, "run recipe model.hf_checkpoint=null model.build=own_functions.build --run-dir here", PYTHONDONTWRITEBYTECODE="1")
    of_run(failed, ["error: model.build: own_functions.build raised OSError: the mirror is down"])
    assert inputs.tree(folder, but=("here",)) == before
    assert not processes_of(folder / "here")
    (folder / "here/model").mkdir()
    replace(folder / "here/model/config.json", "{}")  # as if the start had failed later
    mended = inputs.submit(folder, "run recipe model.hf_checkpoint=null model.build=miles.recipes.quickstart.build_tiny --run-dir here")
    assert mended.returncode == 0, mended.stderr
    assert f"nothing is done yet in {folder}/here, so it takes the new configuration (model.build)" in mended.stderr
    refused = inputs.submit(folder, "run here --rollout-seed 8")
    inputs.fault_line(refused, ["here: holds a run with another configuration ("])


# A full disk: a small one of our own, in a mount namespace that ends with the command.


def on_small_disk(folder: Path, size: str, words: str) -> subprocess.CompletedProcess[str]:
    """`miles-submit` with the words, where `folder`/disk has room for `size` only."""
    (folder / "disk").mkdir()
    space = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["sh", "-c", f'mount -t tmpfs -o size={size} small "$0" && exec "$@"', str(folder / "disk")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(inputs.ROOT), "NO_COLOR": "1"}
    return subprocess.run([*space, *mount, *command(words)], cwd=folder, env=env, capture_output=True, text=True, timeout=480)


@pytest.mark.parametrize("size", ["8k", "400k", "1600k"])
def test_disk_full(size: str, tiny_model: Path, tmp_path: Path) -> None:
    """Full at once, at the first weights, at the checkpoint: the same line."""
    folder = prepared(tmp_path / "own", tiny_model)
    before = inputs.tree(folder)
    done = on_small_disk(folder, size, "run recipe --run-dir disk/here")
    of_run(done, [f"disk full at {folder}/disk/here", "free some space, then run the same command again; the run resumes from its last checkpoint"])
    assert inputs.tree(folder, but=("disk",)) == before


# Checkpoints.


@pytest.fixture(scope="module")
def two_checkpoints(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with a checkpoint after each."""
    folder = prepared(tmp_path_factory.mktemp("checkpoints") / "own", tiny_model)
    done = inputs.submit(folder, "run recipe num_rollout=2 checkpoint.save_interval=1 --run-dir here")
    assert done.returncode == 0, done.stderr
    return folder


def damage(step: Path) -> Path:
    """One bit of the biggest file."""
    victim = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return victim


# Of batches/journal, what lies in sealed batches may go at any start.
KEPT = ("batches/step_", "checkpoints", "evals", "metrics.jsonl", "run.yaml", "sync", "train")


def test_damaged_checkpoints(two_checkpoints: Path) -> None:
    """The newest damaged: the one before is used, and that is said. All damaged: refused, nothing is begun anew."""
    here = two_checkpoints / "here"
    victim = damage(here / "checkpoints/step_000002")
    done = inputs.submit(two_checkpoints, "run recipe num_rollout=3 checkpoint.save_interval=1 --run-dir here")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1, done.stderr
    assert f"checkpoint passed over: {victim}: xxh3 " in said[0]
    assert said[0].endswith("the run goes on from step_000001")
    assert [json.loads(line)["step"] for line in (here / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]

    (here / "checkpoints/step_000002/COMPLETE").unlink()
    victim = damage(here / "checkpoints/step_000003")
    before = {name: digest for name, digest in inputs.tree(here).items() if name.startswith(KEPT)}
    done = inputs.submit(two_checkpoints, "run recipe num_rollout=4 checkpoint.save_interval=1 --run-dir here")
    of_run(done, [f"{here}/checkpoints: no good checkpoint ({victim}: xxh3 ", "restore the files, or remove the folder to begin the run again"])
    after = {name: digest for name, digest in inputs.tree(here).items() if name.startswith(KEPT)}
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"run.yaml"}, "num_rollout=4 is in it"


# Two launchers, and Ctrl-C.


def until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: did not happen"
        time.sleep(0.02)


def test_a_second_launcher_and_an_early_interrupt(tiny_model: Path, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "own", tiny_model)
    here = folder / "here"
    with (folder / "out").open("wb") as out:
        first = subprocess.Popen(command("run recipe num_rollout=50 --run-dir here"), cwd=folder, env={**os.environ, "PYTHONPATH": str(inputs.ROOT)}, stderr=out, start_new_session=True)
    until(lambda: (here / "attempts/000001/service.json").exists(), "the first attempt")
    written = ("attempts", "batches", "checkpoints", "events", "hf", "metrics.jsonl", "provenance.json", "report", "sync", "train")  # by the first, meanwhile
    before = inputs.tree(here, but=written)
    second = inputs.submit(folder, "run recipe num_rollout=60 --run-dir here")
    inputs.fault_line(second, [f"{here}: this run is going on; follow it with `miles-submit logs -f {here}`"])
    assert inputs.tree(here, but=written) == before
    assert "run.yaml" in before
    assert first.poll() is None

    first.send_signal(signal.SIGINT)
    assert first.wait(PATIENCE) == 130
    said = (folder / "out").read_text().splitlines()
    assert [line for line in said if not line.startswith(TOLD)] == [
        "stopping after a checkpoint (Ctrl-C again stops at once)",
        f"stopped; resume with: miles-submit run {here}",
    ]
    until(lambda: not processes_of(here), "the end of all processes")
    assert not (here / "attempts/000002").exists()


def test_a_run_whose_launcher_died_is_not_begun_twice(tiny_model: Path, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "own", tiny_model)
    here = folder / "here"
    first = subprocess.Popen(command("run recipe num_rollout=200 --run-dir here"), cwd=folder, env={**os.environ, "PYTHONPATH": str(inputs.ROOT)}, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: (here / "metrics.jsonl").exists() or first.poll() is not None, "the first step")
        first.kill()
        first.wait()
        second = inputs.submit(folder, "run recipe num_rollout=200 --run-dir here")
        inputs.fault_line(second, [f"{here}: this run is going on (attempt 000001); follow it with `miles-submit logs -f {here}`"])
    finally:
        for process in processes_of(here):
            process.kill()
    until(lambda: not processes_of(here), "the end of all processes")
