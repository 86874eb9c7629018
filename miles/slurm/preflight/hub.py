"""Where the nodes of a preflight meet: a server of the batch process that tells its time and keeps words for others, over plain TCP.

Not by files: the shared file system is among what is tested. A request and its answer are a JSON line each.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any

ASK_SECONDS = 10.0
POLL_SECONDS = 0.1


class Hub:
    """The server; a context. Requests without the token are not answered."""

    def __init__(self, host: str, token: str, clock: Callable[[], float] = time.time) -> None:
        self.words: dict[str, Any] = {}
        words = self.words

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    asked = json.loads(line)
                    if asked.get("token") != token:
                        return
                    if "set" in asked:
                        words[asked["set"]] = asked["value"]
                    answer = {"time": clock(), "value": words.get(asked.get("get", ""))}
                    if "count" in asked:
                        answer["value"] = sum(key.startswith(asked["count"]) for key in list(words))
                    self.wfile.write(json.dumps(answer).encode() + b"\n")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            request_queue_size = 1024

        self.server = Server((host, 0), Handler)
        self.port = int(self.server.server_address[1])

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, name="hub", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Guest:
    """A node's connection to the hub. OSError when it can't be reached, or went away."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self.token = token
        self.socket = socket.create_connection((host, port), ASK_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lines = self.socket.makefile("rb")

    def ask(self, **words: Any) -> dict[str, Any]:
        """One request; the answer has the hub's time [s]."""
        self.socket.sendall(json.dumps({**words, "token": self.token}).encode() + b"\n")
        line = self.lines.readline()
        if not line:
            raise ConnectionError("the first node's preflight process closed the connection")
        return dict(json.loads(line))

    def tell(self, key: str, value: Any) -> None:
        """Leave a word."""
        self.ask(set=key, value=value)

    def word(self, key: str, until: float) -> Any:
        """A word of another's, waited for until a moment of time.monotonic(); None: it never came."""
        while (value := self.ask(get=key)["value"]) is None and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return value

    def together(self, name: str, me: str, number: int, until: float) -> int:
        """Wait until `number` guests are at this point, or until a moment; returns how many came."""
        self.tell(f"{name}/{me}", True)
        while (there := int(self.ask(count=f"{name}/")["value"])) < number and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return there
