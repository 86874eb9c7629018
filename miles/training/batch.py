"""A sealed batch as a trainer rank sees it: small arrays of all sequences, advantages, and its own micro-batches, read a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from miles.algorithms.advantages import grpo_advantages
from miles.config.exits import UserError
from miles.config.schema import Algorithm
from miles.data.sample import Status
from miles.data.store.manifest import Manifest
from miles.data.store.shard import open_routes, open_shard
from miles.training.distributed import Ranks
from miles.training.loss import Denominators
from miles.training.misses import Misses
from miles.training.packing import PackedBatch, Part, pack
from miles.training.progress import HERE
from miles.training.reader import Reader, share

GROUP_ESTIMATORS = ("grpo",)
SMALL = ("offset", "draw", "sample", "reward", "prompt_length", "status", "trained_tokens")


@dataclass(frozen=True)
class Seen:
    """What training saw of one micro-batch: sequences (shard, row, lengths i64 [S]) and values of all their T tokens, prompts included.

    layers: counts u64 [layers] of its tokens, where the rollout's routes were compared.
    """

    shard: np.ndarray
    row: np.ndarray
    lengths: np.ndarray
    values: dict[str, np.ndarray]
    layers: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Batch:
    """One batch, opened. `small` holds one number a sequence of all its shards. `kept` holds what this rank's optimizer steps found, [step][micro-batch], until the record is written.

    old: of several optimizer steps, what the pass before the first of them found, [step][micro-batch]. layers: of the model, where
    routes of the rollout are there to be compared with.
    """

    manifest: Manifest
    ranks: Ranks
    reader: Reader
    parts: list[Part]
    small: dict[str, np.ndarray]
    temperature: float
    kept: list[list[Seen]] = field(default_factory=list)
    old: list[list[tuple[torch.Tensor, Misses | None]]] = field(default_factory=list)
    layers: int | None = None
    _whole: list[Denominators] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.manifest.assignment)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of this rank in an optimizer step (the same number on every rank)."""
        return len(self.manifest.assignment[step][self.ranks.rank])

    def packed(self, step: int, routes: bool = False) -> Iterator[PackedBatch]:
        """This rank's micro-batches of an optimizer step, with the rollout's routes if wanted and there; the next ones are read while one is in use."""
        rows = self.manifest.assignment[step][self.ranks.rank]
        with closing(self.reader.micro_batches(rows, routes=routes and self.layers is not None)) as read:
            for each, tokens in zip(rows, read, strict=True):
                HERE.tick()
                yield pack(self.parts, each, tokens, self.ranks.device)

    def whole(self, step: int) -> Denominators:
        """Samples and unmasked predicted tokens of an optimizer step over all ranks. The first call is collective, and not beside packed()."""
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
        rows = self.manifest.assignment[step][self.ranks.rank]
        trained = sum(int(self.parts[shard].trained_tokens[first:last].sum()) for each in rows for shard, first, last in each)
        return trained - int(np.count_nonzero(self.reader.first_tokens(rows)["loss_mask"]))

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
        self.reader.close()


def open_batch(manifest: Manifest, folder: Path, algorithm: Algorithm, ranks: Ranks, experts: tuple[int, int] | None = None) -> Batch:
    """Open the shards of a sealed batch and compute the advantages of all its samples from their rewards.

    folder: where the shards lie; experts: (layers, experts of a token) of a model whose routes are to be compared with the rollout's, which
    are left alone where they are of another shape, or gone. Raises ValueError where the assignment is for another number of ranks, and for a reward
    that is not finite, naming draw and sample.
    """
    for step, ranks_rows in enumerate(manifest.assignment):
        if len(ranks_rows) != ranks.world_size:
            raise UserError(
                f"{folder}: the batch is assigned to {len(ranks_rows)} trainer ranks, and this run has {ranks.world_size}; "
                "run with as many ranks as before, or set the batch aside"
            )
        assert len({len(rows) for rows in ranks_rows}) == 1, f"optimizer step {step}: ranks have equally many micro-batches"
    paths = [folder / entry.name for entry in manifest.shards]
    beside = _routes_beside(manifest, folder if experts else None)
    tables = _tables(paths, beside, ranks)
    routes = [path if path is not None and tuple(table["routes"]) == experts else None for path, table in zip(beside, tables, strict=True)]
    names = [name for name in SMALL if name != "offset"]
    small = {name: np.concatenate([table[name] for table in tables]) if tables else np.zeros(0) for name in names}
    small["length"] = np.concatenate([np.diff(table["offset"].astype(np.int64)) for table in tables]) if tables else np.zeros(0, np.int64)
    advantage = _advantages(small, algorithm, folder) if manifest.kind == "rollout" else np.zeros(len(small["reward"]), np.float32)
    cuts = np.cumsum([len(table["reward"]) for table in tables])[:-1]
    owns = np.split(advantage, cuts) if tables else []
    parts = [Part(table["offset"], own, table["trained_tokens"]) for table, own in zip(tables, owns, strict=True)]
    temperature = float(manifest.sampling.get("temperature", 1.0)) if manifest.kind == "rollout" else 1.0
    # The engine's log-prob of a greedy token is that of temperature 1.
    layers = experts[0] if experts and any(routes) else None
    return Batch(
        manifest, ranks, Reader(paths, routes=routes), parts, small, temperature if temperature > 0 else 1.0,
        kept=[[] for _ in manifest.assignment], layers=layers,
    )  # fmt: skip


def _routes_beside(manifest: Manifest, folder: Path | None) -> list[Path | None]:
    """The routes that the manifest names beside each shard, None where nobody asks: they share the part of their names after the first dot."""
    named = {entry.name.partition(".")[2]: folder / entry.name for entry in manifest.routes} if folder else {}
    return [named.get(entry.name.partition(".")[2]) for entry in manifest.shards]


def _tables(paths: list[Path], routes: list[Path | None], ranks: Ranks) -> list[dict[str, np.ndarray]]:
    """Small arrays of each shard's sequences, and the shape of its routes ((0, 0): none), on every rank. Rank 0 alone opens all the files: ranks × shards is a load on a file system."""

    def read() -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for index, (path, beside) in enumerate(zip(paths, routes, strict=True)):
            with open_shard(path) as shard:
                found |= {f"{index}.{name}": array for name, array in shard.sequences().items() if name in SMALL}
            shape = (0, 0)
            if beside is not None and beside.is_file():  # retention may have taken it
                with open_routes(beside) as opened:
                    shape = opened.shape
            found[f"{index}.routes"] = np.array(shape, np.int64)
        return found

    told = share(read if ranks.rank == 0 else None, dist.group.WORLD if ranks.world_size > 1 else None)
    return [{name: told[f"{index}.{name}"] for name in (*SMALL, "routes")} for index in range(len(paths))]


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
