"""A sealed batch as a trainer rank sees it: small arrays of all sequences, advantages, and its own micro-batches, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from miles.algorithms.advantages import grpo_advantages
from miles.config.exits import UserError
from miles.config.schema import Algorithm
from miles.data.sample import Status
from miles.data.store.manifest import Manifest
from miles.data.store.shard import open_shard
from miles.training.distributed import Ranks
from miles.training.loss import Denominators
from miles.training.packing import PackedBatch, Part, pack

GROUP_ESTIMATORS = ("grpo",)


@dataclass(frozen=True)
class Seen:
    """What training saw of one micro-batch: sequences (shard, row, lengths i64 [S]) and values of all their T tokens, prompts included."""

    shard: np.ndarray
    row: np.ndarray
    lengths: np.ndarray
    values: dict[str, np.ndarray]


@dataclass
class Batch:
    """One batch, opened. `kept` holds what this rank's optimizer steps found, [step][micro-batch], until the record is written."""

    manifest: Manifest
    ranks: Ranks
    parts: list[Part]
    small: dict[str, np.ndarray]
    temperature: float
    kept: list[list[Seen]] = field(default_factory=list)
    old_logprob: list[list[torch.Tensor]] = field(default_factory=list)
    _whole: list[Denominators] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.manifest.assignment)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of this rank in an optimizer step (the same number on every rank)."""
        return len(self.manifest.assignment[step][self.ranks.rank])

    def packed(self, step: int) -> Iterator[PackedBatch]:
        """This rank's micro-batches of an optimizer step, each read when it is asked for."""
        for rows in self.manifest.assignment[step][self.ranks.rank]:
            yield pack(self.parts, rows, self.ranks.device)

    def whole(self, step: int) -> Denominators:
        """Samples and unmasked predicted tokens of an optimizer step over all ranks. The first call is collective."""
        if self._whole is None:
            tokens = torch.tensor([self._own_tokens(index) for index in range(self.steps)], dtype=torch.int64)
            counts = self.ranks.all_reduce(tokens).tolist()
            samples = [
                sum(last - first for rank in step_rows for micro_batch in rank for _, first, last in micro_batch)
                for step_rows in self.manifest.assignment
            ]
            self._whole = [Denominators(s, t) for s, t in zip(samples, counts, strict=True)]
        return self._whole[step]

    def _own_tokens(self, step: int) -> int:
        """Unmasked tokens of this rank that something predicts: all but a sequence's first."""
        count = 0
        for rows in self.manifest.assignment[step][self.ranks.rank]:
            for shard, first, last in rows:
                part = self.parts[shard]
                mask = part.shard.tokens(first, last, ["loss_mask"])["loss_mask"] != 0
                starts = (part.offset[first : last + 1] - part.offset[first]).astype(np.int64)
                starts = starts[:-1][np.diff(starts) > 0]
                count += int(mask.sum()) - int(mask[starts].sum())
        return count

    def metrics(self) -> dict[str, float]:
        """Metrics of the batch itself, from the small arrays: rewards, lengths, truncation, groups without signal."""
        small = self.small
        if self.manifest.kind != "rollout" or len(small["reward"]) == 0:
            return {}
        length = small["length"] - small["prompt_length"]
        _, group = np.unique(small["draw"], return_inverse=True)
        high, low = np.full(group.max() + 1, -np.inf), np.full(group.max() + 1, np.inf)
        np.maximum.at(high, group, small["reward"])
        np.minimum.at(low, group, small["reward"])
        return {
            "rollout/raw_reward": float(small["reward"].mean(dtype=np.float64)),
            "rollout/response_len/mean": float(length.mean(dtype=np.float64)),
            "rollout/response_len/median": float(np.median(length)),
            "rollout/response_len/max": float(length.max()),
            "rollout/response_len/min": float(length.min()),
            "rollout/truncated_ratio": float((small["status"] == Status.TRUNCATED).mean()),
            "rollout/zero_std/ratio": float((high == low).mean()),
            "rollout/samples": float(len(length)),
            "rollout/tokens": float(small["length"].sum()),
        }

    def close(self) -> None:
        """Close the shards."""
        for part in self.parts:
            part.shard.close()


def open_batch(manifest: Manifest, folder: Path, algorithm: Algorithm, ranks: Ranks) -> Batch:
    """Open the shards of a sealed batch and compute the advantages of all its samples from their rewards.

    folder: where the shards lie. Raises ValueError where the assignment is for another number of ranks, and for a reward
    that is not finite, naming draw and sample.
    """
    for step, ranks_rows in enumerate(manifest.assignment):
        if len(ranks_rows) != ranks.world_size:
            raise UserError(
                f"{folder}: the batch is assigned to {len(ranks_rows)} trainer ranks, and this run has {ranks.world_size}; "
                "run with as many ranks as before, or set the batch aside"
            )
        assert len({len(rows) for rows in ranks_rows}) == 1, f"optimizer step {step}: ranks have equally many micro-batches"
    shards = [open_shard(folder / entry.name) for entry in manifest.shards]
    tables = [shard.sequences() for shard in shards]
    names = ("draw", "sample", "reward", "prompt_length", "status")
    small = {name: np.concatenate([table[name] for table in tables]) if tables else np.zeros(0) for name in names}
    small["length"] = np.concatenate([np.diff(table["offset"].astype(np.int64)) for table in tables]) if tables else np.zeros(0, np.int64)
    advantage = _advantages(small, algorithm, folder) if manifest.kind == "rollout" else np.zeros(len(small["reward"]), np.float32)
    cuts = np.cumsum([len(table["reward"]) for table in tables])[:-1]
    parts = [
        Part(shard, table["offset"], own)
        for shard, table, own in zip(shards, tables, np.split(advantage, cuts) if tables else [], strict=True)
    ]
    temperature = float(manifest.sampling.get("temperature", 1.0)) if manifest.kind == "rollout" else 1.0
    # The engine's log-prob of a greedy token is that of temperature 1.
    return Batch(manifest, ranks, parts, small, temperature if temperature > 0 else 1.0, kept=[[] for _ in manifest.assignment])


def _advantages(small: dict[str, np.ndarray], algorithm: Algorithm, folder: Path) -> np.ndarray:
    if algorithm.advantage_estimator not in GROUP_ESTIMATORS:
        raise UserError(f"algorithm.advantage_estimator: {algorithm.advantage_estimator} is not there yet; use one of {', '.join(GROUP_ESTIMATORS)}")
    bad = np.flatnonzero(~np.isfinite(small["reward"]))
    if len(bad):
        first = bad[0]
        raise UserError(
            f"{folder}: the reward of draw {small['draw'][first]}, sample {small['sample'][first]} is {small['reward'][first]}; "
            "rewards must be finite numbers"
        )
    # In (draw, sample) order, so that which worker sealed what cannot show in the bits.
    order = np.lexsort((small["sample"], small["draw"]))
    sorted_advantage = grpo_advantages(
        torch.from_numpy(small["reward"][order].astype(np.float32)),
        torch.from_numpy(small["draw"][order].astype(np.int64)),
        normalize=algorithm.rewards_normalization,
        std=algorithm.grpo_std_normalization,
    ).numpy()
    advantage = np.empty_like(sorted_advantage)
    advantage[order] = sorted_advantage
    return advantage
