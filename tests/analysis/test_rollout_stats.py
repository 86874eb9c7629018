"""rollout_stats against loops over sequences that h5py read, on planted and on random runs; and what is no result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import random_run
from script import script
from shard_rows import Row, rows_of

from miles.analysis.rollout_stats import loops, repeated_share, rollout_stats
from miles.config.exits import UserError
from miles.data.store.manifest import Manifest, Policy, ShardEntry, read_manifest, seal_manifest
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import write_shard

ROOT = Path(__file__).resolve().parents[2]
STATUS = {1: "completed", 2: "truncated"}


def plain(rows: list[Row]) -> dict[str, Any]:
    """The figures, sequence by sequence."""
    length = [len(row.tokens["token_id"]) - row.numbers["prompt_length"] for row in rows]
    reward = [row.numbers["reward"] for row in rows]
    groups = defaultdict(list)
    for row in rows:
        groups[row.step, row.numbers["draw"]].append(row.numbers["reward"])
    lags, repeated = [], []
    for row in rows:
        if row.runs:
            lags += [row.now - row.version(place) for place in range(row.runs[0][0], len(row.tokens["token_id"]))]
        token = row.tokens["token_id"].tolist()
        token = [token[i] for i in range(row.numbers["prompt_length"], len(token)) if row.tokens["flags"][i] & 1]
        pieces = [tuple(token[i : i + 4]) for i in range(len(token) - 3)]
        if pieces:
            repeated.append(1 - len(set(pieces)) / len(pieces))
    several = [set(rewards) for rewards in groups.values() if len(rewards) > 1]
    prompts = sum(row.numbers["prompt_length"] for row in rows)
    return {
        "samples": len(rows), "groups": len(groups), "prompt_tokens": prompts, "response_tokens": sum(length), "response_mean": np.mean(length),
        "response_min": min(length), "response_max": max(length), "response_p50": np.median(length), "response_p90": np.percentile(length, 90),
        "truncated": np.mean([row.numbers["status"] == 2 for row in rows]), "status": dict(Counter(STATUS[row.numbers["status"]] for row in rows)),
        "reward_mean": np.mean(reward), "reward_std": np.std(reward), "reward_min": min(reward), "reward_max": max(reward), "without_reward": 0,
        "same_reward_groups": np.mean([len(each) == 1 for each in several]), "repeated": np.mean(repeated),
        "cached": sum(row.numbers["cached_tokens"] for row in rows) / prompts, "lag_mean": np.mean(lags), "lag_max": max(lags),
        "several_versions": np.mean([len(row.runs) > 1 for row in rows]),
    }  # fmt: skip


def compare(found: dict[str, Any], rows: list[Row]) -> None:
    expected = plain(rows)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_every_figure_is_that_of_a_loop_over_sequences(lively: Any) -> None:
    folder, _ = lively
    rows, found = rows_of(folder), rollout_stats(folder)
    compare(found["total"], rows)
    assert found["total"]["several_versions"] > 0
    for step in found["steps"]:
        compare(step, [row for row in rows if row.step == step["step"]])
    for name in ("source", "engine"):
        assert [row[name] for row in found[f"{name}s"]] == sorted({getattr(row, name) for row in rows})
        for each in found[f"{name}s"]:
            compare(each, [row for row in rows if getattr(row, name) == each[name]])
    only = rollout_stats(folder, 2, 2)
    assert only["total"] == {key: value for key, value in only["steps"][0].items() if key not in ("step", "dropped")}


def test_empty_responses_and_groups_of_one_reward(tmp_path: Path) -> None:
    random_run(tmp_path, seed=3, longest=60)
    compare(rollout_stats(tmp_path)["total"], rows_of(tmp_path))


def test_dropped_draws_are_counted_by_reason(tmp_path: Path) -> None:
    random_run(tmp_path, longest=20, steps=1)
    folder = tmp_path / "batches/step_000001"
    manifest = read_manifest(folder)
    seal_manifest(folder, manifest.model_validate({**manifest.model_dump(by_alias=True), "dropped": [{"draw": 1, "why": "aborted"}, {"draw": 2, "why": "aborted"}]}))
    assert rollout_stats(tmp_path)["dropped"] == {"aborted": 2}


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repeated_share_counts_pieces(token: list[int]) -> None:
    pieces = [tuple(token[i : i + 4]) for i in range(len(token) - 3)]
    expected = 1 - len(set(pieces)) / len(pieces) if pieces else float("nan")
    assert repeated_share(np.array(token, np.int32)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("token", "is_loop"), [
    ([1, 2, 3] * 30, True), ([9] * 10 + [5] * 64, True), ([5] * 63, False), (list(range(17)) * 5, False), ([7, *range(16)] * 1 + list(range(16)) * 4, True), ([5] * 64 + [6], False),
])  # fmt: skip
def test_a_loop_is_a_short_piece_to_the_end(token: list[int], is_loop: bool) -> None:
    assert loops(np.array(token, np.int32)) is is_loop


def test_the_tool_prints_tables_json_and_a_page(lively: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = lively
    assert script("rollout_stats", folder, "--html", tmp_path / "page.html") == 0
    told = capsys.readouterr().out
    assert "96 samples" in told
    assert "http://node-1:30003" in told
    page = (tmp_path / "page.html").read_text()
    assert "Groups of one reward" in page
    assert "http://" not in page.replace("http://node-", "")  # nothing is loaded
    assert script("rollout_stats", folder, "--json", "--first", 3) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(rollout_stats(folder, 3)))


@pytest.mark.parametrize(("arguments", "said"), [
    (["RUN", "--first", "9"], "nothing to analyse: it holds no rollout batch between those steps"), (["RUN", "--html", "nowhere/a.html"], "there is no folder nowhere"),
])  # fmt: skip
def test_what_is_wrong_is_one_line_and_78(lively: Any, tmp_path: Path, arguments: list[str], said: str) -> None:
    folder, _ = lively
    words = [str(folder) if word == "RUN" else word for word in arguments]
    done = subprocess.run([sys.executable, ROOT / "tools/analyze/rollout_stats.py", *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (78, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_is_no_run_is_named(lively: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; give a run directory"):
        rollout_stats(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it holds no eval batch"):
        rollout_stats(lively[0], kind="eval")


def test_batches_without_a_sequence_are_no_result(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    empty = write_shard(run.batch(1) / "rollout.0.h5", [])
    entry = ShardEntry(name=empty.name, bytes=empty.bytes, xxh3=empty.xxh3, sequences=0, tokens=0)
    seal_manifest(run.batch(1), Manifest(run_id="run", epoch=1, step=1, kind="rollout", policy=Policy(weight_version=0, weight_checksum=""), shards=[entry]))
    with pytest.raises(UserError, match="nothing to analyse: its 1 rollout batches hold no sequence"):
        rollout_stats(tmp_path)


def test_a_shard_that_is_cut_off_is_named(tmp_path: Path) -> None:
    random_run(tmp_path, longest=20, steps=1)
    path = tmp_path / "batches/step_000001/rollout.0.h5"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"rollout\.0\.h5: \d+ bytes expected by manifest\.json, 1000 found"):
        rollout_stats(tmp_path)
