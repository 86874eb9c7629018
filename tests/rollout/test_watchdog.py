"""A trainer that hangs: who is named, when, and what is left in the logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miles.rollout.watchdog import Watchdog

RANK = """
import os, time
from miles.run.coordinator import Coordinator
from miles.run.role import main
from miles.training.progress import HERE

def user_function_that_never_ends():
    while True:
        time.sleep(0.01)

def train(role):
    service = Coordinator(role)
    service.register()
    service.keep_alive(1.0, HERE)
    with HERE.waiting():
        service.peers("trainer", 2)
    for step in range(3 if role.rank == 1 else 4):
        with HERE.doing("train", step):
            time.sleep(0.05)
    while role.rank == 0 and not os.path.exists(os.environ["GATE"]):
        time.sleep(0.05)
        HERE.tick()
    user_function_that_never_ends()

main("trainer", train)
"""


def told(count: int, *, phase: str = "train", step: int = 3, waits: bool = False, collective: bool = False) -> dict[str, Any]:
    return {"phase": phase, "step": step, "count": count, "waits": waits, "collective": collective, "at": "here.py:1 f"}


@pytest.fixture
def dog() -> Watchdog:
    return Watchdog(hang_seconds=100.0, beat_seconds=2.0, count=2)


def beats(dog: Watchdog, until: int, **ranks: dict[str, Any]) -> None:
    """Heartbeats of these ranks (r0=…) every 2 s up to `until`."""
    for now in range(0, until + 1, 2):
        for name, what in ranks.items():
            dog.note(int(name[1:]), f"node{name[1:]}", what, float(now))


def test_a_rank_that_lags_is_named_with_its_node_once_nobody_gets_on(dog: Watchdog) -> None:
    beats(dog, 98, r0=told(7, collective=True), r1=told(6), r2=told(7, collective=True))
    assert dog.hang(99.0) is None
    found = dog.hang(100.0)
    assert found is not None
    assert found.culprit == {"role": "trainer", "rank": 1, "node": "node1"}
    assert found.reason.startswith("trainer 1 on node node1 hangs: it lags behind the others (last heard in phase train of step 3, at here.py:1 f), and no rank got on for 100 s")


def test_one_that_gets_on_keeps_all_of_them_alive(dog: Watchdog) -> None:
    beats(dog, 98, r0=told(7), r1=told(6))
    dog.note(1, "node1", told(7), 99.0)
    assert dog.hang(150.0) is None


def test_the_wait_for_a_batch_is_no_hang(dog: Watchdog) -> None:
    beats(dog, 998, r0=told(7, phase="wait", waits=True), r1=told(7, phase="wait", collective=True))
    assert dog.hang(1000.0) is None
    dog.note(0, "node0", told(7, phase="wait"), 1000.0)
    dog.note(1, "node1", told(7, phase="wait", collective=True), 1098.0)
    assert dog.hang(1099.0) is None, "the batch came at 1000"
    assert dog.hang(1101.0) is not None


def test_the_silent_one_is_named_before_those_that_lag(dog: Watchdog) -> None:
    beats(dog, 20, r2=told(9))
    beats(dog, 100, r0=told(7), r1=told(8))
    found = dog.hang(102.0)
    assert found is not None
    assert (found.rank, found.node) == (2, "node2")
    assert "says nothing since 82 s" in found.reason


def test_of_ranks_that_are_equally_far_the_one_outside_the_collective_is_named(dog: Watchdog) -> None:
    beats(dog, 100, r0=told(7, collective=True), r1=told(7), r2=told(7, collective=True))
    found = dog.hang(101.0)
    assert found is not None
    assert found.rank == 1
    assert "is not where the others wait" in found.reason


def test_nobody_is_named_where_all_wait_for_each_other(dog: Watchdog) -> None:
    beats(dog, 100, r0=told(7, collective=True), r1=told(7, collective=True))
    found = dog.hang(101.0)
    assert found is not None
    assert found.culprit == {"role": "trainer", "rank": None, "node": None}


def test_a_rank_that_never_spoke_is_named(dog: Watchdog) -> None:
    beats(dog, 100, r0=told(1))
    found = dog.hang(101.0)
    assert found is not None
    assert found.culprit == {"role": "trainer", "rank": 1, "node": None}


@pytest.mark.parametrize("stopped", [False, True], ids=["never_ends", "stopped"])
def test_stacks_are_written_and_the_attempt_ends_with_the_culprits_node(attempts, tmp_path: Path, stopped: bool) -> None:
    """The service as it is, and two ranks of which the second is behind: in a function that never ends, or stopped altogether."""
    attempt = attempts("cluster.hang_seconds=6", "train.num_nodes=2").start("service")
    ranks, gate = [], tmp_path / "gate"  # the first rank gets on until it is there
    for rank in range(2):
        env = {
            **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MILES_RUN_DIR": str(attempt.folder), "MILES_EPOCH": str(attempt.epoch), "MILES_RANK": str(rank),
            "MILES_WORLD_SIZE": "2", "MILES_TOKEN": attempt.token, "MILES_SERVICE": attempt.url, "MILES_NODE_NAME": f"node{rank}",
            "GATE": str(gate),
        }  # fmt: skip
        with (tmp_path / f"{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen([sys.executable, "-c", RANK], env=env, stdout=log, stderr=log))
    try:
        attempt.wait_for(lambda: sum(role["role"] == "trainer" for role in attempt.status()["roles"]) == 2)
        if stopped:
            ranks[1].send_signal(signal.SIGSTOP)
        gate.touch()
        assert attempt.code("service") == 75
        assert ranks[0].wait(60) == 75
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    fault = json.loads((attempt.run.attempt(attempt.epoch) / "logs" / "fault.service.0.json").read_text())
    assert (fault["role"], fault["rank"], fault["node"]) == ("trainer", 1, "node1")
    assert ("says nothing" if stopped else "lags behind the others (last heard in phase train of step 2, at <string>:9 user_function_that_never_ends)") in fault["message"]
    assert fault["message"] in attempt.log("service").read_text()
    for rank in (0,) if stopped else (0, 1):
        said = (tmp_path / f"{rank}.log").read_text()
        assert f"trainer {rank}: the run hangs; the stacks of all threads:" in said
        assert 'line 9 in user_function_that_never_ends' in said
        assert fault["message"] in said
