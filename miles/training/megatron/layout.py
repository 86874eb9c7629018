"""How a model is split over ranks, and megatron-core's process groups for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from miles.config.exits import UserError
from miles.config.schema import Parallel
from miles.models.maps.find import Known
from miles.training.megatron import cpu


def start_groups(parallel: Parallel) -> None:
    """Make megatron-core's process groups for these sizes, in place of any that are there. Collective; torch.distributed has started.

    Consecutive ranks are a tensor-parallel group, and pipeline stages lie furthest apart. UserError where the ranks don't divide.
    """
    cpu.prepare()
    from megatron.core import parallel_state

    world = dist.get_world_size()
    for name, size in (("tensor × pipeline × context", parallel.model_ranks), ("expert × expert_tensor × pipeline", parallel.expert_ranks)):
        if world % size:
            raise UserError(f"train.parallel: {name} is {size}, which doesn't divide the {world} trainer ranks; change the layout or the ranks")
    if parallel.expert > 1 and parallel.inside_expert > 1 and not torch.cuda.is_available():
        raise UserError("train.parallel: expert and expert_tensor above 1 together need NCCL (gloo gathers no parts of different sizes); set expert_tensor to 1")
    stop_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline, context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert, expert_tensor_parallel_size=parallel.inside_expert,
    )  # fmt: skip


def stop_groups() -> None:
    """Forget megatron-core's process groups, if there are any."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def check_layout(known: Known, parallel: Parallel) -> None:
    """UserError where the model's dimensions can't be split so."""
    config, where = known.config, known.config.where
    if parallel.context > 1:
        raise UserError("train.parallel.context: models are not built for context parallelism; set it to 1")
    for what, count, name, size in _divided(known, parallel):
        if count % size:
            raise UserError(f"{where}: {count} {what} can't be divided over train.parallel.{name}={size}; choose a divisor of {count}")
    if parallel.pipeline > config.layers:
        raise UserError(f"{where}: {config.layers} layers can't fill train.parallel.pipeline={parallel.pipeline} stages; choose at most {config.layers}")
    if parallel.expert > 1 and not config.experts:
        raise UserError(f"{where}: the model has no experts; set train.parallel.expert to 1")


def _divided(known: Known, parallel: Parallel) -> Iterator[tuple[str, int, str, int]]:
    config = known.config
    yield "attention heads", config.heads, "tensor", parallel.tensor
    if config.get("kv_lora_rank") is None:
        yield "key-value heads", config.groups, "tensor", parallel.tensor
    else:
        yield "rows of the key-value projection", config.number("kv_lora_rank") + config.number("qk_rope_head_dim"), "tensor", parallel.tensor
    if config.experts:
        yield "experts", config.experts, "expert", parallel.expert


def stages(layers: int, mtp_layers: int, count: int) -> list[list[str]] | None:
    """What each pipeline stage holds where the layers don't divide evenly (the later stages have one more); None where they do."""
    if layers % count == 0:
        return None
    held = [["decoder"] * (layers // count + (i >= count - layers % count)) for i in range(count)]
    return [["embedding", *held[0]], *held[1:-1], [*held[-1], *["mtp"] * mtp_layers, "loss"]]
