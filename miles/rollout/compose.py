"""From the sealed shards of a job to its manifest."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles.config.exits import UserError
from miles.config.schema import RunConfig
from miles.data.plan_batch import assign
from miles.data.store.manifest import Assignment, Dropped, Manifest, Policy, ShardEntry
from miles.rollout.jobs import BatchJob, ShardReport


def data_parallel_size(config: RunConfig) -> int:
    """Ranks that train on different samples."""
    parallel = config.train.parallel
    return config.train.num_nodes * config.train.num_gpus_per_node // (parallel.tensor * parallel.pipeline * parallel.context)


def compose(batch: BatchJob, config: RunConfig, run_id: str, epoch: int, parent_checkpoint: str | None) -> Manifest:
    """The manifest of a complete job; shards in the order of their workers. Raises UserError when the batch can't be divided."""
    assert batch.complete, "every part is sealed"
    job = batch.job
    reports = [batch.shards[worker] for worker in sorted(batch.shards)]
    sampling = {} if job.kind == "sft" else (config.eval if job.kind == "eval" else config.rollout).sampling.model_dump(mode="json")
    return Manifest(
        run_id=run_id,
        epoch=epoch,
        step=job.step,
        kind=job.kind,
        policy=Policy(weight_version=job.weight_version, weight_checksum=job.weight_checksum),
        parent_checkpoint=parent_checkpoint,
        tokenizer_hash=reports[0].tokenizer_hash,
        sampling=sampling,
        engines=[engine for report in reports for engine in report.engines],
        shards=[ShardEntry(**report.shard) for report in reports],
        routes=[ShardEntry(**report.routes) for report in reports if report.routes is not None],
        draws=sorted(draw for draws in batch.orders.values() for draw in draws),
        dropped=[Dropped(**each) for each in batch.dropped()],
        next_draw=batch.next_draw,
        assignment=[] if job.kind == "eval" else _assignment(reports, job.kind, config),
    )


def _assignment(reports: list[ShardReport], kind: str, config: RunConfig) -> Assignment:
    train = config.train
    budget: dict[str, Any] = (
        {"max_tokens": train.max_tokens_per_gpu} if train.use_dynamic_batch_size else {"micro_batch_size": train.micro_batch_size}
    )
    try:
        return assign(
            np.concatenate([report.lengths for report in reports]),
            np.concatenate([report.draws for report in reports]),
            np.concatenate([report.samples for report in reports]),
            np.concatenate([np.full(len(report.draws), index) for index, report in enumerate(reports)]),
            np.concatenate([np.arange(len(report.draws)) for report in reports]),
            dp_size=data_parallel_size(config),
            steps=1 if kind == "sft" else train.num_steps_per_rollout or 1,
            balance=train.balance_data,
            **budget,
        )
    except ValueError as error:
        raise UserError(f"train.num_steps_per_rollout: {error}") from error
