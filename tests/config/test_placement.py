"""Who runs where. Expected values are worked out by hand."""

from pathlib import Path

import pytest

from miles.config.compose import dump_config, load_config
from miles.config.placement import ask, node_groups, parts, processes
from miles.config.schema import RunConfig


def config(*overrides: str) -> RunConfig:
    return load_config([], list(overrides))


def test_het_groups_have_their_own_nodes() -> None:
    run = config(
        "cluster.placement=het", "cluster.groups.train.gpus_per_node=4", "cluster.groups.rollout.gpus_per_node=8",
        "train.num_nodes=3", "train.num_gpus_per_node=4", "rollout.num_gpus=20", "rollout.num_gpus_per_engine=4",
    )  # fmt: skip
    assert [(group.name, group.nodes, group.gpus_per_node, group.components) for group in node_groups(run)] == [
        ("train", 3, 4, ("train",)), ("rollout", 3, 8, ("rollout",)),
    ]  # fmt: skip
    assert [process.role for process in processes(run, "train", 0)] == ["service", *["trainer"] * 4]
    assert [(process.rank, process.count, process.gpus) for process in processes(run, "train", 2)] == [(8 + i, 12, (i,)) for i in range(4)]
    engines = [[(p.rank, p.gpus) for p in processes(run, "rollout", node) if p.role == "engine"] for node in range(3)]
    assert engines == [[(0, (0, 1, 2, 3))], [(1, (0, 1, 2, 3)), (2, (4, 5, 6, 7))], [(3, (0, 1, 2, 3)), (4, (4, 5, 6, 7))]]
    assert [[(p.rank, p.count) for p in processes(run, "rollout", node) if p.role == "worker"] for node in range(3)] == [[(0, 3)], [(1, 3)], [(2, 3)]]


@pytest.mark.parametrize(
    ("overrides", "nodes", "wanted"),
    [
        (["cluster.placement=colocate", "train.num_nodes=2", "train.num_gpus_per_node=8", "rollout.num_gpus=16"], 2, [(0, 2, 0, 8), (0, 2, 0, 8)]),
        (["cluster.placement=split", "train.num_nodes=2", "train.num_gpus_per_node=8", "rollout.num_gpus=9"], 4, [(0, 2, 0, 8), (2, 2, 0, 8)]),
        (["cluster.placement=split", "train.num_gpus_per_node=6", "rollout.num_gpus=2"], 1, [(0, 1, 0, 6), (0, 1, 6, 2)]),
        (["cluster.placement=split", "train.num_gpus_per_node=6", "rollout.num_gpus=3"], 2, [(0, 1, 0, 6), (1, 1, 0, 8)]),
        # One engine of two nodes' worth of trainers: the second node has no worker.
        (["cluster.placement=colocate", "train.num_nodes=2", "train.num_gpus_per_node=1", "rollout.num_gpus=1"], 2, [(0, 2, 0, 1), (0, 1, 0, 8)]),
    ],
)
def test_one_allocation(overrides: list[str], nodes: int, wanted: list[tuple[int, ...]]) -> None:
    run = config(*overrides)
    (group,) = node_groups(run)
    assert (group.nodes, group.components) == (nodes, ("train", "rollout"))
    assert [(part.first_node, part.nodes, part.first_gpu, part.gpus) for part in parts(run)] == wanted


def test_engines_that_share_a_node_begin_after_the_trainers_accelerators() -> None:
    run = config("cluster.placement=split", "train.num_gpus_per_node=4", "rollout.num_gpus=4", "rollout.num_gpus_per_engine=2")
    assert [p.gpus for p in processes(run, "rollout", 0) if p.role == "engine"] == [(4, 5), (6, 7)]


def test_nothing_leaks_between_groups_and_run_yaml_means_the_same(tmp_path: Path) -> None:
    run = config(
        "cluster.placement=het", "cluster.groups.all.account=lab", "cluster.groups.all.environment.A=1", "cluster.groups.train.qos=high",
        "cluster.groups.train.environment.B=2", "cluster.groups.rollout.partition=h200", "cluster.groups.rollout.environment.A=3",
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(dump_config(run))
    for each in (run, load_config([tmp_path / "run.yaml"])):
        train, rollout = ask(each, "train"), ask(each, "rollout")
        assert (train.account, train.qos, train.partition, train.environment) == ("lab", "high", None, {"A": "1", "B": "2"})
        assert (rollout.account, rollout.qos, rollout.partition, rollout.environment) == ("lab", None, "h200", {"A": "3"})


def test_recorded_batches_need_no_engines() -> None:
    run = config("cluster.placement=het", "debug.train_only=/tmp/run", "rollout.num_gpus=8")
    assert [group.name for group in node_groups(run)] == ["train"]
    assert [part.component for part in parts(run)] == ["train"]
