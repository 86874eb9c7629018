"""From the sealed shards of a job to its manifest."""

from __future__ import annotations

import numpy as np

from miles.config.exits import UserError
from miles.config.schema import RunConfig
from miles.data.plan_batch import assign_by
from miles.data.store.manifest import Assignment, Dropped, Manifest, Policy, ShardEntry
from miles.rollout.jobs import BatchJob, ShardReport


def compose(batch: BatchJob, config: RunConfig, run_id: str, epoch: int) -> Manifest:
    """The manifest of a complete job; shards in the order of their parts. Raises UserError when the batch can't be divided."""
    assert batch.complete, "every part is sealed"
    job = batch.job
    reports = [batch.shards[part] for part in sorted(batch.shards)]
    sampling = {} if job.kind == "sft" else (config.eval if job.kind == "eval" else config.rollout).sampling.model_dump(mode="json")
    return Manifest(
        run_id=run_id,
        epoch=epoch,
        step=job.step,
        kind=job.kind,
        policy=Policy(weight_version=job.weight_version, weight_checksum=job.weight_checksum),
        parent_checkpoint=job.parent_checkpoint,
        tokenizer_hash=reports[0].tokenizer_hash,
        sampling=sampling,
        engines=[engine for report in reports for engine in report.engines],
        shards=[ShardEntry(**report.shard) for report in reports],
        routes=[ShardEntry(**report.routes) for report in reports if report.routes is not None],
        draws=sorted(batch.chosen),
        dropped=[Dropped(**each) for each in batch.dropped()],
        next_draw=batch.next_draw,
        assignment=[] if job.kind == "eval" else _assignment(reports, job.kind, config),
    )


def _assignment(reports: list[ShardReport], kind: str, config: RunConfig) -> Assignment:
    try:
        return assign_by(
            config,
            1 if kind == "sft" else config.train.num_steps_per_rollout or 1,
            lengths=np.concatenate([report.lengths for report in reports]),
            draws=np.concatenate([report.draws for report in reports]),
            samples=np.concatenate([report.samples for report in reports]),
            shards=np.concatenate([np.full(len(report.draws), index) for index, report in enumerate(reports)]),
            rows=np.concatenate([np.arange(len(report.draws)) for report in reports]),
        )
    except ValueError as error:
        raise UserError(f"train.num_steps_per_rollout: {error}") from error
