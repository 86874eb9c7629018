"""What is wrong with a run before it starts: what it asks for and the code cannot do is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from miles.config.exits import ConfigError
from miles.config.schema import RunConfig
from miles.plan import abilities, inputs
from miles.plan.abilities import Level
from miles.plan.layout import Layout, misfits
from miles.plan.memory import Memory, estimate, gpu_memory, group_of, host_memory, shared, static_pool
from miles.plan.model import GIB, Facts, facts
from miles.plan.place import misplaced


@dataclass(frozen=True)
class Finding:
    """One judgement. where: dotted path in the configuration; mend: what to set."""

    level: Level
    where: str
    message: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"; {self.mend}" if self.mend else "")


def judge(config: RunConfig, memory: int | None = None) -> list[Finding]:
    """Findings about a resolved configuration, errors first. memory: bytes of the host, for a run on cpu; default this machine's."""
    found: list[Finding] = []
    try:
        model = facts(config.model)
    except ConfigError as error:
        where, _, rest = str(error).partition(": ")
        where, rest = (where, rest) if where.startswith("model.") else ("model.hf_checkpoint", str(error))
        message, _, mend = rest.rpartition("; ")
        found.append(Finding("error", where, message, mend))
        model = None
    found += _layout(config, model)
    told = {finding.where for finding in found}  # with their arithmetic
    found += [Finding(*entry) for entry in abilities.refused(config) if entry[1] not in told]
    for check in (misplaced, inputs.missing, abilities.suspicious):
        found += [Finding(*entry) for entry in check(config)]
    found += _family(config, model)
    found += _memory(config, model, host_memory() if memory is None else memory)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def _layout(config: RunConfig, model: Facts | None) -> Iterator[Finding]:
    train, shape = config.train, model.shape if model else None
    layout = Layout(train.num_nodes, train.num_gpus_per_node, train.parallel)
    found = misfits(layout, shape)
    if train.backend == "fsdp":  # one a field, since all have the same mend
        found = [replace(each, mend=abilities.data_only(train.parallel)) for each in {each.field: each for each in reversed(found)}.values()]
    for misfit in found:
        yield Finding("error", f"train.parallel.{misfit.field}", misfit.message, misfit.mend)
    if config.debug.recorded is None:
        yield from _engines(config, layout, model)
    samples = train.global_batch_size or 0
    if layout.data and samples < layout.data:
        yield Finding(
            "error",
            "train.global_batch_size",
            f"{samples} samples a step do not reach {layout.data} data-parallel ranks",
            f"raise rollout.batch_size, or set at most {samples} ranks",
        )


def _engines(config: RunConfig, layout: Layout, model: Facts | None) -> Iterator[Finding]:
    rollout, shape = config.rollout, model.shape if model else None
    if config.cluster.device == "cuda" and config.cluster.placement == "colocate" and rollout.num_gpus > layout.world:
        yield Finding(
            "error",
            "rollout.num_gpus",
            f"colocated engines share the trainer's {layout.world} GPUs, but ask for {rollout.num_gpus}",
            f"set rollout.num_gpus={layout.world}",
        )
    if shape and shape.heads % rollout.num_gpus_per_engine:
        yield Finding(
            "error", "rollout.num_gpus_per_engine", f"{rollout.num_gpus_per_engine} does not divide {shape.heads} heads", "take a divisor"
        )


def _family(config: RunConfig, model: Facts | None) -> Iterator[Finding]:
    family = model.shape.family if model else None
    if family and family not in abilities.FAMILIES:
        supported = ", ".join(abilities.FAMILIES)
        yield Finding("error", "model", f"family {family} is not there yet", f"take a model of {supported}")
    if model and config.rollout.return_routed_experts and not model.shape.experts:
        yield Finding("error", "rollout.return_routed_experts", "the model has no experts", "set rollout.return_routed_experts=false")


def _memory(config: RunConfig, model: Facts | None, host: int) -> Iterator[Finding]:
    if model is None:
        if config.model.build:
            yield Finding("note", "model.build", "makes the model when the run starts, so its memory is not estimated")
        else:
            yield Finding("note", "model", "dimensions unknown, so memory is not estimated", "set model.name, or hf_checkpoint to a folder that exists")
        return
    need = estimate(config, model.shape)
    yield Finding("note", "model", f"{need.words} ({model.source}; activations come on top)")
    ranks = config.train.num_nodes * config.train.num_gpus_per_node
    if config.cluster.device == "cpu" and config.cluster.executor == "local":
        together = need.trainer * ranks + need.engine * config.rollout.num_gpus
        if together > host:
            yield Finding(
                "error",
                "cluster.device",
                f"trainer and engines need {together / GIB:.0f} GiB on cpu, this machine has {host / GIB:.0f} GiB",
                "take a smaller model, or a cluster with accelerators",
            )
    if config.cluster.device == "cuda":
        yield from _accelerators(config, need)


def _accelerators(config: RunConfig, need: Memory) -> Iterator[Finding]:
    """What one accelerator must hold, against what it has."""
    beside = need.engine if shared(config) else 0
    asked = [("train", need.trainer, "raise train.num_nodes"), ("rollout", need.engine, "raise rollout.num_gpus_per_engine, or lower rollout.max_running_requests")]
    if shared(config):
        both = f"trainer rank {need.trainer / GIB:.0f} + engine rank {need.engine / GIB:.0f} GiB, which share a GPU"
        asked = [("train", need.trainer + need.engine, f"{both}: set cluster.placement=split, or raise train.num_nodes")]
    for component, needed, mend in asked:
        limit = gpu_memory(config, component)
        if limit is not None and needed > limit * GIB:
            yield Finding("error", _memory_field(config, component), f"{needed / GIB:.0f} GiB a GPU are needed, {limit:g} GiB are there", mend)
    pool = static_pool(config)
    if pool is not None and need.engine_lines and pool <= need.engine_lines[0].bytes:
        weights = f"{need.engine_lines[0].bytes / GIB:.0f} GiB of weights leave no room for the cache in {pool / GIB:.0f} GiB"
        yield Finding("error", "rollout.sglang.mem_fraction_static", weights, "raise it, or rollout.num_gpus_per_engine")
    limit = gpu_memory(config, "train")
    if need.loading is not None and limit is not None and need.loading.bytes + beside > limit * GIB:
        also = f" beside {beside / GIB:.0f} GiB of the engine" if beside else ""
        yield Finding(
            "error",
            "train.backend",
            f"fsdp loads {need.loading.words} = {need.loading.bytes / GIB:.0f} GiB on a GPU before it shards it{also}, {limit:g} GiB are there",
            "set cluster.placement=split, or take a smaller model: sharded loading is not there yet" if beside else "take a smaller model: sharded loading is not there yet",
        )


def _memory_field(config: RunConfig, component: str) -> str:
    group = group_of(config, component)
    return f"cluster.groups.{group.name}.gpu_memory" if group and group.ask.gpu_memory else "cluster.gpu_memory"
