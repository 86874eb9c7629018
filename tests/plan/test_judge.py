"""Judgement: what cannot be done is refused by name, what rarely means what it says is a warning."""

import json
from pathlib import Path

import pytest

from miles.cli.check import check
from miles.config.compose import configs_dir, load_config
from miles.config.options import parse_flags
from miles.config.schema import RunConfig
from miles.plan.judge import Finding, judge
from miles.plan.model import GIB
from miles.plan.tier import guarantee

LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 4, "vocab_size": 10}


@pytest.fixture
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a run that nothing is wrong with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "train.jsonl").write_text('{"input": "1+1", "label": "2"}\n')
    return ["model.hf_checkpoint=model", "data.prompt_data=train.jsonl", "data.label_key=label", "rollout.reward.type=exact_match", "rollout.sampling.max_prompt_len=512"]


def errors(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.level == "error"]


def test_sound(sound: list[str]) -> None:
    findings = judge(load_config([], sound))
    assert [finding.level for finding in findings] == ["note"]
    assert "activations come on top" in findings[0].message


BAD = [  # overrides beside the sound ones, and parts of one finding
    (["cluster.executor=slurm", "train.num_gpus_per_node=9"], "error: train.num_gpus_per_node: 9 ranks on a node of cluster.gpus_per_node 8; set train.num_gpus_per_node=8"),
    (["cluster.executor=slurm", "cluster.groups.all.time=5"], "error: cluster.groups.all.time: 5 is no longer than the 300 s before the limit at which the run ends (cluster.slurm.lead_seconds); raise the time"),
    (["cluster.executor=slurm", "rollout.num_gpus=16", "rollout.num_gpus_per_engine=16"], "error: rollout.num_gpus_per_engine: 16 accelerators of one engine, a node has 8: engines over several nodes are not there yet; set rollout.num_gpus_per_engine=8"),
    (["cluster.executor=slurm", "cluster.placement=split", "cluster.groups.all.nodes=1", "train.num_gpus_per_node=8", "rollout.num_gpus=8"], "error: cluster.groups.all.nodes: 1 nodes leave none for the engines beside train.num_nodes 1"),
    (["cluster.executor=slurm", "cluster.groups.rollout.partition=a"], "warning: cluster.groups.rollout: has no effect with cluster.placement=colocate, whose only group is `all`; set cluster.placement=het"),
    (["cluster.executor=slurm", "cluster.groups.all.segment=3", "train.num_nodes=4"], "error: cluster.groups.all.segment: segments of 3 nodes do not divide the group's 4 nodes; set cluster.groups.all.segment=2"),
    (["cluster.executor=slurm", "cluster.groups.all.segment=4", "train.num_nodes=4", "cluster.groups.all.domain_nodes=2"], "error: cluster.groups.all.segment: 4 nodes are more than the 2 of one NVLink domain; set cluster.groups.all.segment=2"),
    (["cluster.placement=jobs"], "error: cluster.placement: jobs that find each other need a cluster, and cluster.executor is local; set cluster.placement=split"),
    (["cluster.device=cuda", "train.num_nodes=2"], "error: train.num_nodes: 2 nodes need a cluster, and cluster.executor is local; set train.num_nodes=1"),
    (["cluster.device=cuda", "cluster.placement=het"], "error: cluster.placement: groups of nodes need a cluster, and cluster.executor is local; set cluster.placement=split"),
    (["cluster.device=cuda", "cluster.placement=split", "cluster.gpus_per_node=1"], "error: cluster.placement: trainer and engines need 2 accelerators, this machine has 1"),
    (["train.backend=megatron"], "error: train.backend: megatron is not there yet; set train.backend=fsdp"),
    (["train.parallel.tensor=2", "train.num_gpus_per_node=2"], "error: train.parallel.tensor: tensor parallelism (2 ranks) is not there yet"),
    (["train.parallel.context=2", "train.num_gpus_per_node=2"], "error: train.parallel.context: context parallelism (2 ranks) is not there yet"),
    (["train.parallel.expert=2", "train.num_gpus_per_node=2"], "error: train.parallel.expert: EP 2, but the model has no experts"),
    (["algorithm.advantage_estimator=gspo"], "error: algorithm.advantage_estimator: gspo is not there yet; set algorithm.advantage_estimator=grpo"),
    (["checkpoint.load=runs/old/checkpoints/step_000010"], "error: checkpoint.load: runs/old/checkpoints/step_000010: no such folder; name a checkpoint"),
    (["rollout.return_routed_experts=true"], "error: rollout.return_routed_experts: the model has no experts; set rollout.return_routed_experts=false"),
    (["rollout.over_sampling_batch_size=64"], "warning: rollout.over_sampling_batch_size: has no effect without a filter"),
    (["algorithm.use_tis=true", "algorithm.tis_clip=0.9"], "warning: algorithm.tis_clip: a cap of 0.9 is under 1: the weight of every on-policy token (1) is scaled down to 0.9"),
    (["model.mtp_num_layers=1"], "error: model.mtp_num_layers: multi-token prediction is not there yet"),
    (["train.enable_mtp_training=true"], "error: train.enable_mtp_training: multi-token-prediction training is not there yet"),
    (["rollout.engine=sglang", "rollout.batch_invariant=false"], "error: rollout.engine: sglang needs GPUs, and cluster.device is cpu"),
    (["rollout.engine=sglang", "cluster.device=cuda"], "error: rollout.batch_invariant: batch invariance with SGLang is not there yet; set rollout.batch_invariant=false"),
    (["cluster.device=cuda"], "error: rollout.batch_invariant: batch-invariant kernels are there for float32 on cpu, not for float32 on cuda"),
    (["rollout.sglang.page_size=1"], "error: rollout.sglang: the embedded engine does not read SGLang's arguments (page_size); set rollout.engine=sglang"),
    (["rollout.num_gpus=2", "rollout.num_gpus_per_engine=2"], "error: rollout.num_gpus_per_engine: an embedded engine over 2 devices is not there yet"),
    (["rollout.reward.type=dapo"], "error: rollout.reward.type: reward dapo is not there yet; take one of exact_match, math, reasoning_gym, remote_rm"),
    (["rollout.reward.type=null"], "error: rollout.reward.type: no reward is named; give --rm-type math"),
    (["rollout.reward.type=null", "rollout.reward.path=/a/b.py"], "error: rollout.reward.path: '/a/b.py' is not an import path; write package.module.function"),
    (["rollout.reward.type=reasoning_gym"], "error: rollout.reward.type: reasoning_gym scores prompts of data.reasoning_gym only"),
    (["data.label_key=null"], "error: data.label_key: reward exact_match compares with an answer; give --label-key KEY"),
    (["data.prompt_data=trian.jsonl"], "error: data.prompt_data: trian.jsonl: no such file; did you mean train.jsonl?"),
    (["data.prompt_data=trian.jsonl@[0:5]"], "error: data.prompt_data: trian.jsonl: no such file; did you mean train.jsonl?"),
    (["data.prompt_data=model/config.yaml"], "error: data.prompt_data: model/config.yaml: no such file"),
    (["data.prompt_data=null"], "error: data.prompt_data: no prompts are named (num_rollout is 1); give --prompt-data FILE"),
    (["model.hf_checkpoint=modle"], "error: model.hf_checkpoint: modle: no such folder; did you mean model?"),
    (["model.hf_checkpoint=null"], "error: model.hf_checkpoint: no model is named; give --hf-checkpoint FOLDER"),
    (["model.hf_checkpoint=."], "error: model.hf_checkpoint: .: has no config.json; give a Hugging Face folder"),
    (["checkpoint.ref_load=nowhere", "algorithm.use_kl_loss=true"], "error: checkpoint.ref_load: nowhere: no such folder"),
    (["model.name=qwen3-30b-a3b"], "error: model.name: qwen3-30b-a3b has 48 layers of width 2048, but model/config.json says 2 of 8; correct one of them"),
    (["model.name=qwen9"], "error: model.name: 'qwen9' is not in configs/models"),
    (["warm_start.steps=3"], "error: warm_start.prompt_data: no prompts are named (warm_start.steps is 3); set warm_start.prompt_data"),
    (["warm_start.steps=3", "warm_start.prompt_data=train.jsonl"], "error: warm_start.label_key: no key of the responses to learn"),
    (["eval.interval=3"], "error: eval.prompt_data: no prompts are named (eval.interval is 3)"),
    (["train.num_gpus_per_node=9"], "error: train.num_gpus_per_node: 9 ranks on a node of cluster.gpus_per_node 8; set train.num_gpus_per_node=8"),
    (["cluster.device=cuda", "rollout.num_gpus=2"], "error: rollout.num_gpus: colocated engines share the trainer's 1 GPUs, but ask for 2; set rollout.num_gpus=1"),
    (["rollout.batch_size=1", "rollout.n_samples_per_prompt=2", "train.num_gpus_per_node=4"], "error: train.global_batch_size: 2 samples a step do not reach 4 data-parallel ranks"),
    (["rollout.sampling.max_prompt_len=90", "rollout.sampling.max_response_len=30", "rollout.kv_cache_tokens=100"], "error: rollout.kv_cache_tokens: one sequence may have 120 tokens, the cache has 100"),
    (["rollout.sampling.max_prompt_len=90", "rollout.sampling.max_response_len=30", "train.max_tokens_per_gpu=100"], "warning: train.max_tokens_per_gpu: a sequence may have 120 tokens, over the budget of 100"),
    (["rollout.sampling.max_prompt_len=null", "rollout.max_running_requests=64"], "error: rollout.kv_cache_tokens: with prompts of any length a sequence may have 65536 / 64 requests = 1024 tokens, and rollout.sampling.max_response_len 1024 leaves none for the prompt; set rollout.sampling.max_prompt_len, or rollout.kv_cache_tokens=131072"),
    (["eval.interval=1", "rollout.max_running_requests=64", "eval.sampling.max_response_len=2000"], "error: rollout.kv_cache_tokens: with prompts of any length a sequence may have 65536 / 64 requests = 1024 tokens, and eval.sampling.max_response_len 2000 leaves none for the prompt; set eval.sampling.max_prompt_len, or"),
    (["eval.interval=1", "eval.reward.path=./own.py"], "error: eval.reward.path: './own.py' is not an import path; write package.module.function"),
    (["train.mtp_loss_scaling_factor=0.3"], "error: train.mtp_loss_scaling_factor: multi-token-prediction training is not there yet; leave it out"),
    (["train.optimizer.min_lr=1.0e-9"], "warning: train.optimizer.min_lr: has no effect while the learning rate is constant; set train.optimizer.lr_schedule=cosine"),
    (["num_rollout=9", "train.optimizer.lr_decay_steps=8"], "warning: train.optimizer.lr_decay_steps: has no effect while the learning rate is constant"),
    (["warm_start.steps=5", "warm_start.optimizer.min_lr=1.0e-9"], "warning: warm_start.optimizer.min_lr: has no effect while the learning rate is constant"),
    (["algorithm.tis_clip=3"], "warning: algorithm.tis_clip: has no effect while algorithm.use_tis is off"),
    (["algorithm.tis_clip_low=0.5"], "warning: algorithm.tis_clip_low: has no effect while algorithm.use_tis is off"),
    (["rollout.engine=sglang", "rollout.kv_cache_tokens=100"], "warning: rollout.kv_cache_tokens: sizes the embedded engine's cache only"),
    (["algorithm.kl_loss_coef=0.1"], "warning: algorithm.kl_loss_coef: has no effect while algorithm.use_kl_loss is off"),
    (["rollout.n_samples_per_prompt=1"], "warning: rollout.n_samples_per_prompt: a group of 1 minus its own mean leaves every advantage 0"),
    (["rollout.sampling.temperature=0"], "warning: rollout.sampling.temperature: greedy responses of a group are all the same"),
    (["num_rollout=0"], "warning: num_rollout: nothing to do"),
    (["checkpoint.load=model"], "error: checkpoint.load: model: no finished checkpoint (it has no COMPLETE); name a checkpoint"),
    (["debug.train_only=modle"], "error: debug.train_only: modle: no such run directory; did you mean model?"),
    (["debug.rescore=model"], "error: debug.rescore: model: not a run with recorded batches (run.yaml and batches/); name a run directory"),
    (["debug.train_only=model", "eval.interval=1"], "note: eval.interval: nobody generates beside recorded batches, so nothing is evaluated"),
    (["debug.stop_after=5"], "warning: debug.stop_after: the run ends after 1 steps, before it would stop"),
    (["profile.steps=[5, 6]"], "warning: profile.steps: the run has 1 steps, so nothing is traced; name earlier steps"),
    (["cluster.host=0.0.0.0"], "note: cluster.host: servers listen on 0.0.0.0; control endpoints need the run's token"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "part"), BAD, ids=[part[:70] for _, part in BAD])
def test_findings(sound: list[str], overrides: list[str], part: str) -> None:
    lines = [f"{finding.level}: {finding}" for finding in judge(load_config([], [*sound, *overrides]))]
    assert any(part in line for line in lines), lines
    assert all("\n" not in line for line in lines)


QUIET = [  # overrides beside the sound ones, and a place that is not found fault with
    (["rollout.sampling.max_prompt_len=null", "rollout.kv_cache_tokens=131072"], "rollout.kv_cache_tokens"),
    (["rollout.sampling.max_prompt_len=null", "rollout.engine=sglang"], "rollout.kv_cache_tokens"),
    (["rollout.sampling.max_prompt_len=null", "num_rollout=0"], "rollout.kv_cache_tokens"),
    (["train.optimizer.lr_schedule=linear", "train.optimizer.min_lr=1.0e-9", "train.optimizer.lr_decay_steps=8"], "train.optimizer"),
    (["num_rollout=9", "train.optimizer.lr_warmup_steps=2"], "train.optimizer"),  # lr_decay_steps is 7 by itself
    (["algorithm.use_tis=true", "algorithm.tis_clip=3"], "algorithm"),
    (["warm_start.steps=3", "warm_start.reasoning_gym=chain_sum"], "warm_start.label_key"),
    (["warm_start.steps=3", "warm_start.prompt_data=train.jsonl", "warm_start.response_path=own.responses"], "warm_start.label_key"),
    (["eval.interval=1"], "eval.reward.path"),
    (["debug.train_only=model", "rollout.engine=sglang", "rollout.reward.type=null", "rollout.num_gpus=2"], "rollout"),
    (["debug.rescore=model", "data.prompt_data=gone.jsonl"], "data"),
]


@pytest.mark.parametrize(("overrides", "where"), QUIET, ids=["+".join(overrides) for overrides, _ in QUIET])
def test_no_finding(sound: list[str], overrides: list[str], where: str) -> None:
    assert [str(finding) for finding in judge(load_config([], [*sound, *overrides])) if finding.where.startswith(where)] == []


def test_families_without_a_test_are_refused(sound: list[str], tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text(json.dumps({**LLAMA, "model_type": "gemma3"}))
    assert errors(judge(load_config([], sound))) == ["model: family gemma3 is not there yet; take a model of llama, qwen2, qwen3, qwen3_moe"]


def test_memory_is_held_against_the_machine() -> None:
    """Llama 3.1 8B: 8,030,261,248 parameters × 16 bytes = 119.66 GiB; × 4 bytes = 29.92 GiB for the engine, whose cache of 65,536 tokens ×
    32 layers × 2 × 8 heads × 128 × 4 bytes has 16 GiB."""
    config = load_config([], ["model.name=llama3.1-8b-instruct"])
    fits, not_fits = judge(config, memory=166 * GIB), judge(config, memory=165 * GIB)
    assert not any("this machine has" in str(finding) for finding in fits)
    assert any("trainer and engines need 166 GiB on cpu, this machine has 165 GiB" in str(finding) for finding in not_fits)
    words = "8.03 B parameters × 16 bytes / 1 ranks = 119.7 GiB a trainer rank; 8.03 B × 4 bytes / 1 + 65536 tokens × 262144 bytes = 45.9 GiB an engine rank"
    assert any(words in str(finding) for finding in fits)


def test_memory_is_held_against_the_accelerators() -> None:
    """On one shared GPU: trainer and engine together; on two GPUs of their own: neither."""
    gpu = ["model.name=llama3.1-8b-instruct", "cluster.device=cuda", "cluster.gpu_memory=80"]
    assert any("cluster.gpu_memory: 166 GiB a GPU are needed, 80 GiB are there; trainer rank 120 + engine rank 46 GiB" in str(f) for f in judge(load_config([], gpu)))
    two = load_config([], [*gpu, "train.num_gpus_per_node=2", "cluster.placement=split"])
    assert not any("GiB are there" in str(f) for f in judge(two))
    own = load_config([], [*gpu, "train.num_gpus_per_node=2", "cluster.placement=het", "cluster.groups.rollout.gpu_memory=40", "cluster.groups.train.gpu_memory=62"])
    # 16 bytes × 8.03e9 / 2 ranks = 59.8 GiB, and two layers of 218,112,000 × 4 bytes = 1.6 GiB.
    assert [str(f) for f in judge(own) if "GiB are there" in str(f)] == [
        "cluster.groups.rollout.gpu_memory: 46 GiB a GPU are needed, 40 GiB are there; raise rollout.num_gpus_per_engine, or lower rollout.max_running_requests"
    ]


TIERS = [
    ([], "exact", "synchronous"),
    (["rollout.reward.type=null", "rollout.reward.path=own.reward"], "exact", "as far as your own reward function"),
    (["rollout.batch_invariant=false"], "replayed", "batch_invariant is off"),
    (["model.dtype=bfloat16"], "replayed", "float32, not bfloat16"),
    (["rollout.reward.type=remote_rm", "rollout.reward.url=http://localhost"], "replayed", "remote reward"),
    (["rollout.reward.type=math"], "replayed", "reward math gives 0 where math-verify runs out of time"),
    (["rollout.reward.type=boxed_math"], "replayed", "runs out of time"),
    (["eval.interval=1", "eval.reward.type=math"], "replayed", "runs out of time"),
    (["eval.interval=1", "eval.reward.type=boxed_remote_rm", "eval.reward.url=http://localhost"], "replayed", "remote reward"),
    (["eval.interval=1", "eval.reward.path=own.grade"], "exact", "as far as your own eval reward function"),
    (["eval.reward.type=math"], "exact", "same ranks and threads"),
    (["cluster.device=cuda"], "accounted", "not deterministic"),
    (["debug.rollout_only=true"], "exact", "synchronous"),
    (["debug.train_only=runs/a", "rollout.reward.type=null"], "replayed", "deterministic on cpu"),
    (["debug.train_only=runs/a", "debug.reassign=true"], "accounted", "divided anew"),
]


@pytest.mark.parametrize(("overrides", "name", "why"), TIERS)
def test_guarantee(overrides: list[str], name: str, why: str) -> None:
    tier = guarantee(load_config([], ["rollout.reward.type=exact_match", *overrides]))
    assert tier.name == name
    assert why in tier.why


def configuration(line: str) -> RunConfig:
    return load_config(*parse_flags(line.split()))


def test_announced_lines() -> None:
    first = errors(judge(configuration("--advantage-estimator grpo --model-name qwen3-30b-a3b --hf-checkpoint DIR --rollout-batch-size 512 --n-samples-per-prompt 8"), memory=24 * GIB))
    assert any(line.startswith("cluster.device: trainer and engines need 581 GiB on cpu, this machine has 24 GiB") for line in first)
    second = errors(judge(configuration("--train-backend megatron --actor-num-gpus-per-node 8 --hf-checkpoint DIR --tensor-model-parallel-size 8 --expert-model-parallel-size 4")))
    assert any("= 32 ranks for one copy of the experts" in line and "8 = 8 ranks; set train.parallel.expert_tensor=2, or train.num_nodes=4" in line for line in second)
    third = judge(configuration("--train-backend megatron --actor-num-gpus-per-node 8 --hf-checkpoint DIR --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 --use-tis --tis-threshold 0.9"))
    assert any("= 16 ranks for one copy of the model" in line and "set train.num_nodes=2, or train.parallel.tensor=4" in line for line in errors(third))
    assert [finding.where for finding in third if finding.level == "warning"] == ["algorithm.tis_clip"]
    fsdp = [line for line in errors(judge(configuration("--actor-num-gpus-per-node 8 --hf-checkpoint DIR --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2"))) if "parallel" in line]
    everything = "fsdp splits data only: set train.parallel.tensor=1 train.parallel.pipeline=1"
    assert len(fsdp) == 2
    assert all("=1" in line and "num_nodes" not in line for line in fsdp)
    assert fsdp[0].startswith("train.parallel.pipeline: TP 8 × PP 2 × CP 1 = 16 ranks")
    assert fsdp[0].endswith(everything)


def test_page(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(load_config([], sound), as_json=False) == 0
    page = capsys.readouterr().out
    assert "32 prompts × 8 samples = 256" in page
    assert "guarantee   exact" in page
    assert page.rstrip().endswith("nothing is wrong")
    assert len(page.splitlines()) < 40
    assert check(load_config([], [*sound, "algorithm.use_tis=true", "algorithm.tis_clip=0.5", "train.backend=megatron"]), as_json=False) == 78
    assert "1 error, 1 warning" in capsys.readouterr().out


def test_page_on_a_terminal(sound: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "60")
    assert check(load_config([], [*sound, "train.backend=megatron", "algorithm.use_kl_loss=true", "algorithm.entropy_coef=0.01"]), as_json=False) == 78
    page = capsys.readouterr().out
    assert "\x1b[1mguarantee" in page  # bold names
    assert "\x1b[1;31merror: train.backend" in page  # red errors
    assert "KL k1 × 0, entropy × 0.01" in page


def test_page_as_json(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(load_config([], [*sound, "train.backend=megatron"]), as_json=True) == 78
    page = json.loads(capsys.readouterr().out)
    assert page["ok"] is False
    assert page["tier"]["name"] == "exact"
    assert page["findings"][0] == {"level": "error", "where": "train.backend", "message": "megatron is not there yet", "mend": "set train.backend=fsdp"}
    assert page["config"]["rollout"]["batch_size"] == 32


@pytest.mark.parametrize("path", sorted((configs_dir() / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_clusters_ask_for_nothing_contradictory(path: Path, sound: list[str]) -> None:
    """What a cluster file asks for either works or is refused as not there yet."""
    assert all("is not there yet" in line for line in errors(judge(load_config([path], sound))))
