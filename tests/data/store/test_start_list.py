"""What a node starts is what the configuration places there."""

from __future__ import annotations

from pathlib import Path

from miles.config.process import Process
from miles.config.schema import RunConfig
from miles.data.store.start_list import StartList
from miles.slurm.attempt import start_list


def test_every_node_finds_its_processes(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"train": {"num_nodes": 2, "num_gpus_per_node": 1}, "rollout": {"num_gpus": 4, "num_gpus_per_engine": 2}, "cluster": {"threads": 3, "device": "cuda", "placement": "het"}}
    )
    start_list(config).write(tmp_path)
    found = StartList.read(tmp_path)
    assert (found.host, found.device, found.threads) == ("auto", "cuda", 3)
    assert found.components == {
        "train": [[Process("service", 0, 1, ()), Process("trainer", 0, 2, (0,))], [Process("trainer", 1, 2, (0,))]],
        "rollout": [[Process("engine", 0, 2, (0, 1)), Process("engine", 1, 2, (2, 3)), Process("worker", 0, 1, ())]],
    }
