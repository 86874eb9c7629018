"""Probes of ports and of the way between two nodes, over TCP: whether they reach each other, and how fast. NCCL's own is in nccl.py."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

from miles.slurm.preflight.verdict import Verdict, broken, ok

CHUNK = bytes(1 << 20)
CONNECT_SECONDS = 5.0


class Sink:
    """Listens on this node's own address, takes what comes and answers with its number of bytes; a context."""

    def __init__(self, host: str) -> None:
        self.server = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128)
        self.port = int(self.server.getsockname()[1])

    def __enter__(self) -> Sink:
        threading.Thread(target=self._accept, name="sink", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._take, args=(connection,), daemon=True).start()

    @staticmethod
    def _take(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # who sends sees it, and says so
            number = 0
            while more := connection.recv(1 << 20):
                number += len(more)
            connection.sendall(str(number).encode())


def send(host: str, port: int, megabytes: int) -> float:
    """Send so many MiB to a sink; returns MiB/s until all has arrived. OSError: not reached, or broken off."""
    with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
        connection.settimeout(60.0)
        began = time.monotonic()
        for _ in range(megabytes):
            connection.sendall(CHUNK)
        connection.shutdown(socket.SHUT_WR)
        arrived = int(connection.recv(64) or b"0")
    if arrived != megabytes * len(CHUNK):
        raise ConnectionError(f"{arrived} of {megabytes * len(CHUNK)} bytes arrived")
    return megabytes / max(time.monotonic() - began, 1e-9)


def ports(host: str, fixed: int) -> Verdict:
    """Whether a port of this node's address can be opened and reached from itself; fixed: the service's port where it is set (else 0)."""
    try:
        with Sink(host) as sink:
            send(host, sink.port, 1)
        if fixed:
            socket.create_server((host, fixed), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        what = f"port {fixed}" if fixed else "a free port"
        why = os.strerror(error.errno) if error.errno else str(error)  # its own text names the address again
        return broken(f"{what} of {host}: {why.lower()}")
    return ok(f"{host} listens" + (f", and port {fixed} is free" if fixed else ""))
