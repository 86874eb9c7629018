"""Run directories with batches and train records of made-up log-probs, written by the store; and the arrays they were written from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from miles.data.sample import Flag, Sample, Status
from miles.data.store.manifest import Manifest, Policy, ShardEntry, seal_manifest
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import write_shard
from miles.data.store.train_record import write_train_record


@dataclass
class Made:
    """A sequence as it was written; arrays [T]."""

    step: int
    sample: Sample
    train: dict[str, np.ndarray]
    shard: int
    row: int
    rank: int
    node: int
    version: int


@dataclass
class Part:
    """A rank's part of a train record (store.train_record.RecordPart)."""

    rank: int
    made: list[Made]
    names: list[str]
    shard: Any = field(init=False)
    row: Any = field(init=False)
    offset: Any = field(init=False)
    layers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shard = np.array([each.shard for each in self.made], np.uint16)
        self.row = np.array([each.row for each in self.made], np.uint32)
        self.offset = np.cumsum([0, *(len(each.sample.token_id) for each in self.made)]).astype(np.uint64)

    def blocks(self, name: str):
        for each in self.made:
            yield each.train[name]


def make_sample(random: np.random.Generator, draw: int, index: int, prompt: int, response: int, version: int, **more: Any) -> Sample:
    """Random log-probs, some runs, turns, drafts and cached tokens."""
    total = prompt + response
    generated = np.arange(total) >= prompt
    flags = np.where(generated, int(Flag.GENERATED), 0).astype(np.uint8)
    if response:
        flags[prompt] |= np.uint8(Flag.FIRST_OF_TURN)
    if response > 40:
        flags[prompt + 30] |= np.uint8(Flag.FIRST_OF_TURN)
        flags[prompt + 33 : prompt + 37] |= np.uint8(Flag.DRAFT_ACCEPTED)
        flags[prompt + 37] |= np.uint8(Flag.DRAFT_RESAMPLED)
    mask = generated & (random.random(total) < 0.9)
    if response > 80:  # a tool's output, other text, and long spans beside them
        mask[prompt + 45 : prompt + 75] = True
        for start, flag in ((prompt + 50, int(Flag.TOOL_OUTPUT)), (prompt + 63, 0)):
            mask[start : start + 3], flags[start : start + 3] = False, flag
    logprob = np.where(generated, -random.exponential(1.0, total), np.nan).astype(np.float32)
    runs = [(prompt, version)] if response else []
    if response > 20:
        runs = [(prompt, version - 1), (prompt + 11, version)]
    return Sample(
        draw=draw, sample=index, seed=draw, token_id=random.integers(0, 300, total).astype(np.int32), prompt_length=prompt,
        rollout_logprob=logprob, loss_mask=mask.astype(np.uint8), flags=flags, status=Status.COMPLETED, reward=float(random.integers(-1, 2)),
        runs=runs, turns=[(0, 0), (prompt, 1)], engine=f"http://engine{index % 2}", source="math" if draw % 2 else "code",
        cached_tokens=prompt // 2 if index else 0, **more,
    )  # fmt: skip


def make_train(random: np.random.Generator, sample: Sample, noise: float) -> dict[str, np.ndarray]:
    """The trainer's arrays: log-probs off by noise, more so in single places."""
    total = len(sample.token_id)
    generated = np.arange(total) >= sample.prompt_length
    off = random.normal(0, noise, total) * np.where(random.random(total) < 0.02, 30, 1) * (random.random(total) < 0.8)
    train = (sample.rollout_logprob + off).astype(np.float32)
    return {
        "train_logprob": train,
        "entropy": np.where(generated, random.exponential(1.5, total), np.nan).astype(np.float32),
        "advantage": np.where(generated, random.integers(-1, 2), np.nan).astype(np.float32),
        "used": (sample.loss_mask & (random.random(total) < 0.95)).astype(np.uint8),
        "route_miss": np.where(generated, random.integers(0, 5, total), 0).astype(np.uint8),
    }


def write_run(
    folder: Path, made: list[Made], names: tuple[str, ...] = ("train_logprob", "entropy", "advantage", "used", "route_miss"), run_id: str = "", **attrs: Any
) -> RunDir:
    """Write batches and train records; sets shard and row of each sequence. Sequences of a step are trained on in the order given."""
    run = RunDir(folder)
    for step in sorted({each.step for each in made}):
        here = [each for each in made if each.step == step]
        entries = []
        for shard in sorted({each.shard for each in here}):
            members = sorted((each for each in here if each.shard == shard), key=lambda each: (each.sample.draw, each.sample.sample))
            for row, each in enumerate(members):
                each.row = row
            sealed = write_shard(run.batch(step) / f"rollout.{shard}.h5", [each.sample for each in members])
            tokens = sum(len(each.sample.token_id) for each in members)
            entries.append(ShardEntry(name=sealed.name, bytes=sealed.bytes, xxh3=sealed.xxh3, sequences=len(members), tokens=tokens))
        version = max(each.version for each in here)
        policy = Policy(weight_version=version, weight_checksum=f"{step:016x}")
        seal_manifest(run.batch(step), Manifest(run_id=run_id or run.run_id(), epoch=1, step=step, kind="rollout", policy=policy, shards=entries))
        for node in sorted({each.node for each in here}):
            parts = [Part(rank, [each for each in here if each.node == node and each.rank == rank], list(names)) for rank in sorted({each.rank for each in here if each.node == node})]
            write_train_record(run.train(step) / f"node_{node:04d}.h5", parts, {"node": node, "step": step, "weight_checksum": policy.weight_checksum, **attrs})
    return run


def random_run(folder: Path, seed: int = 0, steps: int = 3, draws: int = 5, longest: int = 2600, noise: float = 0.05) -> list[Made]:
    """A ragged run: three shards, two nodes with two ranks each, empty responses, all masked, one token, −inf and NaN under the mask and outside."""
    random = np.random.default_rng(seed)
    made = []
    for step in range(1, steps + 1):
        for draw in range(draws):
            for index in range(3):
                response = int(random.choice([0, 1, 2, 15, 16, 17, 100, 1023, 1024, 1025, longest]))
                sample = make_sample(random, 100 * step + draw, index, int(random.integers(0, 40)), response, step)
                train = make_train(random, sample, noise)
                if draw == 1 and index == 1:
                    sample.loss_mask[:] = 0
                if draw == 2 and response > 14:
                    first = sample.prompt_length
                    sample.rollout_logprob[first + 3] = -np.inf
                    train["train_logprob"][first + 5] = -np.inf
                    train["train_logprob"][first + 6] = np.nan
                    sample.rollout_logprob[first + 7] = -3.4e38
                    sample.loss_mask[first + 3 : first + 8] = 1
                if draw == 3 and response > 14:
                    sample.loss_mask[sample.prompt_length + 2] = 0
                    train["train_logprob"][sample.prompt_length + 2] = -np.inf
                node = int(random.integers(0, 2))
                made.append(Made(step, sample, train, int(random.integers(0, 3)), -1, 2 * node + int(random.integers(0, 2)), node, step))
    random.shuffle(made)  # type: ignore[arg-type]
    for step in range(1, steps + 1):  # every shard has a sequence
        for shard, each in enumerate([each for each in made if each.step == step][:3]):
            each.shard = shard
    write_run(folder, made)
    return made
