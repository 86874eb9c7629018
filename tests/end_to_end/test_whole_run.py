"""The main job end to end: every box of the pipeline, on this machine, through the command line."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import whole_runs as runs

from miles.data.store.events import read_events
from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir, steps_in
from miles.data.store.shard import open_shard
from miles.data.store.train_record import open_train_record


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "miles.cli", *words], capture_output=True, text=True)


def test_every_step_left_its_files(undisturbed: Path) -> None:
    folder = RunDir(undisturbed)
    lines = runs.metrics(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "sft"] == [1, 2]
    assert [line["step"] for line in lines if line["kind"] == "rollout"] == [3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2, 5, 8]
    assert steps_in(folder.batches) == steps_in(folder.train_records) == list(range(1, 9))
    assert steps_in(folder.checkpoints) == [6, 8], "the newest two are retained"
    assert all((folder.checkpoint(step) / "COMPLETE").is_file() for step in steps_in(folder.checkpoints))
    assert (undisturbed / "report" / "index.html").is_file()
    assert json.loads((undisturbed / "latest" / "exit.json").read_text())["code"] == 0
    assert not list(undisturbed.glob("attempts/*/sync"))


def test_no_draw_is_lost_or_used_twice(undisturbed: Path) -> None:
    used = [draw for step in range(3, 9) for draw in read_manifest(RunDir(undisturbed).batch(step)).draws]
    assert used == list(range(6 * 4))


def test_mismatch_is_exactly_zero(undisturbed: Path) -> None:
    """The log-prob of the decode step that sampled a token has the bits that the trainer recomputes, over every token."""
    compared = 0
    for step in range(3, 9):
        manifest = read_manifest(RunDir(undisturbed).batch(step))
        shards = [open_shard(RunDir(undisturbed).batch(step) / entry.name) for entry in manifest.shards]
        for path in RunDir(undisturbed).train(step).glob("*.h5"):
            with open_train_record(path) as record:
                table = record.sequences()
                offset = table["offset"].astype(int)
                trained = record.tokens(0, len(offset) - 1, ["train_logprob"])["train_logprob"]
                for i, (shard, row) in enumerate(zip(table["shard"], table["row"], strict=True)):
                    rollout = shards[shard].tokens(int(row), int(row) + 1, ["rollout_logprob"])["rollout_logprob"]
                    generated = ~np.isnan(rollout)
                    assert rollout[generated].tobytes() == trained[offset[i] : offset[i + 1]][generated].tobytes()
                    compared += int(generated.sum())
    assert compared >= 6 * 16
    assert all(line["train/train_rollout_logprob_abs_diff"] == 0.0 for line in runs.metrics(undisturbed) if line["kind"] == "rollout")


def loopback6() -> list[str]:
    """IPv6's loopback as the host of all servers, where this machine has it."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return []
    return ["cluster.host=::1"]


def test_a_second_run_has_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """Also with weights that go over sockets in place of files."""
    host = loopback6()
    runs.run(tmp_path / "run", *runs.STEPS, "train.update_weight_transport=tensor", *host)
    runs.same_run(undisturbed, tmp_path / "run")
    logs = tmp_path / "run/attempts/000001/logs"
    served = (logs / "engine.0.log").read_text()
    assert ("at http://[::1]:" if host else "at http://127.0.0.1:") in served


def test_transformers_loads_the_export(undisturbed: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(undisturbed / "hf")
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "hf")
    assert model.config.model_type == "qwen3_moe"
    assert tokenizer.decode(tokenizer("1 + 2 =")["input_ids"]) == "1 + 2 ="


def test_run_again_says_that_it_is_finished(undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    again = command("run", str(undisturbed))
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused(undisturbed: Path) -> None:
    again = command("run", *runs.STEPS, "seed=4321", "--run-dir", str(undisturbed))
    assert again.returncode == 78
    assert "seed" in again.stderr
    assert "choose another --run-dir" in again.stderr


def test_status_and_logs(undisturbed: Path) -> None:
    status = command("status", str(undisturbed), "--json")
    assert status.returncode == 0, status.stderr
    found = json.loads(status.stdout)
    assert found["step"] == 8
    logs = command("logs", str(undisturbed), "service")
    assert "prompts" in logs.stdout


def test_two_trainer_ranks(undisturbed: Path, undisturbed_two: Path) -> None:
    """World size 2: losses of the warm start as with one rank, mismatch still exactly zero."""
    two = [line for line in runs.metrics(undisturbed_two) if line["kind"] != "eval"]
    one = {(line["kind"], line["step"]): line for line in runs.metrics(undisturbed)}
    assert len(two) == 8
    for line in two:
        if line["kind"] == "sft":
            np.testing.assert_allclose(line["train/loss"], one["sft", line["step"]]["train/loss"], rtol=1e-5)
        else:
            assert line["train/train_rollout_logprob_abs_diff"] == 0.0


def test_everything_in_a_run_can_be_inspected_and_is_as_it_was_sealed(undisturbed: Path) -> None:
    folder, told = RunDir(undisturbed), command("inspect", str(undisturbed), "--verify")
    assert (told.returncode, told.stderr) == (0, "")
    assert "as sealed" in told.stdout.splitlines()[-1]
    assert "no checksum" not in told.stdout
    for path in (undisturbed, folder.batch(5), folder.eval(5), folder.train(5) / "node_0000.h5", folder.checkpoint(8), folder.journal_file(0, 1), folder.provenance):
        told = command("inspect", str(path), "--json")
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout)["path"] == str(path)
    (row,) = command("inspect", str(folder.batch(5)), "--rows", "2", "--json").stdout.splitlines()
    manifest = read_manifest(folder.batch(5))
    with open_shard(folder.batch(5) / manifest.shards[0].name) as shard:
        (sample,) = shard.samples(2, 3)
    assert (json.loads(row)["draw"], json.loads(row)["response"]) == (sample.draw, sample.response)
    assert "".join(token["text"] for token in json.loads(row)["tokens"][: sample.prompt_length]) == sample.prompt


def test_every_role_tells_its_phases(undisturbed: Path) -> None:
    found: dict[str, set[str]] = {}
    for event in read_events(RunDir(undisturbed)):
        assert event["start"] <= event["end"]
        found.setdefault(event["component"], set()).add(event["phase"])
    assert found == {
        "trainer": {"wait", "train", "sync", "eval", "save"},
        "worker": {"generate", "seal"},
        "service": {"prompts", "compose"},
        "engine": {"start", "update_weights"},
    }


def test_a_run_that_goes_on_with_other_threads_says_what_it_can_promise(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    said = runs.run(tmp_path / "run", *runs.STEPS, "cluster.threads=2", "num_rollout=7")
    assert "guarantee: replayed from attempt 2 on (before: exact): threads 1 → 2" in said.splitlines()
    assert "guarantee: replayed since attempt 2: threads 1 → 2" in command("status", str(tmp_path / "run")).stdout.splitlines()
