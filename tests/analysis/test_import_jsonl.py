"""A run exported to JSON Lines, imported and analysed gives the same metrics; what is wrong is named by line and field, and nothing is left of it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import lines_of
from made_runs import random_run

from miles.analysis.analyze import analyze
from miles.analysis.measure import first_divergence, intervals, sequence_metrics, slices, token_metrics, worst_token_ids
from miles.analysis.ranks import Alone
from miles.analysis.rollout_stats import rollout_stats
from miles.config.exits import UserError
from miles.data.importers.jsonl import import_jsonl
from miles.data.importers.written import RunWriter
from miles.data.inspect.recognise import describe
from miles.data.store.manifest import read_manifest, verify_files

ROOT = Path(__file__).resolve().parents[2]
LINE = {"token_ids": [1, 2, 3, 4], "prompt_length": 1, "rollout_logprobs": [-1.0, -2.0, -0.5], "train_logprobs": [-1.0, -2.5, -0.5], "reward": 1}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def metrics(run: Path) -> dict[str, Any]:
    state = analyze(run, Alone())
    by_slice = {name: {row["value"]: row for row in rows or []} for name, rows in slices(state).items() if name != "node"}
    return {
        "tokens": token_metrics(state), "intervals": intervals(state), "sequences": sequence_metrics(state), "divergence": first_divergence(state),
        "slices": by_slice, "ids": {row["token_id"]: row for row in worst_token_ids(state, most=10**6)}, "odd": state.odd.tolist(), "histogram": state.histogram.tolist(),
    }  # fmt: skip


def same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            same(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), where  # other files, so other sums within a chunk
    else:
        assert found == expected, where


@pytest.mark.parametrize("made", ["planted", "random"])
def test_exported_imported_and_analysed_is_the_same(made: str, lively: Any, tmp_path: Path) -> None:
    run = lively[0] if made == "planted" else tmp_path / "run"
    if made == "random":
        random_run(run, seed=2, steps=2, longest=300)
    exported = write(tmp_path / "export.jsonl", lines_of(run))
    counts, ignored = import_jsonl([exported], tmp_path / "theirs")
    assert ignored == {"mood": counts.samples}
    same(metrics(tmp_path / "theirs"), metrics(run))
    mine, theirs = rollout_stats(run), rollout_stats(tmp_path / "theirs")
    same({**theirs, "run": ""}, {**mine, "run": ""})
    for step in range(1, counts.steps + 1):
        folder = tmp_path / "theirs/batches" / f"step_{step:06d}"
        verify_files(folder, read_manifest(folder))


def test_small_shards_hold_what_one_holds(lively: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = write(tmp_path / "export.jsonl", lines_of(lively[0]))
    monkeypatch.setattr(RunWriter.__init__, "__defaults__", (500,))
    import_jsonl([exported], tmp_path / "theirs")
    assert len(list((tmp_path / "theirs/batches/step_000001").glob("rollout.*.h5"))) > 2
    same(metrics(tmp_path / "theirs"), metrics(lively[0]))


def test_names_of_other_programs_and_what_is_left_out(tmp_path: Path) -> None:
    lines = [
        {"prompt_ids": [7, 8], "completion_ids": [9, 10, 11], "rollout_log_probs": [-0.25, 0.0, -1], "log_probs": [-0.5, 0, -1], "response_mask": [1, 0, 1], "rollout_id": 4, "group_index": "a", "finish_reason": {"type": "length"}, "weight_version": 6, "advantage": 0.5},
        {"tokens": [7, 8, 9], "response_length": 1, "rollout_log_probs": [None, None, -3.5], "rollout_id": 4, "group_index": "a", "truncated": True, "metadata": {"x": 1}, "prompt": [{"role": "user", "content": "hi"}]},
    ]  # fmt: skip
    packed = tmp_path / "export.jsonl.gz"
    packed.write_bytes(gzip.compress("\n\n".join(json.dumps(line) for line in lines).encode()))
    counts, ignored = import_jsonl([packed], tmp_path / "theirs")
    assert (counts.steps, counts.samples, counts.trained, ignored) == (1, 2, 1, {})
    from miles.data.store.shard import open_shard
    from miles.data.store.train_record import open_train_record

    with open_shard(tmp_path / "theirs/batches/step_000004/rollout.0.h5") as shard, open_train_record(tmp_path / "theirs/train/step_000004/node_0000.h5") as record:
        first, second = shard.samples()
        trained = record.tokens(0, 1, record.names)
    assert (first.draw, first.sample, second.draw, second.sample) == (0, 0, 0, 1)
    assert first.token_id.tolist() == [7, 8, 9, 10, 11]
    assert first.flags.tolist() == [0, 0, 3, 0, 3]  # the token between is a tool's: not generated
    np.testing.assert_array_equal(first.rollout_logprob, np.array([np.nan, np.nan, -0.25, np.nan, -1], np.float32))
    assert first.runs == [(2, 6)]
    assert [first.status.name, second.status.name] == ["TRUNCATED", "TRUNCATED"]
    assert np.isnan(first.reward)
    assert second.metadata == {"x": 1}
    assert second.prompt == '[{"role": "user", "content": "hi"}]'
    np.testing.assert_array_equal(trained["train_logprob"], np.array([np.nan, np.nan, -0.5, 0, -1], np.float32))
    np.testing.assert_array_equal(trained["advantage"], np.array([np.nan, np.nan, 0.5, 0.5, 0.5], np.float32))
    assert trained["used"].tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize(("change", "said"), [
    ({"token_ids": [1, 2.5, 3, 4]}, "token_ids: token ids expected, 2.5 found"),
    ({"token_ids": None}, "token_ids: missing; give token_ids and prompt_length"),
    ({"prompt_length": None}, "prompt_length: missing beside token_ids"),
    ({"prompt_length": 5}, "prompt_length: 5 of 4 tokens"),
    ({"rollout_logprobs": [-1.0]}, r"rollout_logprobs: 1 values, and there are 3 response tokens \(4 with the prompt\)"),
    ({"rollout_logprobs": None}, "rollout_logprobs: missing"),
    ({"rollout_logprobs": ["-1", -2, -3]}, "rollout_logprobs: numbers or null expected, '-1' found"),
    ({"train_logprobs": None, "advantages": [1, 1, 1]}, "advantages: there without train_logprobs"),
    ({"loss_mask": [1, 2, 1]}, "loss_mask: 0 and 1 expected"),
    ({"reward": "high"}, "reward: a number expected, 'high' found"),
    ({"status": "lost"}, "status: one of pending, completed"),
    ({"step": -1}, "step: a whole number from 0 on expected, -1 found"),
    ({"step": 0}, "step 0 comes again after another one: sort by step"),
    ({"group": 5, "sample": 0, "step": 1}, "sample 0 of group 5 comes twice in step 1"),
    ({"group": 4}, "group 4 was in an earlier step already.*--groups-per-step"),
    ({"group": "x"}, "group: lines by name after lines by number"),
    ({"weight_versions": [[2, 1], [1, 1]]}, "weight_versions: pairs of first token"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)  # fmt: skip
def test_a_wrong_line_is_named_and_leaves_nothing(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    good = [{**LINE, "step": 0, "group": 4}, {**LINE, "step": 1, "group": 5}]
    path = write(tmp_path / "export.jsonl", [*good, {**LINE, "step": 1, "group": 6, **change}])
    with pytest.raises(UserError, match=rf"export\.jsonl:3: {said}"):
        import_jsonl([path], tmp_path / "theirs")
    assert [each.name for each in tmp_path.iterdir()] == ["export.jsonl"]


def test_groups_that_begin_anew_get_numbers_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "export.jsonl", [{**LINE, "step": step, "group": group} for step in (0, 1) for group in (0, 0, 1)])
    import_jsonl([path], tmp_path / "theirs", groups_per_step=True)
    assert [read_manifest(tmp_path / f"theirs/batches/step_00000{step}").draws for step in (0, 1)] == [[0, 1], [2, 3]]


def test_the_tool_writes_over_nothing(tmp_path: Path) -> None:
    tool = [sys.executable, ROOT / "tools/convert/jsonl_to_run.py", write(tmp_path / "export.jsonl", [LINE]), "--output"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    refused = subprocess.run([*tool, tmp_path / "full"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (78, "")
    assert "is not empty, and an import writes over nothing" in refused.stderr
    assert [each.name for each in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "new").mkdir()
    told = subprocess.run([*tool, tmp_path / "new"], capture_output=True, text=True, check=True)
    assert "1 samples of 1 steps, 4 tokens; 1 samples with the trainer's log-probs" in told.stdout
    seen = describe(tmp_path / "new")
    assert (seen.what, seen.facts["imported from"], seen.notes) == ("run directory", "jsonl", [])
    judged = subprocess.run([sys.executable, ROOT / "tools/analyze/logprob_mismatch.py", tmp_path / "new", "--json"], capture_output=True, text=True, check=False)
    assert json.loads(judged.stdout)["tokens"]["max_abs_diff"] == 0.5


@pytest.mark.parametrize(("content", "said"), [(b"", "nothing to import: no sample was found"), (b"{}\n[1]\n", "1: token_ids: missing"), (b'{"a": \n', "1: not JSON"), (b"\xff\xfe", "not UTF-8"), (b"[1]\n", "1: an object expected, list found")])
def test_what_is_no_export_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "export.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        import_jsonl([tmp_path / "export.jsonl"], tmp_path / "theirs")
    with pytest.raises(UserError, match="no such file or directory; give JSON Lines files"):
        import_jsonl([tmp_path / "none.jsonl"], tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_an_import_that_is_killed_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "export.jsonl")
    tool = subprocess.Popen([sys.executable, ROOT / "tools/convert/jsonl_to_run.py", tmp_path / "export.jsonl", "--output", tmp_path / "theirs"], stderr=subprocess.PIPE)
    with open(tmp_path / "export.jsonl", "w") as lines:
        for step in range(4):
            lines.write(json.dumps({**LINE, "step": step, "group": step}) + "\n")
        lines.flush()
        while not list(tmp_path.glob(".theirs.*.import/batches/step_000002/manifest.json")):
            assert tool.poll() is None, "it waits for more lines"
            time.sleep(0.02)
        tool.kill()
        tool.communicate()
    assert not (tmp_path / "theirs").exists()
    (tmp_path / "export.jsonl").unlink()
    import_jsonl([write(tmp_path / "export.jsonl", [LINE])], tmp_path / "theirs")
