"""The environment of a role process: who it is, which accelerators it sees, which network interface it uses, and pinned threads."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from miles.config.address import bind_host, is_loopback
from miles.config.process import Process
from miles.data.store.start_list import StartList


@dataclass(frozen=True)
class Node:
    """Where a supervisor runs: its component's `number`th node (from 0), that machine's name, and a name of this very supervisor."""

    number: int
    name: str
    place: str

    @classmethod
    def here(cls, component: str, number: int) -> Node:
        """This machine. SLURMD_NODENAME is what the cluster calls it, where there is one; several nodes may share a host name."""
        return cls(number, os.environ.get("SLURMD_NODENAME") or socket.gethostname(), f"{component}.{number}.{secrets.token_hex(4)}")


def environment(wanted: StartList, run_dir: Path, epoch: int, process: Process, node: Node) -> dict[str, str]:
    """Environment of a role: its identity, and pinned threads, since bits depend on their number."""
    attempt = run_dir / "attempts" / f"{epoch:06d}"
    threads = str(1 if process.role in ("service", "worker") else wanted.threads)
    network = interface(bind_host(wanted.host))
    return {
        **network,
        **os.environ,  # who says GLOO_SOCKET_IFNAME knows the network better; but what is on loopback stays there
        **(network if is_loopback(bind_host(wanted.host)) else {}),
        "MILES_RUN_DIR": str(run_dir),
        "MILES_EPOCH": str(epoch),
        "MILES_RANK": str(process.rank),
        "MILES_WORLD_SIZE": str(process.count),
        "MILES_NODE": str(node.number),
        "MILES_NODE_NAME": node.name,
        "MILES_PLACE": node.place,
        "MILES_TOKEN": (attempt / "token").read_text(),
        "MILES_SERVICE": json.loads((attempt / "service.json").read_text())["url"],
        "CUDA_VISIBLE_DEVICES": accelerators(process, os.environ.get("CUDA_VISIBLE_DEVICES")) if wanted.device == "cuda" else "",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        # A thread that waits for others burns its core for milliseconds by default; where cores are shared, those were taken from the others.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # A log is read by lines; a bar that is drawn over itself is none.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "1"),
        "PYTHONUNBUFFERED": "1",
        # A worker's arrays come and go by the megabyte: each a mapping of its own, so that its memory goes back at once and leaves no holes.
        **({"MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(1 << 20))} if process.role == "worker" else {}),
    }


def accelerators(process: Process, inherited: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a process: its own of those that this node was given (numbers or UUIDs; None: all of the machine)."""
    given = None if inherited is None else [name.strip() for name in inherited.split(",") if name.strip()]
    if given is not None and max(process.gpus, default=-1) >= len(given):
        wanted = ", ".join(map(str, process.gpus))
        raise RuntimeError(f"{process.role} {process.rank} needs accelerators {wanted} of this node, which has {len(given)} (CUDA_VISIBLE_DEVICES={inherited})")
    return ",".join(str(gpu) if given is None else given[gpu] for gpu in process.gpus)


def interface(host: str) -> dict[str, str]:
    """Which network interface gloo and NCCL use: the one that has this address; nothing where no interface says so (they look for themselves)."""
    name = "lo" if is_loopback(host) else None
    for found, addresses in psutil.net_if_addrs().items():
        if name is None and any(address.address.partition("%")[0] == host for address in addresses):
            name = found
    # "=": this interface, not those whose name begins so.
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
