"""The ranks of a trainer: process group, device, and a few collectives over plain data. Nothing is pickled.

CPU tensors travel over gloo, CUDA tensors over NCCL, in one process group.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import socket
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from miles.config.address import family_of

# Ranks wait for rank 0 as long as a rollout takes. A rank that dies is seen by its supervisor, a lost service by the heartbeat.
TIMEOUT = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among the trainer's: rank of world_size, its node's first rank, its device, and the mesh for FSDP."""

    rank: int
    world_size: int
    ranks_per_node: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def node(self) -> int:
        """Number of this rank's node."""
        return self.rank // self.ranks_per_node

    @property
    def node_ranks(self) -> range:
        """Ranks of this node; the first one writes for all."""
        first = self.node * self.ranks_per_node
        return range(first, min(first + self.ranks_per_node, self.world_size))

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def all_reduce(self, values: Tensor, op: str = "sum") -> Tensor:
        """Sum (or max) of a tensor over all ranks, in place; returns it."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        return values

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """A JSON value from one rank to all."""
        if self.world_size == 1:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, source)
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, source)
        return json.loads(buffer.numpy().tobytes())

    def gather_json(self, value: Any) -> list[Any]:
        """A JSON value of every rank, on every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        data = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64))
        longest = int(max(sizes))
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def start_ranks(
    rank: int,
    world_size: int,
    *,
    ranks_per_node: int = 1,
    device: str = "cpu",
    store: dist.Store | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Ranks:
    """Join the process group and make this process deterministic. Collective.

    store: where ranks meet; world size 1 needs none. With more ranks, rank 0 makes it by open_store and the others connect.
    threads: torch's threads, pinned (bits depend on them). Random generators are seeded from (seed, rank).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # A rank that sees one accelerator alone calls it 0; one that sees all of its node takes its own.
        place = torch.device("cuda", rank % ranks_per_node % max(torch.cuda.device_count(), 1))
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    else:
        place = torch.device("cpu")
        backend = "gloo"
    # warn_only on CUDA: a few kernels there have no deterministic form, and the tier that a run promises is recorded elsewhere.
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # reads of it are bugs that tests look for; filling costs a pass
    if not dist.is_initialized():
        if store is None:
            assert world_size == 1, "more than one rank needs a store to meet at"
            store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    seed_everything(seed, rank)
    mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("dp",))
    return Ranks(rank, world_size, ranks_per_node, place, mesh)


def open_store(host: str, port: int, world_size: int, master: bool) -> dist.TCPStore:
    """The store where ranks meet. The master may ask for port 0 and publish `.port` to the others."""
    if not master:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
    # Left to itself the store would listen on every interface.
    listener = socket.create_server((host, port), family=family_of(host), backlog=1024)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host, port, world_size, is_master=True, timeout=TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int, rank: int) -> None:
    """Seed torch's, numpy's and Python's generators from (seed, rank)."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint32)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)  # libraries draw from the global generator
    random.seed(mixed)
