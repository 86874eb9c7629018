"""What the code does today. An entry leaves this file when its feature arrives."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

from miles.config.address import is_loopback
from miles.config.placement import one_node
from miles.config.schema import Algorithm, Optimizer, Parallel, Rollout, RunConfig, Train
from miles.config.section import Section

Level = Literal["error", "warning", "note"]
Entry = tuple[Level, str, str, str]  # level, where, message, mend
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")  # transformers' model_type, each with a passing test
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}  # of the trackers, by import name
REWARDS = ("exact_match", "math", "reasoning_gym", "remote_rm")


def refused(config: RunConfig) -> Iterator[Entry]:
    """Errors: options whose feature is not there yet."""
    model, rollout, train, algorithm = config.model, config.rollout, config.train, config.algorithm

    def unless(works: bool, where: str, asked: object, mend: str) -> Iterator[Entry]:
        if not works:
            yield "error", where, f"{asked} is not there yet", mend

    yield from _here(config)
    yield from unless(train.backend == "fsdp", "train.backend", train.backend, "set train.backend=fsdp")
    parallel = train.parallel
    for name, size in [("tensor", parallel.tensor), ("pipeline", parallel.pipeline), ("context", parallel.context), ("expert", parallel.expert)]:
        yield from unless(size == 1, f"train.parallel.{name}", f"{name} parallelism ({size} ranks)", f"fsdp splits data only: set train.parallel.{name}=1")
    if parallel.expert_tensor not in (None, parallel.tensor):
        yield from unless(parallel.expert_tensor == 1, "train.parallel.expert_tensor", "expert-tensor parallelism", "set train.parallel.expert_tensor=1")
    yield from unless(not model.mtp_num_layers, "model.mtp_num_layers", "multi-token prediction", "set model.mtp_num_layers=null")
    yield from unless(not train.enable_mtp_training, "train.enable_mtp_training", "multi-token-prediction training", "set train.enable_mtp_training=false")
    scaled = train.mtp_loss_scaling_factor == default(Train, "mtp_loss_scaling_factor")
    yield from unless(scaled, "train.mtp_loss_scaling_factor", "multi-token-prediction training", "leave it out")
    estimator = algorithm.advantage_estimator
    yield from unless(estimator == "grpo", "algorithm.advantage_estimator", estimator, "set algorithm.advantage_estimator=grpo")
    if config.debug.recorded:
        yield from _invariant(config)  # there is no engine, but the trainer computes by them
        return
    yield from _engine(config)
    for where, reward in (("rollout.reward", rollout.reward), ("eval.reward", config.eval.reward)):
        kind = (reward.type or "").removeprefix("boxed_") if reward else ""
        yield from unless(not kind or kind in REWARDS, f"{where}.type", f"reward {kind}", f"take one of {', '.join(REWARDS)}, or {where}.path")
        if where == "rollout.reward" and reward == config.eval.reward:
            break  # evaluation has the rollout's: one message


def data_only(parallel: Parallel) -> str:
    """The mend of a layout that fsdp can't have: every size back to 1."""
    sizes = {name: size for name, size in parallel.model_dump().items() if size != 1 and not (name == "expert_tensor" and size in (None, parallel.tensor))}
    return f"fsdp splits data only: set {' '.join(f'train.parallel.{name}=1' for name in sizes)}"


def _here(config: RunConfig) -> Iterator[Entry]:
    """On one machine several nodes are so many supervisors; accelerators can't be made so."""
    cluster = config.cluster
    if cluster.executor != "local":
        return
    if cluster.placement == "jobs":
        yield "error", "cluster.placement", "jobs that find each other need a cluster, and cluster.executor is local", "set cluster.placement=split"
    if cluster.device != "cuda":
        return
    if config.train.num_nodes > 1:
        yield "error", "train.num_nodes", f"{config.train.num_nodes} nodes need a cluster, and cluster.executor is local", "set train.num_nodes=1"
    elif cluster.placement == "het":
        yield "error", "cluster.placement", "groups of nodes need a cluster, and cluster.executor is local", "set cluster.placement=split"
    elif cluster.placement == "split" and not one_node(config):
        asked = config.train.num_gpus_per_node + config.rollout.num_gpus
        yield "error", "cluster.placement", f"trainer and engines need {asked} accelerators, this machine has {cluster.gpus_per_node}", "set cluster.placement=colocate"


def _engine(config: RunConfig) -> Iterator[Entry]:
    rollout, cuda = config.rollout, config.cluster.device == "cuda"
    if rollout.engine == "sglang" and not cuda:
        yield "error", "rollout.engine", "sglang needs GPUs, and cluster.device is cpu", "set rollout.engine=embedded, or cluster.device=cuda"
    if rollout.engine == "embedded":
        if rollout.sglang:
            names = ", ".join(rollout.sglang)
            yield "error", "rollout.sglang", f"the embedded engine does not read SGLang's arguments ({names})", "set rollout.engine=sglang, or leave them out"
        if rollout.num_gpus_per_engine > 1:
            yield (
                "error",
                "rollout.num_gpus_per_engine",
                f"an embedded engine over {rollout.num_gpus_per_engine} devices is not there yet",
                "set rollout.num_gpus_per_engine=1",
            )
        yield from _invariant(config)
        yield from _cache(config)
        return
    if rollout.batch_invariant:
        yield "error", "rollout.batch_invariant", "batch invariance with SGLang is not there yet", "set rollout.batch_invariant=false"
    if config.train.update_weight_transport == "tensor":
        yield "error", "train.update_weight_transport", "SGLang takes tensors as pickles, which are not sent", "set train.update_weight_transport=disk"


def _invariant(config: RunConfig) -> Iterator[Entry]:
    if config.rollout.batch_invariant and (config.cluster.device == "cuda" or config.model.dtype != "float32"):
        yield (
            "error",
            "rollout.batch_invariant",
            f"batch-invariant kernels are there for float32 on cpu, not for {config.model.dtype} on {config.cluster.device}",
            "set rollout.batch_invariant=false",
        )


def _cache(config: RunConfig) -> Iterator[Entry]:
    """The embedded engine's cache is rows of one length: that of the longest sequence, where every prompt is bounded, else an even share."""
    rollout, samplings = config.rollout, {}
    if config.num_rollout:
        samplings["rollout.sampling"] = rollout.sampling
    if config.eval.interval:
        samplings["eval.sampling"] = config.eval.sampling
    free = [f"{name}.max_prompt_len" for name, sampling in samplings.items() if sampling.max_context_len is None]
    longest = max((sampling.max_context_len or 0 for sampling in samplings.values()), default=0)
    if not free and longest > rollout.kv_cache_tokens:
        yield (
            "error",
            "rollout.kv_cache_tokens",
            f"one sequence may have {longest} tokens, the cache has {rollout.kv_cache_tokens}",
            f"set rollout.kv_cache_tokens={longest * min(8, rollout.max_running_requests)}",
        )
    share = rollout.kv_cache_tokens // rollout.max_running_requests
    name, response = max(((name, sampling.max_response_len) for name, sampling in samplings.items()), key=lambda pair: pair[1], default=("", 0))
    if free and share <= response:
        yield (
            "error",
            "rollout.kv_cache_tokens",
            f"with prompts of any length a sequence may have {rollout.kv_cache_tokens} / {rollout.max_running_requests} requests = {share} tokens, "
            f"and {name}.max_response_len {response} leaves none for the prompt",
            f"set {' and '.join(free)}, or rollout.kv_cache_tokens={2 * response * rollout.max_running_requests}",
        )


def default(section: type[Section], name: str) -> Any:
    """A field's default."""
    return section.model_fields[name].default


def _unread(config: RunConfig) -> Iterator[Entry]:
    """Warnings: settings other than the default that nothing reads."""
    algorithm, rollout, warm = config.algorithm, config.rollout, config.warm_start
    phases: list[tuple[str, Optimizer, int]] = []
    if config.num_rollout:
        phases.append(("train.optimizer", config.train.optimizer, config.num_rollout * (config.train.num_steps_per_rollout or 1)))
    if warm.steps:
        phases.append(("warm_start.optimizer", warm.optimizer, warm.steps))
    for where, optimizer, steps in phases:
        rest = max(1, steps - optimizer.lr_warmup_steps)  # what lr_decay_steps is when it is not given
        given = [("min_lr", optimizer.min_lr != default(Optimizer, "min_lr")), ("lr_decay_steps", optimizer.lr_decay_steps not in (None, rest))]
        for name in [name for name, is_given in given if is_given and optimizer.lr_schedule == "constant"]:
            yield "warning", f"{where}.{name}", "has no effect while the learning rate is constant", f"set {where}.lr_schedule=cosine, or leave it out"
    for name in ("tis_clip", "tis_clip_low"):
        if not algorithm.use_tis and getattr(algorithm, name) != default(Algorithm, name):
            yield "warning", f"algorithm.{name}", "has no effect while algorithm.use_tis is off", "set algorithm.use_tis=true, or leave it out"
    if rollout.engine == "sglang" and rollout.kv_cache_tokens != default(Rollout, "kv_cache_tokens"):
        yield "warning", "rollout.kv_cache_tokens", "sizes the embedded engine's cache only", "set rollout.sglang.max_total_tokens, or leave it out"


def suspicious(config: RunConfig) -> Iterator[Entry]:
    """Warnings and notes: settings that work but rarely mean what they say."""
    rollout, algorithm, train = config.rollout, config.algorithm, config.train
    if algorithm.use_tis and algorithm.tis_clip < 1:
        yield (
            "warning",
            "algorithm.tis_clip",
            f"a cap of {algorithm.tis_clip:g} is under 1: the weight of every on-policy token (1) is scaled down to {algorithm.tis_clip:g}",
            "set algorithm.tis_clip to 1 or more; 2 is usual",
        )
    if algorithm.kl_loss_coef and not algorithm.use_kl_loss:
        yield "warning", "algorithm.kl_loss_coef", "has no effect while algorithm.use_kl_loss is off", "set algorithm.use_kl_loss=true"
    if config.checkpoint.ref_load and not algorithm.use_kl_loss:
        yield "warning", "checkpoint.ref_load", "has no effect while algorithm.use_kl_loss is off", "set algorithm.use_kl_loss=true"
    if (rollout.over_sampling_batch_size or 0) > rollout.batch_size and not rollout.filter_path:
        yield "warning", "rollout.over_sampling_batch_size", "has no effect without a filter", "set rollout.filter_path, or leave it out"
    if rollout.n_samples_per_prompt == 1 and algorithm.rewards_normalization and config.num_rollout:
        yield (
            "warning",
            "rollout.n_samples_per_prompt",
            "a group of 1 minus its own mean leaves every advantage 0",
            "set rollout.n_samples_per_prompt to 2 or more, or algorithm.rewards_normalization=false",
        )
    if rollout.sampling.temperature == 0 and rollout.n_samples_per_prompt > 1 and config.num_rollout:
        yield "warning", "rollout.sampling.temperature", "greedy responses of a group are all the same", "set rollout.sampling.temperature=1"
    longest = rollout.sampling.max_context_len
    if longest and train.use_dynamic_batch_size and longest > train.max_tokens_per_gpu:
        yield (
            "warning",
            "train.max_tokens_per_gpu",
            f"a sequence may have {longest} tokens, over the budget of {train.max_tokens_per_gpu}",
            f"set train.max_tokens_per_gpu={longest}",
        )
    yield from _unread(config)
    for name in config.trackers.names:
        if importlib.util.find_spec(name) is None:
            yield "warning", f"trackers.{name}", f"package {name} is not installed here, so nothing is sent to it", f"pip install {PACKAGES[name]}"
    if config.profile.steps and config.profile.steps[0] > config.total_steps:
        yield "warning", "profile.steps", f"the run has {config.total_steps} steps, so nothing is traced", "name earlier steps"
    if config.debug.recorded and config.eval.interval:
        yield "note", "eval.interval", "nobody generates beside recorded batches, so nothing is evaluated", ""
    if (config.debug.stop_after or 0) > config.total_steps:
        yield "warning", "debug.stop_after", f"the run ends after {config.total_steps} steps, before it would stop", "lower it, or leave it out"
    if rollout.engine == "sglang" and any(name.startswith("speculative_") for name in rollout.sglang):
        yield "warning", "rollout.sglang", "speculative decoding goes to SGLang as given; its draft model is not updated by training", ""
    if config.cluster.host != "auto" and not is_loopback(config.cluster.host):
        yield "note", "cluster.host", f"servers listen on {config.cluster.host}; control endpoints need the run's token", ""
    if config.cluster.device == "cpu" and train.num_gpus_per_node >= 8:
        yield (
            "note",
            "cluster.device",
            f"{train.num_gpus_per_node} trainer ranks as processes on cpu",
            "for GPUs compose with clusters/local_gpu, or set cluster.device=cuda",
        )
