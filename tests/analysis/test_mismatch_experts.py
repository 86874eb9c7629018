"""Slices by expert and beside boundaries of the loss mask, against plain float64 numpy over files read with h5py alone."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import pytest
from planted import plant
from script import script
from shard_rows import rows_of

from miles.analysis import expert_pass
from miles.analysis.analyze import analyze
from miles.analysis.expert_kernel import add_tokens, end_sequence
from miles.analysis.experts import Experts, by_expert, stands_out
from miles.analysis.ranks import Alone
from miles.analysis.state import State
from miles.config.exits import UserError
from miles.data.store.manifest import read_manifest, seal_manifest

CLOSE = 3e-6


def train_logprobs(run: Path) -> dict[tuple[int, int, int], np.ndarray]:
    """(step, shard, row) -> the trainer's log-probs."""
    found = {}
    for path in sorted(run.glob("train/step_??????/*.h5")):
        with h5py.File(path) as file:
            offset = file["sequences/offset"][:].astype(int)
            for i, where in enumerate(zip(file["sequences/shard"][:].tolist(), file["sequences/row"][:].tolist(), strict=True)):
                found[int(path.parent.name[5:]), *where] = file["tokens/train_logprob"][offset[i] : offset[i + 1]]
    return found


def sequences(run: Path) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Of each sequence with routes and a token that counts: |d| of those tokens f64 [n], their experts [n, layers, top_k], and the step."""
    trained, found, places = train_logprobs(run), [], defaultdict(int)
    for row in rows_of(run):
        shard = 0 if row.engine.startswith("http://node-0") else 1
        place = places[row.step, shard]
        places[row.step, shard] += 1
        d = trained[row.step, shard, place].astype(np.float64) - row.tokens["rollout_logprob"]
        at = np.flatnonzero((row.tokens["loss_mask"] != 0) & np.isfinite(d))
        if row.routes is not None and len(at):
            found.append((np.abs(d[at]), row.routes[at - 1], row.step))
    return found


def expected_of(rows: list[tuple[np.ndarray, np.ndarray, int]], layer: int, expert: int) -> tuple[float, ...]:
    """Tokens, mean |d| of them, of the others, and the standard error of the difference by sequence."""
    inside = [(experts[:, layer] == expert).any(-1) for _, experts, _ in rows]
    size, here = np.concatenate([size for size, _, _ in rows]), np.concatenate(inside)
    mine, others = size[here].mean(), size[~here].mean()
    moved = [((each[at] - mine).sum() / here.sum()) - ((each[~at] - others).sum() / (~here).sum()) for (each, _, _), at in zip(rows, inside, strict=True)]
    return here.sum(), mine, others, np.sqrt(np.sum(np.square(moved)) * len(moved) / (len(moved) - 1))


def test_experts_are_those_of_plain_sums(lively):
    run, _ = lively
    rows, found = sequences(run), by_expert(analyze(run, Alone(), chunk=900).experts)
    whole = np.concatenate([size for size, _, _ in rows])
    assert (found["sequences"], found["tokens"]) == (len(rows), len(whole))
    assert found["abs_diff"] == pytest.approx(whole.mean(), rel=CLOSE)
    assert (found["layers"], found["top_k"], found["experts"]) == (2, 2, 1 + max(experts.max() for _, experts, _ in rows))
    drawn = {}
    for layer in range(2):
        for expert in range(found["experts"]):
            count, mine, others, _ = expected_of(rows, layer, expert)
            assert found["difference"][layer][expert] == pytest.approx(mine - others, rel=1e-4, abs=CLOSE * mine)
            drawn[layer, expert] = (mine - others) * count / (count + 100)
    assert [(row["layer"], row["expert"]) for row in found["worst"][:3]] == sorted(drawn, key=drawn.get, reverse=True)[:3]
    for row in found["worst"]:
        count, mine, others, error = expected_of(rows, row["layer"], row["expert"])
        assert row["tokens"] == count
        assert [row["abs_diff"], row["others"]] == pytest.approx([mine, others], rel=CLOSE)
        assert row["standard_error"] == pytest.approx(error, rel=1e-5)
        assert row["drawn"] == pytest.approx(drawn[row["layer"], row["expert"]], rel=1e-4, abs=CLOSE * mine)


def test_pieces_ranks_and_packing_change_no_bit(lively, monkeypatch):
    run, _ = lively
    whole = analyze(run, Alone(), chunk=900)
    monkeypatch.setattr(expert_pass, "PIECE", 40)  # ten tokens at a time
    assert (analyze(run, Alone(), chunk=900).experts.by_expert == whole.experts.by_expert).all()

    class Part:
        def __init__(self, rank, size):
            self.rank, self.size = rank, size

        agree, merge, abort = staticmethod(lambda wrong: wrong), staticmethod(lambda state: state), staticmethod(lambda: None)

    for size in (2, 3, 4):
        states = [State.unpack(analyze(run, Part(rank, size), chunk=900).pack()) for rank in range(size)]
        for other in states[:0:-1]:
            states[0].merge(other)
        assert (states[0].experts.by_expert == whole.experts.by_expert).all()
        assert (states[0].experts.whole == whole.experts.whole).all()
        assert by_expert(states[0].experts) == by_expert(whole.experts)


def test_of_many_numbers_whole_groups_are_looked_at(lively, monkeypatch):
    run, _ = lively
    monkeypatch.setattr(expert_pass, "LOOKED_AT", 1500)
    some, every = by_expert(analyze(run, Alone()).experts), by_expert(analyze(run, Alone(), chunk=1).experts)
    assert 0 < some["sequences"] < every["sequences"] == len(sequences(run))  # a chunk of one sequence has fewer numbers


def test_an_expert_that_is_off_stands_out_and_no_other(tmp_path, capsys):
    run = tmp_path / "run"
    made = plant(run, "clean", 0.0, 5, steps=2, sequences=64, response=64)
    capsys.readouterr()
    assert not any(map(stands_out, by_expert(analyze(run, Alone()).experts)["worst"]))
    trained = {(int(step) + 1, int(draw), int(sample)): place for place, (step, draw, sample) in enumerate(zip(made.scene.step, made.scene.draw, made.scene.sample, strict=True))}
    numbers = {}
    for path in sorted(run.glob("batches/step_??????/rollout.*.h5")):
        with h5py.File(path) as file:
            for row, key in enumerate(zip(file["sequences/draw"][:].tolist(), file["sequences/sample"][:].tolist(), strict=True)):
                numbers[int(path.parent.name[5:]), int(path.name.split(".")[1]), row] = trained[(int(path.parent.name[5:]), *key)]
    for path in sorted(run.glob("train/step_??????/*.h5")):
        with h5py.File(path, "r+") as file:
            offset, logprob = file["sequences/offset"][:].astype(int), file["tokens/train_logprob"][:]
            for i, where in enumerate(zip(file["sequences/shard"][:].tolist(), file["sequences/row"][:].tolist(), strict=True)):
                order = made.generated.order[numbers[(int(path.parent.name[5:]), *where)]]
                for token in range(offset[i] + 1, offset[i + 1]):
                    if 2 in order[token - offset[i] - 1, 1, :2]:
                        logprob[token] -= 0.02
            file["tokens/train_logprob"][:] = logprob
    found = by_expert(analyze(run, Alone()).experts)
    assert next((row["layer"], row["expert"]) for row in found["worst"] if stands_out(row)) == (1, 2)
    assert script("logprob_mismatch", run, "--html", tmp_path / "page.html", "--at-worst", "biased") in (0, 1)
    said = capsys.readouterr().out
    assert "experts are off by more than chance" in said
    assert "By expert: the worst" in (tmp_path / "page.html").read_text()


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def resize(path: Path) -> None:
    manifest = read_manifest(path.parent)
    routes = [entry.model_copy(update={"bytes": path.stat().st_size}) if entry.name == path.name else entry for entry in manifest.routes]
    seal_manifest(path.parent, manifest.model_copy(update={"routes": routes}))


def narrower(file: h5py.File) -> None:
    expert = file["expert"][:, :1]
    del file["expert"]
    file["expert"] = expert


def as_u16(file: h5py.File) -> None:
    expert = file["expert"][:].astype(np.uint16)
    expert[:, 0, 0] = 60_000
    del file["expert"]
    file["expert"] = expert


WRONG = {
    "not HDF5": (lambda path: path.write_bytes(b"x" * 3000), "routes.0.h5: an HDF5 file expected"),
    "other schema": (lambda file: file.attrs.modify("schema", "miles.routes/2"), "is miles.routes/2, and this miles reads miles.routes/1"),
    "no experts": (lambda file: file.__delitem__("expert"), "has no dataset /expert"),
    "one route too few": (lambda file: file["offset"].__setitem__(1, file["offset"][1] - 1), "routes, and"),
    "a row that isn't there": (lambda file: file["sequence"].__setitem__(-1, 5000), "doesn't list rows of"),
    "other layers": (narrower, "files of two runs are mixed"),
    "no such expert": (as_u16, "names expert 60000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_route_files_are_named(lively, tmp_path, case):
    run = copied(lively[0], tmp_path / "run")
    path, (spoil, expected) = run / "batches/step_000002/routes.0.h5", WRONG[case]
    if case == "not HDF5":
        spoil(path)
    else:
        with h5py.File(path, "r+") as file:
            spoil(file)
    resize(path)
    with pytest.raises(UserError) as error:
        by_expert(analyze(run, Alone()).experts)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_route_files_that_retention_deleted_are_said_to_be_gone(lively, tmp_path, capsys):
    run = copied(lively[0], tmp_path / "run")
    (run / "batches/step_000002/routes.0.h5").unlink()
    script("logprob_mismatch", run, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["route_files_gone"] == 1
    assert 0 < found["experts"]["tokens"] < found["tokens"]["tokens"]
    for path in run.glob("batches/*/routes.*.h5"):
        path.unlink()
    script("logprob_mismatch", run)
    assert "expert (6 route files are gone" in " ".join(capsys.readouterr().out.split())


def test_an_expert_is_counted_once_a_token_and_one_that_all_have_has_no_difference():
    experts = Experts()
    table, latest, found, whole = np.zeros((1, 4, 2)), np.zeros((1, 4), np.int64), np.zeros((1, 4, 9)), np.zeros(6)
    routes = np.array([[[0, 0, 1]], [[0, 2, 2]], [[0, 1, 1]]], np.uint8)
    mu, o, mask = np.full(3, -1.0, np.float32), np.array([-1.5, -2.0, np.nan], np.float32), np.ones(3, np.uint8)
    assert add_tokens(routes, mu, mask, o, table, latest, 0) == (2, 1.5)
    end_sequence(table, 2.0, 1.5, found, whole)
    experts.add(found, whole, (1, 3))
    said = by_expert(experts)
    assert said["difference"] == [[None, -0.5, 0.5, None]]
    assert [(row["expert"], row["tokens"], row["standard_error"]) for row in said["worst"]] == [(2, 1, None), (1, 1, None)]
