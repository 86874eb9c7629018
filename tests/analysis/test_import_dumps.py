"""Dumps as slime and miles write them, made by torch.save from a planted run: imported they give its metrics. What can't be read is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import places, trained_of
from shard_rows import Row, rows_of
from test_import_jsonl import metrics, same

from miles.analysis.routing import routing
from miles.analysis.speculative import speculative
from miles.config.exits import UserError
from miles.data.importers.dumps import import_dumps
from miles.data.store.manifest import read_manifest
from miles.data.store.shard import open_shard

ROOT = Path(__file__).resolve().parents[2]
SLICES = ("position", "rollout_probability", "entropy", "used", "step", "prefix_cache", "status")
Joined = list[tuple[Row, dict[str, Any]]]


class Foreign(Enum):
    """A class that a dump must not hold."""

    BAD = 1


@pytest.fixture(scope="module")
def joined(lively: Any) -> Joined:
    rows, trained = rows_of(lively[0]), trained_of(lively[0])
    return [(row, trained[place]) for row, place in zip(rows, places(rows, lively[0]), strict=True)]


def sample_dict(row: Row, index: int) -> dict[str, Any]:
    """What Sample.to_dict() gives."""
    prompt, numbers = row.numbers["prompt_length"], row.numbers
    return {
        "group_index": numbers["draw"], "index": index, "prompt": "text", "tokens": row.tokens["token_id"].tolist(), "response": "text",
        "response_length": len(row.tokens["token_id"]) - prompt, "label": None, "reward": numbers["reward"], "loss_mask": row.tokens["loss_mask"][prompt:].tolist(),
        "weight_versions": [str(row.now)], "rollout_log_probs": np.nan_to_num(row.tokens["rollout_logprob"][prompt:]).tolist(),
        "rollout_routed_experts": row.routes.astype(np.int32), "remove_sample": False, "status": {1: "completed", 2: "truncated"}[numbers["status"]], "metadata": {"level": 3},
        "spec_info": {"spec_accept_token_num": 6, "spec_draft_token_num": 9, "spec_verify_ct": 4, "completion_token_num": 10},
        "prefix_cache_info": {"cached_tokens": numbers["cached_tokens"], "total_prompt_tokens": prompt}, "non_generation_time": 0.0,
    }  # fmt: skip


def rank_data(members: list[tuple[int, Row, dict[str, Any]]], cp_rank: int = 0, cp_size: int = 1) -> dict[str, Any]:
    """rollout_data of a trainer rank."""
    data: dict[str, Any] = {name: [] for name in ("tokens", "loss_masks", "log_probs", "rollout_log_probs", "advantages", "entropy", "response_lengths", "total_lengths", "rewards", "sample_indices", "partition")}
    for position, row, seen in members:
        prompt, total = row.numbers["prompt_length"], len(row.tokens["token_id"])
        mine = np.zeros(total, bool)  # tokens whose pass this rank makes: two pieces of 2 · cp_size
        piece = -(-total // (2 * cp_size))
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            mine[number * piece : (number + 1) * piece] = True
        here = mine[prompt - 1 : total - 1]
        for name, values in (("log_probs", seen["train_logprob"]), ("rollout_log_probs", np.nan_to_num(row.tokens["rollout_logprob"])), ("advantages", seen["advantage"]), ("entropy", seen["entropy"])):
            data[name].append(torch.from_numpy(values[prompt:][here].copy()))
        data["tokens"].append(torch.from_numpy(row.tokens["token_id"].astype(np.int64)))
        data["loss_masks"].append(torch.from_numpy(row.tokens["loss_mask"][prompt:].astype(np.int32)))
        data["response_lengths"].append(total - prompt)
        data["total_lengths"].append(total)
        data["rewards"].append(row.numbers["reward"] - 0.5)  # compared within its group
        data["sample_indices"].append(1000 * row.step + position)
        data["partition"].append(position)
    return data


def dump(folder: Path, joined: Joined, *, cp: int = 1, form: int = 1, rollouts: bool = True) -> Path:
    """Two data-parallel ranks, each dumped by two tensor-parallel and cp context-parallel ranks, and an earlier pipeline stage; or whole samples in one file."""
    (folder / "rollout_data").mkdir(parents=True)
    (folder / "train_data").mkdir()
    for step in sorted({row.step for row, _ in joined}):
        here = [(position, *pair) for position, pair in enumerate(pair for pair in joined if pair[0].step == step)]
        if rollouts:
            samples = [sample_dict(row, 1000 * step + position) for position, row, _ in here]
            torch.save({"rollout_id": step, "metadata": {}, "samples": samples}, folder / f"rollout_data/{step}.pt")
            torch.save({"rollout_id": step, "samples": samples}, folder / f"rollout_data/eval_{step}.pt")
        raw = [row.numbers["reward"] for _, row, _ in here]
        if form == 2:
            data, whole = rank_data(here), []
            for place in range(len(here)):
                one = {name: data[name][place] for name in data if name not in ("sample_indices", "partition")}
                whole.append({"data_parallel_rank": place % 2, "sample_index": data["sample_indices"][place], "rollout_position": data["partition"][place], **one})
            torch.save({"format_version": 2, "rollout_id": step, "rank": 0, "samples": whole, "dp_shards": [], "raw_reward": raw}, folder / f"train_data/{step}_0.pt")
            continue
        rank = 0
        for data_rank in range(2):
            for _ in range(2):  # tensor-parallel ranks hold the same
                for cp_rank in range(cp):
                    data = {**rank_data(here[data_rank::2], cp_rank, cp), "raw_reward": raw}
                    where = {"cp_rank": cp_rank, "cp_size": cp, "qkv_format": "thd"} if cp > 1 else {}
                    torch.save({"rollout_id": step, "rank": rank, "rollout_data": data, **where}, folder / f"train_data/{step}_{rank}.pt")
                    rank += 1
        torch.save({"rollout_id": step, "rank": rank, "rollout_data": {name: value for name, value in data.items() if name not in ("log_probs", "entropy")}, **where}, folder / f"train_data/{step}_{rank}.pt")
    return folder


def files(folder: Path) -> tuple[list[Path], list[Path]]:
    return sorted((folder / "rollout_data").glob("*.pt")), sorted((folder / "train_data").glob("*.pt"))


def compare(theirs: Path, run: Path) -> None:
    found, expected = metrics(theirs), metrics(run)
    for name in ("tokens", "sequences", "divergence", "odd", "histogram"):
        same(found[name], expected[name], name)
    for name in SLICES:
        same(found["slices"][name], expected["slices"][name], name)


@pytest.mark.parametrize(("cp", "form"), [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_dumped_imported_and_analysed_is_the_same(cp: int, form: int, lively: Any, joined: Joined, tmp_path: Path) -> None:
    folder = dump(tmp_path / "dumps", joined, cp=cp, form=form)
    counts, notes = import_dumps(*files(folder), tmp_path / "theirs")
    assert (counts.steps, counts.samples, counts.trained) == (3, 96, 96)
    repeated = {"samples of ranks that repeat another's": 96 * cp, "train dumps without log-probs (earlier pipeline stages)": 3} if form == 1 else {}
    assert notes == {"evaluation dumps passed over": 3, **repeated}
    compare(tmp_path / "theirs", lively[0])
    mine, theirs = routing(lively[0]), routing(tmp_path / "theirs")
    assert theirs["load"] == mine["load"]
    assert speculative(tmp_path / "theirs")["reported_by_samples"][0]["accept_length"] == 2.5
    with open_shard(tmp_path / "theirs/batches/step_000001/rollout.0.h5") as shard:
        assert shard.metadata(0, 1)[0]["level"] == 3
    assert read_manifest(tmp_path / "theirs/batches/step_000003").policy.weight_version == max(row.now for row, _ in joined)


def test_train_dumps_alone_make_batches(lively: Any, joined: Joined, tmp_path: Path) -> None:
    folder = dump(tmp_path / "dumps", joined, rollouts=False)
    import_dumps([], files(folder)[1], tmp_path / "theirs", samples_per_prompt=4)
    found, expected = metrics(tmp_path / "theirs"), metrics(lively[0])
    same(found["tokens"], expected["tokens"])
    with open_shard(tmp_path / "theirs/batches/step_000002/rollout.0.h5") as shard:
        numbers = shard.sequences()
    assert Counter(numbers["draw"].tolist()) == dict.fromkeys(range(8, 16), 4)
    raw = [row.numbers["reward"] for row, _ in joined if row.step == 2]
    np.testing.assert_allclose(numbers["reward"], raw, rtol=1e-6)


def test_rollout_dumps_alone_make_batches_without_train_records(joined: Joined, tmp_path: Path) -> None:
    folder = dump(tmp_path / "dumps", joined)
    counts, _ = import_dumps(files(folder)[0], [], tmp_path / "theirs")
    assert (counts.samples, counts.trained) == (96, 0)


def one(tmp_path: Path, joined: Joined, **change: Any) -> list[Path]:
    """A rollout dump of one changed sample."""
    path = tmp_path / "data_1.pt"
    torch.save({"rollout_id": 1, "samples": [{**sample_dict(joined[0][0], 0), **change}]}, path)
    return [path]


@pytest.mark.parametrize(("change", "said"), [
    ({"status": Foreign.BAD}, r"data_1\.pt: holds test_import_dumps\.Foreign, which is not read from dumps"),
    ({"reward": {"score": 1.0, "form": 0.5}}, "sample 0: its reward is an object with score, form; say which counts by --reward-key"),
    ({"response_length": 10_000}, "sample 0: response_length is 10000 of"),
    ({"loss_mask": [1, 0]}, "sample 0: loss_mask has 2 values for"),
    ({"reward": "much"}, "sample 0: reward: a number expected"),
], ids=["class", "reward_object", "response_length", "loss_mask", "reward"])  # fmt: skip
def test_a_dump_that_is_wrong_is_named_and_leaves_nothing(tmp_path: Path, joined: Joined, change: dict[str, Any], said: str) -> None:
    paths = one(tmp_path, joined, **change)
    with pytest.raises(UserError, match=said):
        import_dumps(paths, [], tmp_path / "theirs")
    assert [each.name for each in tmp_path.iterdir()] == ["data_1.pt"]


def test_parts_of_rewards_samples_taken_out_and_mixed_versions(tmp_path: Path, joined: Joined) -> None:
    paths = one(tmp_path, joined, reward={"score": 0.75}, remove_sample=True, weight_versions=["3", "4"])
    _, notes = import_dumps(paths, [], tmp_path / "theirs", reward_key="score")
    assert notes == {"samples of several weight versions: where one begins is not in the dump": 1}
    with open_shard(tmp_path / "theirs/batches/step_000001/rollout.0.h5") as shard:
        (sample,) = shard.samples()
    assert (sample.reward, int(sample.loss_mask.sum()), sample.runs, sample.metadata["weight_versions"]) == (0.75, 0, [], ["3", "4"])


def test_train_dumps_that_cannot_be_used(tmp_path: Path, joined: Joined) -> None:
    here = [(position, *pair) for position, pair in enumerate(joined[:4])]

    def refused(said: str, **changes: dict[str, Any]) -> None:
        paths = []
        for name, content in changes.items():
            paths.append(tmp_path / f"{name}.pt")
            torch.save({"rollout_id": 1, "rank": 0, **content}, paths[-1])
        with pytest.raises(UserError, match=said):
            import_dumps([], paths, tmp_path / "theirs")

    data = rank_data(here)
    refused("none of the 1 train dumps of rollout 1 has log_probs", t1_0={"rollout_data": {name: value for name, value in data.items() if name != "log_probs"}})
    part = rank_data(here, 0, 2)
    refused("may be a context-parallel rank's part, and the file doesn't say which", t1_1={"rollout_data": part})
    refused("of its 2 context-parallel ranks the dump of rank 1 is missing", t1_2={"rollout_data": part, "cp_rank": 0, "cp_size": 2})
    refused("in the layout 'bshd' are not read", t1_3={"rollout_data": part, "cp_rank": 0, "cp_size": 2, "qkv_format": "bshd"})
    nameless = {name: value for name, value in data.items() if name not in ("partition", "sample_indices")}
    refused("neither sample_indices nor partition", t1_4={"rollout_data": nameless}, t1_5={"rollout_data": nameless})
    refused("holds rollout 2, and its name says 1", t1_6={"rollout_id": 2, "rollout_data": data})


def test_files_of_two_runs_and_files_that_are_no_dumps(tmp_path: Path, joined: Joined) -> None:
    rollout = one(tmp_path, joined)
    torch.save({"rollout_id": 1, "rank": 0, "rollout_data": rank_data([(0, *joined[1])])}, tmp_path / "train_1_0.pt")
    with pytest.raises(UserError, match=r"its tokens differ from those that .*train_1_0\.pt trained on under its number"):
        import_dumps(rollout, [tmp_path / "train_1_0.pt"], tmp_path / "theirs")
    content = rollout[0].read_bytes()
    for name, wrong, said in (("cut_1.pt", content[: len(content) // 2], "no whole torch.save file"), ("text_1.pt", b"hello", "no file that torch.save wrote|no whole torch.save file"), ("list_1.pt", None, "an object expected, list found")):
        path = tmp_path / name
        if wrong is None:
            torch.save([1, 2], path)
        else:
            path.write_bytes(wrong)
        with pytest.raises(UserError, match=said):
            import_dumps([path], [], tmp_path / "theirs")
    with pytest.raises(UserError, match="its name has no rollout_id"):
        import_dumps([tmp_path / "data.pt"], [], tmp_path / "theirs")


def test_the_tool_imports_a_folder_of_dumps(joined: Joined, tmp_path: Path) -> None:
    folder = dump(tmp_path / "dumps", joined[:32])
    tool = [sys.executable, ROOT / "tools/convert/dumps_to_run.py", "--dumps", folder, "--output", tmp_path / "theirs", "--json"]
    told = json.loads(subprocess.run(tool, capture_output=True, text=True, check=True).stdout)
    assert (told["samples"], told["trained"]) == (32, 32)
    again = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (78, "")
    assert "is not empty, and an import writes over nothing" in again.stderr
