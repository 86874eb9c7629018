"""Preflight's measurement between ranks, with gloo in NCCL's place: two nodes as two calls, a node alone, and a partner that never comes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from miles.slurm.preflight import nccl

HOST = "127.0.0.1"


def test_two_nodes_and_a_node_with_two_ranks() -> None:
    told, port = threading.Event(), []

    def meet(own: int | None) -> tuple[str, int]:
        if own is not None:
            port.append(own)
            told.set()
        assert told.wait(60)
        return HOST, port[0]

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(nccl.measured, 2, HOST, {rank: 0}, meet, "gloo") for rank in (0, 1)]
        found = [call.result() for call in calls]
    assert all(rate is not None and rate > 0 and why == "" for rate, why in found)
    rate, why = nccl.measured(2, HOST, {0: 0, 1: 1}, lambda own: (HOST, own or 0), "gloo")
    assert (rate is not None, why) == (True, "")


def test_nobody_comes() -> None:
    assert nccl.measured(2, HOST, {1: 0}, lambda _: None, "gloo") == (None, "rank 0 did not come")
    began = time.monotonic()
    rate, why = nccl.measured(2, HOST, {0: 0}, lambda own: (HOST, own or 0), "gloo", seconds=3.0)
    assert rate is None
    assert "Error" in why
    assert time.monotonic() - began < nccl.START_SECONDS + 30
