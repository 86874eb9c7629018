"""Plain values between ranks, as JSON: torch's own object collectives would pickle."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from miles.run.coordinator import Coordinator
from miles.run.role import Role

A_WEEK = timedelta(days=7)


def join(role: Role, coordinator: Coordinator, device: str, host: str) -> None:
    """Make the process group of the trainer ranks; rank 0's store listens on a port of the kernel's choice."""
    if device == "cuda":
        torch.cuda.set_device(role.rank % torch.cuda.device_count())
    if role.rank == 0:
        store = dist.TCPStore(host, 0, role.world_size, is_master=True, wait_for_workers=False, timeout=A_WEEK)
        coordinator.publish("store_port", store.port)
    else:
        store = dist.TCPStore(host, int(coordinator.lookup("store_port")), role.world_size, is_master=False, timeout=A_WEEK)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=role.rank, world_size=role.world_size, timeout=A_WEEK)


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank (what JSON can say)."""
    text = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    size = torch.tensor([len(text)], dtype=torch.int64)
    dist.broadcast(size, 0)
    buffer = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, 0)
    return json.loads(bytes(buffer.numpy()))
