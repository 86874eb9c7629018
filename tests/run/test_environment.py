"""What a role process finds in its environment."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import psutil
import pytest

from miles.config.placement import processes
from miles.config.process import Process
from miles.config.schema import RunConfig
from miles.run.environment import Node, accelerators, environment, interface
from miles.slurm.attempt import start_list

NODE = Node(1, "train1", "train.1.ab")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    attempt = tmp_path / "attempts" / "000007"
    attempt.mkdir(parents=True)
    (attempt / "token").write_text("secret")
    (attempt / "service.json").write_text(json.dumps({"url": "http://10.0.0.1:80"}))
    return tmp_path


@pytest.mark.parametrize(
    ("gpus", "inherited", "seen"),
    [
        ((2,), None, "2"),
        ((0,), "5,7", "5"),
        ((1, 2), "3, GPU-aa ,6", "GPU-aa,6"),
        ((), "0,1", ""),
        ((), None, ""),
    ],
)
def test_a_process_sees_its_own_accelerators_of_those_its_node_was_given(gpus: tuple[int, ...], inherited: str | None, seen: str) -> None:
    assert accelerators(Process("engine", 0, 1, gpus), inherited) == seen


def test_fewer_accelerators_than_the_plan_has_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"trainer 3 needs accelerators 2 of this node, which has 2 \(CUDA_VISIBLE_DEVICES=4,5\)"):
        accelerators(Process("trainer", 3, 4, (2,)), "4,5")


def test_ranks_of_the_second_node(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    config = RunConfig.model_validate({"train": {"num_nodes": 2, "num_gpus_per_node": 2}, "cluster": {"device": "cuda"}})
    found = [environment(start_list(config), run_dir, 7, process, NODE) for process in processes(config, "train", 1)]
    names = ("MILES_RANK", "MILES_WORLD_SIZE", "MILES_NODE", "MILES_NODE_NAME", "CUDA_VISIBLE_DEVICES", "MILES_TOKEN", "MILES_SERVICE")
    assert [[each[name] for name in names] for each in found] == [
        ["2", "4", "1", "train1", "4", "secret", "http://10.0.0.1:80"],
        ["3", "4", "1", "train1", "5", "secret", "http://10.0.0.1:80"],
    ]
    cpu = config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": "cpu"})})
    assert environment(start_list(cpu), run_dir, 7, processes(cpu, "train", 1)[0], NODE)["CUDA_VISIBLE_DEVICES"] == ""


def test_what_is_on_loopback_stays_there(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    process = Process("trainer", 0, 1, (0,))
    assert environment(start_list(RunConfig()), run_dir, 7, process, NODE)["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("MILES_HOST", "192.0.2.1")
    assert environment(start_list(RunConfig()), run_dir, 7, process, NODE)["GLOO_SOCKET_IFNAME"] == "eth9", "a user's own word counts"


def test_the_interface_that_has_the_nodes_address() -> None:
    own = {address.address: name for name, addresses in psutil.net_if_addrs().items() for address in addresses if address.family == socket.AF_INET}
    for address, name in own.items():
        assert interface(address) == {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    assert interface("127.0.77.2")["GLOO_SOCKET_IFNAME"] == "lo", "all of 127.0.0.0/8 is there"
    assert interface("192.0.2.1") == {}, "an address of no interface (TEST-NET-1): they look for themselves"
