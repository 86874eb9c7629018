"""Writes what was generated and trained on as a run directory, with the store's own writers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.config.compose import dump_config
from miles.config.schema import RunConfig
from miles.data.plan_batch import assign
from miles.data.sample import Flag, Sample, Status
from miles.data.store.epoch import Fence, new_epoch
from miles.data.store.files import Sealed
from miles.data.store.manifest import Assignment, Manifest, Policy, ShardEntry, seal_manifest
from miles.data.store.metrics import Metrics
from miles.data.store.run_dir import RunDir, record_attempt
from miles.data.store.shard import write_routes, write_shard
from miles.data.store.train_record import write_train_record
from miles.training.batch import Seen
from miles.training.record import OwnPart
from planted.generation import Generated
from planted.model import LAYERS, TOP_K
from planted.pipeline import Pipeline
from planted.policy import reward_of
from planted.scene import ENGINES, RANKS, RANKS_A_NODE, Scene
from planted.training import Trained
from planted.vocabulary import text_of

WORKERS, MICRO_BATCH = 2, 1024  # tokens
PAGE = 4  # tokens of a prefix cache's page
SOURCES = ("arithmetic", "code", "prose")
RECORDED = {"kept_mass", "routes", "route_miss", "text"}  # what may be left out


def engine_name(engine: int) -> str:
    """Its address; two engines a node."""
    return f"http://node-{engine // 2}:{30000 + engine}"


def worker_of(engine: NDArray[np.int64]) -> NDArray[np.int64]:
    """The worker that drives an engine seals its sequences."""
    return engine // (ENGINES // WORKERS)


def assignments(scene: Scene, made: Generated) -> tuple[list[Assignment], NDArray[np.int64]]:
    """Of each step, and the rank i64 [S] of every sequence."""
    found, rank = [], np.zeros(len(scene.step), np.int64)
    for step in range(int(scene.step.max()) + 1):
        rows = [_rows(scene, step, worker) for worker in range(WORKERS)]
        order = np.concatenate(rows)
        shard, place = (np.concatenate(each) for each in ([np.full(len(r), i) for i, r in enumerate(rows)], [np.arange(len(r)) for r in rows]))
        plan = assign(made.length[order], scene.draw[order], scene.sample[order], shard, place, dp_size=RANKS, max_tokens=MICRO_BATCH)
        for index, batches in enumerate(plan[0]):
            for of, first, last in (part for batch in batches for part in batch):
                rank[rows[of][first:last]] = index
        found.append(plan)
    return found, rank


def _rows(scene: Scene, step: int, worker: int) -> NDArray[np.int64]:
    """Sequences of one shard, in its order."""
    mine = np.flatnonzero((scene.step == step) & (worker_of(scene.engine) == worker))
    return mine[np.lexsort((scene.sample[mine], scene.draw[mine]))]


def write_run(folder: Path, pipeline: Pipeline, scene: Scene, made: Generated, seen: Trained, plans: list[Assignment], recorded: set[str]) -> None:
    """Write the run directory; `recorded`: which of RECORDED are in it. Steps count from 1, weight versions from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    run = RunDir(folder)
    run.run_yaml.write_text(_configuration(len(plans)))
    epoch = new_epoch(run)
    record_attempt(run, epoch, tier="accounted", why="planted", layout={"ranks": RANKS, "nodes": RANKS // RANKS_A_NODE})
    reward = np.array([reward_of(made.token[row, scene.prompt_length[row] : length]) for row, length in enumerate(made.length)])
    advantage = _advantages(scene.draw, reward)
    metrics = Metrics(run.metrics)
    for index, plan in enumerate(plans):
        shards = [_rows(scene, index, worker) for worker in range(WORKERS)]
        _write_batch(run, epoch, index, plan, [[_sample(row, scene, made, float(reward[row]), recorded) for row in rows] for rows in shards])
        _write_train(run, epoch, index, plan, shards, made, seen, advantage, recorded)
        metrics.append({"step": index + 1, "kind": "rollout", "time": 1.78e9 + 10 * index, "rollout/raw_reward": float(reward[np.concatenate(shards)].mean())})
    metrics.close()


@cache
def _configuration(steps: int) -> str:
    return dump_config(RunConfig.model_validate({"name": "planted", "num_rollout": steps, "model": {"name": "planted-moe"}}))


def _advantages(draw: NDArray[np.int64], reward: NDArray[np.float64]) -> NDArray[np.float64]:
    found = np.zeros(len(draw))
    for each in np.unique(draw):
        group = draw == each
        found[group] = (reward[group] - reward[group].mean()) / (reward[group].std(ddof=1) + 1e-6)
    return found


def _sample(row: int, scene: Scene, made: Generated, reward: float, recorded: set[str]) -> Sample:
    here, prompt = slice(0, int(made.length[row])), int(scene.prompt_length[row])
    token, generated, tool = made.token[row, here], made.generated[row, here], scene.tool[row, here]
    cached = (prompt - 1) // PAGE * PAGE if scene.sample[row] else 0
    starts = generated & ~np.concatenate([[False], generated[:-1]])
    bits = {
        Flag.GENERATED: generated, Flag.FIRST_OF_TURN: starts, Flag.TOOL_OUTPUT: tool, Flag.DRAFT_ACCEPTED: made.accepted[row, here],
        Flag.DRAFT_RESAMPLED: made.resampled[row, here], Flag.PREFIX_CACHED: np.arange(len(token)) < cached,
    }  # fmt: skip
    lags = [(start, lag) for start, lag in scene.lag[row // scene.rows] if start < len(token)]
    return Sample(
        draw=int(scene.draw[row]), sample=int(scene.sample[row]), seed=row, token_id=token, prompt_length=prompt, rollout_logprob=made.logprob[row, here],
        loss_mask=generated.astype(np.uint8), flags=np.sum([np.where(each, bit, 0) for bit, each in bits.items()], 0).astype(np.uint8),
        status=Status.COMPLETED if made.stopped[row] else Status.TRUNCATED, reward=reward, reward_parts={"even": reward},
        runs=[(start + 1 if start else 0, _version(int(scene.step[row]), lag)) for start, lag in lags],
        turns=[(int(start), turn) for turn, start in enumerate(np.flatnonzero(starts))], engine=engine_name(int(scene.engine[row])),
        source=SOURCES[int(scene.draw[row]) % len(SOURCES)], cached_tokens=cached, prompt=text_of(token[:prompt]) if "text" in recorded else None,
        response=text_of(token[prompt:]) if "text" in recorded else None, routes=made.order[row, : len(token) - 1, :, :TOP_K] if "routes" in recorded else None,
        kept_mass=np.where(generated, made.kept_mass[row, here], np.nan).astype(np.float16) if "kept_mass" in recorded else None,
    )  # fmt: skip


def _version(step: int, lag: int) -> int:
    """The policy of step 0 is version 4: there are versions before it."""
    return FIRST_VERSION + step - lag


FIRST_VERSION = 4


def _entry(file: Sealed, samples: list[Sample]) -> ShardEntry:
    return ShardEntry(name=file.name, bytes=file.bytes, xxh3=file.xxh3, sequences=len(samples), tokens=sum(len(each.token_id) for each in samples))


def _write_batch(run: RunDir, epoch: int, index: int, plan: Assignment, shards: list[list[Sample]]) -> None:
    folder = run.batch(index + 1)
    folder.mkdir(parents=True)
    entries, routes = [], []
    for worker, samples in enumerate(shards):
        facts = {"worker": worker, "epoch": epoch, "step": index + 1}
        entries.append(_entry(write_shard(folder / f"rollout.{worker}.h5", samples, facts), samples))
        beside = write_routes(folder / f"routes.{worker}.h5", samples, facts)
        routes += [_entry(beside, samples)] if beside else []
    engines = [{"address": engine_name(engine), "node": f"node-{engine // 2}", "version": "planted"} for engine in range(ENGINES)]
    draws = sorted({each.draw for samples in shards for each in samples})
    manifest = Manifest(
        run_id=run.run_id(), epoch=epoch, step=index + 1, kind="rollout", policy=Policy(weight_version=_version(index, 0), weight_checksum=f"{index:016x}"),
        sampling={"temperature": 1.0, "top_p": 1.0, "top_k": -1}, engines=engines, shards=entries, routes=routes, draws=draws, next_draw=draws[-1] + 1, assignment=plan,
    )  # fmt: skip
    seal_manifest(folder, manifest)


def _write_train(run: RunDir, epoch: int, index: int, plan: Assignment, shards: list[NDArray[np.int64]], made: Generated, seen: Trained, advantage: NDArray[np.float64], recorded: set[str]) -> None:
    run.train(index + 1).mkdir(parents=True)
    for node in range(RANKS // RANKS_A_NODE):
        parts = []
        for rank in range(node * RANKS_A_NODE, (node + 1) * RANKS_A_NODE):
            batches = [[(of, row) for of, first, last in batch for row in range(first, last)] for batch in plan[0][rank]]
            parts.append(OwnPart(rank, [_seen(batch, shards, made, seen, advantage, recorded) for batch in batches if batch]))
        facts = {"backend": "planted", "kind": "rollout", "step": index + 1, "node": node, "world_size": RANKS, "dtype": "float32", "temperature": 1.0}
        write_train_record(run.train(index + 1) / f"node_{node:04d}.h5", parts, facts, Fence(run, epoch))


def _seen(batch: list[tuple[int, int]], shards: list[NDArray[np.int64]], made: Generated, seen: Trained, advantage: NDArray[np.float64], recorded: set[str]) -> Seen:
    """A micro-batch as its rank saw it. route_miss of token t is of the pass that predicted it, at token t − 1."""
    columns: dict[str, list[np.ndarray]] = {}
    compared, differ = np.zeros((2, LAYERS), np.uint64)
    rows = [int(shards[of][row]) for of, row in batch]
    for row in rows:
        length = int(made.length[row])
        logprob, used = seen.logprob[row, :length], made.generated[row, :length]
        values: dict[str, Any] = {
            "train_logprob": logprob, "entropy": seen.entropy[row, :length], "advantage": np.where(used, advantage[row], np.nan).astype(np.float32),
            "used": (used & np.isfinite(logprob)).astype(np.uint8),
        }  # fmt: skip
        if "route_miss" in recorded:
            other = (np.sort(seen.experts[row, : length - 1], -1) != np.sort(made.order[row, : length - 1, :, :TOP_K], -1)).any(-1)
            values["route_miss"] = np.concatenate([[0], other.sum(-1)]).astype(np.uint8)
            compared += np.uint64(used[1:].sum())
            differ += other[used[1:]].sum(0).astype(np.uint64)
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    of, place = (np.array(each) for each in zip(*batch, strict=True))
    layers = {"routed": compared, "route_miss": differ} if "route_miss" in recorded else {}
    return Seen(of, place, made.length[rows], {name: np.concatenate(each) for name, each in columns.items()}, layers)
