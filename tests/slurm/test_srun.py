"""Components of a run as steps of a real job: ranks, addresses and surroundings by component, and how each kind of end is told."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from miles.slurm.minicluster import Cluster
from miles.slurm.srun import _PlainUnpickler

HERE = Path(__file__).parent
BATCH = """
import json, sys, time
from pathlib import Path
from miles.slurm.srun import SrunRunner, Step

case, folder = sys.argv[1], Path(sys.argv[2])
runner = SrunRunner(folder / "submitit")
train = runner.submit("train", "payloads.node_work", case, step=Step(0, 0, 2, options={"gres": "gpu:gb300:1"}, python=PYTHON))
rollout = runner.submit("rollout", "payloads.node_work", case, step=Step(1, 1, 1, architecture=ARCHITECTURE.get(case), setup=SETUP.get(case, ())))
loaded = sorted({"submitit", "pydantic", "numpy", "torch"} & set(sys.modules))
began = time.monotonic()
if case in ("terminated", "silent"):
    while not all((folder / "submitit" / "train" / f"at_work.{node}").exists() for node in (0, 1)):
        time.sleep(0.1)
    train.terminate()
if case == "silent":
    time.sleep(1)
    assert train.running()
    train.kill()
while train.running() or rollout.running():
    time.sleep(0.1)
told = {"train": train.outcome(), "rollout": rollout.outcome(), "all": [train.of_node(0), train.of_node(1)], "loaded": loaded, "seconds": time.monotonic() - began}
(folder / "told.json").write_text(json.dumps(told))
"""
SCRIPT = """#!/bin/bash
#SBATCH --partition=gb300 --nodes=2 --ntasks-per-node=1 --gres=gpu:gb300:1 --output={folder}/log
#SBATCH hetjob
#SBATCH --partition=h200 --nodes=2 --ntasks-per-node=1
exec {python} {folder}/batch.py {case} {folder}
"""
CASES = ("ends", "fails", "echoes", "killed", "exits", "terminated", "silent", "architecture", "python", "setup")


@pytest.fixture(scope="module")
def told(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the batch process of each case knows at its end; the jobs share nodes."""
    folders, jobs = {}, {}
    for case in CASES:
        folder = folders[case] = tmp_path_factory.mktemp(case)
        python = f"({sys.executable!r},)" if case != "python" else "('/no/such/python',)"
        (folder / "batch.py").write_text(BATCH.replace("PYTHON", python).replace("ARCHITECTURE", repr({"architecture": "sparc"})).replace("SETUP", repr({"setup": ("true", "no-such-module load cuda")})))
        env = slurm.env() | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])}
        jobs[case] = slurm.run(["sbatch", "--parsable"], input=SCRIPT.format(folder=folder, case=case, python=sys.executable), env=env).stdout.strip()
    deadline = time.monotonic() + 300
    found = {}
    for case, folder in folders.items():
        while not (folder / "told.json").exists() and slurm.run(["squeue", "-h", "-j", jobs[case]], check=False).stdout:
            assert time.monotonic() < deadline, case
            time.sleep(0.1)
        assert (folder / "told.json").exists(), (folder / "log").read_text()
        found[case] = {**json.loads((folder / "told.json").read_text()), "job": jobs[case], "folder": folder}
    return found


def test_each_node_knows_its_rank_address_and_accelerators(told: dict[str, Any], slurm: Cluster) -> None:
    first, second = told["ends"]["all"]
    rollout = told["ends"]["rollout"]
    assert [(each["role"], each["rank"], each["code"]) for each in (first, second, rollout)] == [("train", 0, 0), ("train", 1, 0), ("rollout", 0, 0)]
    assert first["node"].startswith("train")
    assert rollout["node"] in ("infer1", "infer3")  # the second of its group's nodes
    for each in (first, second, rollout):
        assert f" NodeAddr={each['host']} " in slurm.run(["scontrol", "-o", "show", "node", each["node"]]).stdout
    assert (len(first["gpus"]), len(second["gpus"]), rollout["gpus"]) == (1, 1, None)


def test_batch_process_starts_steps_with_the_standard_library(told: dict[str, Any]) -> None:
    assert told["ends"]["loaded"] == []


def test_a_node_that_fails_stops_the_others_and_is_the_cause(told: dict[str, Any]) -> None:
    seen = told["fails"]
    assert {name: seen["train"][name] for name in ("code", "reason", "rank")} == {"code": 1, "reason": "the trainer broke", "rank": 1}
    assert seen["all"][0]["code"] == 75
    assert seen["all"][0]["reason"] == "component train was stopped"
    assert seen["rollout"]["code"] == 0


def test_a_node_that_ends_first_is_an_echo_of_one_that_knows_why(told: dict[str, Any]) -> None:
    """As with a rank that hangs: all ranks hear of it, the first node's supervisor alone has the word on who it is."""
    seen = told["echoes"]
    assert seen["all"][1]["reason"] == "trainer 1 ended with exit code 75"
    assert seen["train"] == seen["all"][0]
    assert seen["train"]["reason"] == "trainer 1 hangs"


def test_a_killed_supervisor_is_tried_again_and_its_node_named(told: dict[str, Any]) -> None:
    seen = told["killed"]["train"]
    assert (seen["code"], seen["killed"], seen["rank"]) == (75, True, 1)
    assert seen["reason"] == f"the supervisor of component train on {seen['node']} was killed"
    assert seen["node"] == told["killed"]["all"][1]["node"] != told["killed"]["all"][0]["node"]


def test_an_exit_without_a_word_is_told_with_the_last_line(told: dict[str, Any]) -> None:
    seen = told["exits"]
    log = seen["folder"] / "submitit" / "train" / f"{seen['job']}_1_log.out"
    assert seen["train"]["code"] == 1
    assert seen["train"]["reason"] == f"the supervisor of component train on {seen['train']['node']} ended with exit code 7: last words; its log is {log}"


def test_terminate_ends_all_nodes_with_a_word(told: dict[str, Any]) -> None:
    assert [(each["code"], each["reason"], "killed" in each) for each in told["terminated"]["all"]] == [(75, "component train was stopped", False)] * 2


def test_kill_ends_what_does_not_listen(told: dict[str, Any]) -> None:
    assert [(each["code"], each["killed"]) for each in told["silent"]["all"]] == [(75, True)] * 2


def test_another_architecture_is_refused_by_name(told: dict[str, Any]) -> None:
    seen = told["architecture"]["rollout"]
    assert seen["code"] == 78
    assert f"node {seen['node']} is {os.uname().machine}, but component rollout is for sparc" in seen["reason"]


def test_an_interpreter_that_is_not_there(told: dict[str, Any]) -> None:
    seen = told["python"]["train"]
    assert seen["code"] == 78
    assert "/no/such/python" in seen["reason"]
    assert "look at the group's python and container_image" in seen["reason"]


def test_a_setup_line_that_fails(told: dict[str, Any]) -> None:
    seen = told["setup"]["rollout"]
    assert (seen["code"], seen["role"], seen["rank"]) == (78, "rollout", 0)
    line = "line 2 of the group's setup ended with exit code 127: no-such-module load cuda"
    assert seen["reason"] == f"component rollout didn't start on {seen['node']}: {line}; mend that line of its group's setup"


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made",)


def test_a_result_that_names_a_function_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match=r"plain values, not posix\.mkdir"):
        _PlainUnpickler(io.BytesIO(pickle.dumps(("success", _Hostile())))).load()
    assert not (tmp_path / "made").exists()
    plain = ("success", {"code": 0, "reason": "finished", "rank": 0, "told": True, "node": None})
    assert _PlainUnpickler(io.BytesIO(pickle.dumps(plain))).load() == plain
