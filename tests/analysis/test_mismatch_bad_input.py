"""What can't be read is named: file, what is wrong, exit code 78, and no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from made_runs import Made, make_sample, make_train, random_run, write_run
from script import script

from miles.analysis.analyze import analyze
from miles.analysis.ranks import Alone
from miles.config.exits import UserError
from miles.data.store.manifest import read_manifest, seal_manifest

ROOT = Path(__file__).resolve().parents[2]
BATCH, TRAIN = Path("batches/step_000002"), Path("train/step_000002")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    random_run(folder, seed=4, longest=50)
    return folder


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    """Change a file in place; the manifest goes on fitting its size."""
    with h5py.File(path, "r+") as file:
        change(file)
    resize(path)


def resize(path: Path) -> None:
    """Make the manifest name the size that the file has now."""
    if path.parent.parent.name != "batches":
        return
    manifest = read_manifest(path.parent)
    shards = [entry.model_copy(update={"bytes": path.stat().st_size}) if entry.name == path.name else entry for entry in manifest.shards]
    seal_manifest(path.parent, manifest.model_copy(update={"shards": shards}))


def shard(run: Path) -> Path:
    return run / BATCH / "rollout.0.h5"


def record(run: Path) -> Path:
    return run / TRAIN / "node_0000.h5"


def past_the_end(path: Path) -> None:
    def change(file: h5py.File) -> None:
        file["sequences/offset"][-1] += np.uint64(5)

    edit(path, change)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    resize(path)


def overwritten(path: Path, at: int, size: int) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + size] = bytes(size)
    path.write_bytes(content)


def other_schema(path: Path, schema: str) -> None:
    edit(path, lambda file: file.attrs.modify("schema", schema))


def drop(path: Path, name: str) -> None:
    edit(path, lambda file: file.__delitem__(name))


def other_step(run: Path) -> None:
    """The train record of another run with the same steps: other lengths."""
    other = run.parent / "other"
    random_run(other, seed=9, longest=50)
    shutil.copy(record(other), record(run))


def other_weights(run: Path) -> None:
    edit(record(run), lambda file: file.attrs.modify("weight_checksum", "00000000000000ff"))


def other_run(run: Path) -> None:
    manifest = read_manifest(run / BATCH)
    seal_manifest(run / BATCH, manifest.model_copy(update={"run_id": "another"}))


def no_such_row(run: Path) -> None:
    def change(file: h5py.File) -> None:
        file["sequences/row"][0] = 5000

    edit(record(run), change)


def no_such_shard(run: Path) -> None:
    def change(file: h5py.File) -> None:
        file["sequences/shard"][0] = 7

    edit(record(run), change)


def twice(run: Path) -> None:
    def change(file: h5py.File) -> None:
        for name in ("shard", "row"):
            file[f"sequences/{name}"][1] = file[f"sequences/{name}"][0]

    edit(record(run), change)


def record_twice(run: Path) -> None:
    shutil.copy(record(run), record(run).with_name("node_0007.h5"))


def two_columns(path: Path, name: str) -> None:
    def change(file: h5py.File) -> None:
        values = file[name][:]
        del file[name]
        file[name] = np.stack([values, values], 1)

    edit(path, change)


def texts(path: Path, name: str) -> None:
    def change(file: h5py.File) -> None:
        values = [str(value) for value in file[name][:]]
        del file[name]
        file[name] = values

    edit(path, change)


def fewer_rewards(run: Path) -> None:
    def change(file: h5py.File) -> None:
        rewards = file["sequences/reward"][:-1]
        del file["sequences/reward"]
        file["sequences/reward"] = rewards

    edit(shard(run), change)


def run_of_no_row(run: Path) -> None:
    def change(file: h5py.File) -> None:
        file["runs/sequence"][-1] = len(file["sequences/offset"]) - 1

    edit(shard(run), change)


CASES = {
    "shard is no HDF5": (lambda run: (shard(run).write_bytes(b"x" * 5000), resize(shard(run))), "rollout.0.h5: an HDF5 file expected"),
    "record is no HDF5": (lambda run: record(run).write_bytes(b"x" * 5000), "node_0000.h5: an HDF5 file expected"),
    "shard is cut off": (lambda run: truncate(shard(run)), "rollout.0.h5: an HDF5 file expected"),
    "shard is cut off, manifest as it was": (lambda run: shard(run).write_bytes(shard(run).read_bytes()[:4000]), "bytes expected by manifest.json, 4000 found"),
    "record is cut off": (lambda run: truncate(record(run)), "node_0000.h5: an HDF5 file expected"),
    "links within a shard are damaged": (lambda run: overwritten(shard(run), 600, 2000), "rollout.0.h5: damaged: what it should hold can't be read"),
    "attributes of a shard are damaged": (lambda run: overwritten(shard(run), 50, 300), "rollout.0.h5: damaged: what it should hold can't be read"),
    "shard lacks a dataset": (lambda run: drop(shard(run), "tokens/rollout_logprob"), "rollout.0.h5: has no dataset /tokens/rollout_logprob"),
    "shard lacks rewards": (lambda run: drop(shard(run), "sequences/reward"), "rollout.0.h5: has no dataset /sequences/reward"),
    "rewards in two columns": (lambda run: two_columns(shard(run), "sequences/reward"), "rollout.0.h5: /sequences/reward has 2 axes, and 1 expected"),
    "log-probs in two columns": (lambda run: two_columns(record(run), "tokens/train_logprob"), "node_0000.h5: /tokens/train_logprob has 2 axes, and 1 expected"),
    "texts for log-probs": (lambda run: texts(record(run), "tokens/train_logprob"), "node_0000.h5: /tokens/train_logprob is object, and numbers are expected"),
    "shard has fewer rewards than rows": (fewer_rewards, "rollout.0.h5: /sequences/reward has"),
    "a run of weights of a row that isn't there": (run_of_no_row, "rollout.0.h5: /runs: sequence, start and weight_version"),
    "record lacks a dataset": (lambda run: drop(record(run), "tokens/train_logprob"), "node_0000.h5: has no dataset /tokens/train_logprob"),
    "shard of a later version": (lambda run: other_schema(shard(run), "miles.rollout/2"), "rollout.0.h5: is miles.rollout/2, and this miles reads miles.rollout/1"),
    "record of a later version": (lambda run: other_schema(record(run), "miles.train/2"), "node_0000.h5: is miles.train/2, and this miles reads miles.train/1"),
    "record without its batch": (lambda run: shutil.rmtree(run / BATCH), "a train record without its batch"),
    "batch without a shard": (lambda run: shard(run).unlink(), "rollout.0.h5: missing"),
    "manifest is damaged": (lambda run: (run / BATCH / "manifest.json").write_text("{"), "manifest.json: not JSON"),
    "offsets of a shard past the end": (lambda run: past_the_end(shard(run)), "tokens/rollout_logprob has"),
    "offsets of a record past the end": (lambda run: past_the_end(record(run)), "/tokens/train_logprob has"),
    "offsets descend": (lambda run: edit(record(run), lambda file: file["sequences/offset"].__setitem__(1, np.uint64(10**9))), "/sequences/offset doesn't ascend"),
    "a record of another run": (other_step, "files of two runs are mixed"),
    "a record of other weights": (other_weights, "its weight_checksum is 00000000000000ff"),
    "a batch of another run": (other_run, "is of the run another, and earlier steps are of run"),
    "a row that isn't there": (no_such_row, "names row 5000 of"),
    "a shard that isn't there": (no_such_shard, "names shard 7"),
    "a row twice": (twice, "stands twice"),
    "a record twice": (record_twice, "node_0007.h5: its row 0 of shard 0 stands in"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named(whole, tmp_path, case):
    spoil, expected = CASES[case]
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    spoil(run)
    with pytest.raises(UserError) as error:
        analyze(run, Alone())
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools/analyze/logprob_mismatch.py", *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", ["no folder", "no run", "nothing trained", "all masked", "no common token"])
def test_nothing_to_compare_is_never_a_pass(tmp_path, kind):
    random = np.random.default_rng(1)
    run = tmp_path / "run"
    sample = make_sample(random, 1, 0, 5, 30, 1)
    train = make_train(random, sample, 0.0)
    if kind == "all masked":
        sample.loss_mask[:] = 0
    if kind == "no common token":
        train["train_logprob"][:] = np.nan
    if kind == "no run":
        run.mkdir()
    elif kind != "no folder":
        write_run(run, [Made(1, sample, train, 0, -1, 0, 0, 1)])
    if kind == "nothing trained":
        shutil.rmtree(run / "train")
    done = tool(run)
    assert done.returncode == 78, done.stdout
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert {"no folder": "no such folder", "no run": "give a run directory"}.get(kind, "nothing to compare") in done.stderr


def test_limits_decide_the_exit_code(whole):
    assert tool(whole, "--json").returncode == 0
    assert tool(whole, "--json", "--at-worst", "noise", "--above", "not_comparable=0").returncode == 1
    run = tool(whole, "--core", "--below", "equal_share=2", "--above", "abs_diff=1e-9", "--above", "tokens=1e9")
    assert run.returncode == 1
    assert [line.split()[1] for line in run.stdout.splitlines() if line.startswith("FAILED") and "verdict" not in line] == ["abs_diff", "equal_share"]
    unknown = tool(whole, "--above", "nonsense=1")
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (78, 1)
    assert tool(whole, "--above", "kl_k3").returncode == 78
    assert tool(whole, "--above", "kl_k3=nan").returncode == 78
    twice = tool(whole, "--core", "--above", "abs_diff=1e-9", "--above", "abs_diff=1e9")
    assert (twice.returncode, [line for line in twice.stdout.splitlines() if line.startswith("FAILED")][-1].split()[1]) == (1, "abs_diff")


def test_zeros_of_both_signs_are_no_difference_and_no_traceback(tmp_path):
    random = np.random.default_rng(8)
    made = []
    for index in range(4):
        sample = make_sample(random, index, 0, 5, 60, 1)
        sample.rollout_logprob[10:20] = 0.0
        train = make_train(random, sample, 0.0)
        train["train_logprob"] = np.where(sample.rollout_logprob == 0.0, np.float32(-0.0), sample.rollout_logprob)
        made.append(Made(1, sample, train, 0, -1, 0, 0, 1))
    write_run(tmp_path / "run", made)
    done = tool(tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "--html FILE" in done.stdout  # to its end


def test_a_clean_run_passes_and_the_verdict_can_be_demanded(tmp_path):
    random = np.random.default_rng(2)
    samples = [make_sample(random, draw, 0, 5, 400, 1) for draw in range(8)]
    for noise, word in ((0.0, "bitwise"), (0.003, "noise")):
        made = []
        for sample in samples:
            train = make_train(random, sample, 0.0)
            off = np.random.default_rng(sample.draw).normal(0, noise, len(sample.token_id))
            train["train_logprob"] = (sample.rollout_logprob + off).astype(np.float32)
            made.append(Made(1, sample, train, 0, -1, 0, 0, 1))
        run = tmp_path / word
        write_run(run, made)
        done = tool(run)
        assert (done.returncode, done.stdout.split(":")[0]) == (0, word)
        assert tool(run, "--at-worst", "bitwise").returncode == (word != "bitwise")



def test_odd_values_are_no_traceback(whole, tmp_path, capsys):
    """An entropy without bound, as of a policy that broke, and an engine that has no name."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)

    def endless(file: h5py.File) -> None:
        entropy = file["tokens/entropy"][:]
        entropy[np.flatnonzero(np.isfinite(entropy))[::7]] = np.inf
        file["tokens/entropy"][:] = entropy

    edit(record(run), endless)
    for path in sorted(run.glob("batches/*/rollout.*.h5")):
        edit(path, lambda file: file["sequences/engine"].__setitem__(slice(None), 99))
    found = {}
    for each in (whole, run):
        assert script("logprob_mismatch", each, "--json") == 0
        found[each] = json.loads(capsys.readouterr().out)
    assert found[run]["tokens"] == found[whole]["tokens"]
    assert [row["value"] for row in found[run]["slices"]["engine"]] == ["unknown"]
    assert {token["engine"] for token in found[run]["worst_tokens"]} == {"unknown"}
