"""Who runs where and what it costs, before the queue. Expected values are worked out by hand."""

import pytest

from miles.config.compose import load_config
from miles.config.schema import RunConfig, Shape
from miles.config.units import hours, minutes_of
from miles.plan.kv_cache import token_bytes
from miles.plan.memory import estimate
from miles.plan.model import GIB, facts
from miles.plan.place import gpu_hours, misplaced, page

NVL72 = ["cluster.executor=slurm", "cluster.device=cuda", "cluster.gpus_per_node=4", "train.num_gpus_per_node=4", "cluster.groups.all.domain_nodes=18", "train.backend=megatron"]


def config(*overrides: str) -> RunConfig:
    return load_config([], list(overrides))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        # 64 experts' ranks are 16 trays of 4: without a segment Slurm may take the nodes from anywhere.
        (["train.parallel.expert=64", "train.num_nodes=32"], "without a segment, nodes may come from any domain, so would let an expert-parallel group of 64 ranks cross an NVLink domain; set cluster.groups.all.segment=16, or cluster.groups.all.cross_domain=true"),
        (["train.parallel.expert=64", "train.num_nodes=32", "cluster.groups.all.segment=16"], None),
        # Segments of 8 trays are 32 ranks: half a group.
        (["train.parallel.expert=64", "train.num_nodes=32", "cluster.groups.all.segment=8"], "segments of 8 nodes × 4 ranks would cut an expert-parallel group of 64 ranks, which then crosses NVLink domains; set cluster.groups.all.segment=16, or cluster.groups.all.cross_domain=true"),
        # 18 trays are 72 ranks: groups of 8 ranks fit in 2, 4, ..., 18 of them; 36 nodes in segments of 18.
        (["train.parallel.expert=8", "train.num_nodes=36", "cluster.groups.all.segment=18"], None),
        (["train.parallel.expert=128", "train.num_nodes=32"], "an expert-parallel group of 128 ranks does not fit in one NVLink domain of 18 nodes × 4 = 72 ranks; set train.parallel.expert=64, or cluster.groups.all.cross_domain=true"),
        (["train.parallel.expert=32", "train.parallel.expert_tensor=4", "train.num_nodes=32"], "an expert-parallel group of 128 ranks does not fit in one NVLink domain of 18 nodes × 4 = 72 ranks; set train.parallel.expert=16, or cluster.groups.all.cross_domain=true"),
        (["train.parallel.expert=128", "train.num_nodes=32", "cluster.groups.all.cross_domain=true"], None),
        (["train.parallel.expert=4", "train.num_nodes=32"], None),  # within a tray
        (["train.parallel.expert=64", "train.num_nodes=32", "cluster.groups.all.domain_nodes=null"], None),  # no NVLink domains known
    ],
)  # fmt: skip
def test_an_expert_parallel_group_lies_in_one_domain(overrides: list[str], line: str | None) -> None:
    found = [f"{message}; {mend}" for _, where, message, mend in misplaced(config(*NVL72, *overrides)) if where == "train.parallel.expert"]
    assert found == ([line] if line else [])


def test_gpu_hours() -> None:
    """2 nodes × 4 GPUs × 12 h + 3 × 8 × 1.5 h; one without a time has no sum; on cpu nodes are counted."""
    het = ["cluster.executor=slurm", "cluster.placement=het", "cluster.device=cuda", "cluster.groups.train.gpus_per_node=4", "train.num_nodes=2", "rollout.num_gpus=24"]
    timed = config(*het, "cluster.groups.train.time=12:00:00", "cluster.groups.rollout.time=90")
    assert gpu_hours(timed) == (132.0, "2 nodes × 4 GPUs × 12 h + 3 nodes × 8 GPUs × 1.5 h")
    assert gpu_hours(config(*het, "cluster.groups.train.time=12:00:00"))[0] is None
    assert gpu_hours(config("cluster.executor=slurm", "train.num_nodes=3", "cluster.groups.all.time=2:00:00"))[0] == 6.0


def test_processes_of_each_node() -> None:
    """13 engines on two nodes of 8: 6 and 7; the service beside the first trainers."""
    run = config("cluster.executor=slurm", "cluster.placement=het", "train.num_nodes=2", "train.num_gpus_per_node=8", "rollout.num_gpus=13")
    train, rollout = page(run)
    assert train["components"] == [{"component": "train", "first_node": 0, "nodes": [{"service": 1, "trainer": 8}, {"trainer": 8}]}]
    assert rollout["components"][0]["nodes"] == [{"engine": 6, "worker": 1}, {"engine": 7, "worker": 1}]


def test_bytes_of_a_token() -> None:
    """Grouped: Qwen3-30B-A3B has 48 layers, 4 key-value heads of 128. Latent: DeepSeek-V3 has 61 layers, rank 512 and 64 rotary."""
    qwen, deepseek = (known.shape for name in ("qwen3-30b-a3b", "deepseek-v3") if (known := facts(load_config([], [f"model.name={name}"]).model)))
    assert [token_bytes(qwen, 2, ranks) for ranks in (1, 2, 4, 8)] == [98304, 49152, 24576, 24576]  # a rank has at least one head
    assert [token_bytes(deepseek, 2, ranks) for ranks in (1, 16)] == [70272, 70272]
    assert token_bytes(Shape(layers=2, hidden=64, ffn=1, heads=4, vocab=1), 4, 1) == 2 * 2 * 64 * 4  # heads of 16 each, as many as queries


def test_memory_of_megatron_ranks() -> None:
    """DeepSeek-V3 on 256 ranks, TP 8, EP 64, ETP 1: dense / 8, experts / 64; AdamW's 12 bytes over 32 and 4 copies."""
    run = load_config(["recipes/deepseek_v3_h200_het"])
    known = facts(run.model)
    assert known is not None
    need = estimate(run, known.shape)
    experts = 58 * 256 * 3 * 7168 * 2048  # MoE layers × experts × matrices × width × inner width
    assert need.trainer_lines[2].bytes == experts * 6 // 64
    assert need.trainer_lines[3].bytes == experts * 12 // 256
    assert sum(line.bytes for line in need.trainer_lines) / GIB == pytest.approx(98.3, abs=0.1)
    assert need.engine == int(0.85 * 140 * GIB)  # what SGLang takes, whatever the weights leave of it
    assert need.loading is None


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 90.5), ("1:30:00", 90), ("2-12", 3600), ("1-00:30", 1470), ("1-01:30:30", 1530.5), ("UNLIMITED", None), ("infinite", None)],
)
def test_times_as_slurm_writes_them(text: str, minutes: float | None) -> None:
    assert minutes_of(text) == minutes


def test_a_time_that_slurm_would_not_take_is_said() -> None:
    with pytest.raises(ValueError, match=r"cluster\.groups\.all\.time=2h: expected a time as Slurm writes it: minutes, H:M:S, D-H or D-H:M:S"):
        config("cluster.groups.all.time=2h")
    assert [hours(minutes) for minutes in (0.2, 40, 240, 150, 4 * 24 * 60 + 61)] == ["under a minute", "40 min", "4 h", "2 h 30 min", "4 d 1 h"]
