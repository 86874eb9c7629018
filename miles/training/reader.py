"""Reading a batch at scale: who reads which bytes, and how those who don't read get them.

Ranks of one model-parallel group train on the same sequences. The group's first rank reads their slices, ahead of their use, and
broadcasts them; the others open no file. No backend splits a model yet, so each rank is alone so far. Files are opened when a slice of
them is first asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from miles.config.exits import UserError
from miles.data.store.manifest import MicroBatch
from miles.data.store.routes import Routes
from miles.data.store.shard import Shard, open_routes, open_shard
from miles.training.prefetch import prefetch

Arrays = dict[str, np.ndarray]

COLUMNS = {"token_id": np.int32, "rollout_logprob": np.float32, "loss_mask": np.uint8, "flags": np.uint8}
AHEAD = 2  # micro-batches that are read before they are asked for


class Reader:
    """Slices of a batch's shards, in the manifest's order, for the ranks of one group (None: this rank alone). One call at a time.

    routes: the file of routes beside each shard, None for one without.
    """

    def __init__(self, paths: Sequence[Path], group: dist.ProcessGroup | None = None, routes: Sequence[Path | None] = ()) -> None:
        self.paths, self.group, self.route_paths = list(paths), group, list(routes)
        self.leads = group is None or dist.get_rank(group) == 0
        self._shards: dict[int, Shard] = {}
        self._routes: dict[int, Routes] = {}

    def micro_batches(self, rows: Sequence[MicroBatch], ahead: int = AHEAD, routes: bool = False) -> Generator[Arrays, None, None]:
        """Token arrays of each micro-batch, its sequences end to end: token_id i32, rollout_logprob f32, loss_mask u8, flags u8 [T].

        routes: besides, where the rollout recorded any of its routes, expert u8 or u16 [N, layers, top_k], and expert_rows i64 [S], how
        many of the N are each sequence's.
        Collective over the group. At most `ahead` micro-batches are in memory before they are asked for, and those on the first rank only.
        """
        if not self.leads:
            for _ in rows:
                yield share(None, self.group)
            return
        # Threads of several ranks have no common order, so the thread only reads; the broadcast is the caller's.
        read = self._read_with_routes if routes else self._read
        with closing(prefetch(read, rows, ahead)) as coming:
            for _ in rows:
                yield share(lambda: next(coming), self.group)

    def first_tokens(self, rows: Sequence[MicroBatch]) -> Arrays:
        """loss_mask u8 [S] of the first token of each sequence of these micro-batches (0 for an empty one). Collective over the group."""
        return share((lambda: self._read_first(rows)) if self.leads else None, self.group)

    def _read(self, rows: MicroBatch) -> Arrays:
        pieces = [self._shard(index).tokens(first, last, list(COLUMNS)) for index, first, last in rows]
        return {name: np.concatenate([np.zeros(0, dtype), *(piece[name] for piece in pieces)]) for name, dtype in COLUMNS.items()}

    def _read_with_routes(self, rows: MicroBatch) -> Arrays:
        experts, counts = [], []
        for index, first, last in rows:
            found = self._open_routes(index).experts(first, last) if self.route_paths[index] is not None else {}
            experts += [found[row] for row in sorted(found)]
            counts += [len(found.get(row, ())) for row in range(first, last)]
        read = self._read(rows)
        return {**read, "expert": np.concatenate(experts), "expert_rows": np.array(counts, np.int64)} if experts else read

    def _open_routes(self, index: int) -> Routes:
        if index not in self._routes:
            path = self.route_paths[index]
            assert path is not None, "only where there is one"
            self._routes[index] = open_routes(path)
        return self._routes[index]

    def _read_first(self, rows: Sequence[MicroBatch]) -> Arrays:
        pieces = [self._shard(index).first_of("loss_mask", first, last) for each in rows for index, first, last in each]
        return {"loss_mask": np.concatenate([np.zeros(0, np.uint8), *pieces])}

    def _shard(self, index: int) -> Shard:
        if index not in self._shards:
            self._shards[index] = open_shard(self.paths[index])
        return self._shards[index]

    def close(self) -> None:
        """Close the files."""
        for shard in self._shards.values():
            shard.close()
        for routes in self._routes.values():
            routes.close()
        self._shards.clear()
        self._routes.clear()


def share(make: Callable[[], Arrays] | None, group: dist.ProcessGroup | None) -> Arrays:
    """What the group's first rank makes, on all its ranks; the others give None. Without a group: what make() returns.

    Travels as two sizes, a description and the raw bytes, over gloo, or over NCCL where the group has nothing else. An exception of make()
    passes on the first rank, and ends the others with a UserError or RuntimeError that quotes it.
    """
    if group is None:
        assert make is not None, "alone, one reads for oneself"
        return make()
    source, device = dist.get_global_rank(group, 0), _device(group)
    if dist.get_rank(group) != 0:
        sizes = torch.zeros(2, dtype=torch.int64, device=device)
        dist.broadcast(sizes, source, group)
        told = json.loads(_receive(int(sizes[0]), source, group, device).tobytes())
        if "error" in told:
            raise (UserError if told["user_fault"] else RuntimeError)(f"rank {source}, which reads for this one: {told['error']}")
        return _divided(_receive(int(sizes[1]), source, group, device), told["arrays"])
    assert make is not None, "the first rank reads"
    arrays: Arrays = {}
    error: Exception | None = None
    try:
        # Wide ones first: on the other side each array is a view of one buffer, and then all are aligned.
        made = sorted(make().items(), key=lambda item: -item[1].itemsize)
        arrays = {name: np.ascontiguousarray(array) for name, array in made}
        description = json.dumps({"arrays": [[name, array.dtype.str, array.shape] for name, array in arrays.items()]}).encode()
    except Exception as raised:
        error = raised
        description = json.dumps({"error": f"{type(raised).__name__}: {raised}", "user_fault": isinstance(raised, UserError)}).encode()
    content = np.concatenate([np.zeros(0, np.uint8), *(array.reshape(-1).view(np.uint8) for array in arrays.values())])
    dist.broadcast(torch.tensor([len(description), len(content)], dtype=torch.int64, device=device), source, group)
    for part in (np.frombuffer(description, np.uint8).copy(), content):
        if len(part):
            dist.broadcast(torch.from_numpy(part).to(device), source, group)
    if error is not None:
        raise error
    return arrays


def _receive(size: int, source: int, group: dist.ProcessGroup, device: torch.device) -> np.ndarray:
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    if size:
        dist.broadcast(buffer, source, group)
    return buffer.cpu().numpy()


def _divided(content: np.ndarray, arrays: list[tuple[str, str, list[int]]]) -> Arrays:
    found, start = {}, 0
    for name, dtype, shape in arrays:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        found[name] = content[start : start + size].view(dtype).reshape(shape)
        start += size
    return found


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's bytes travel from."""
    over_cpu = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if over_cpu else torch.device("cuda", torch.cuda.current_device())
