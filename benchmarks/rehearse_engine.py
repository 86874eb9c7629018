"""An engine without a model: real HTTP, SGLang 0.5.15's reply fields, bodies made before the run so that answering costs next to nothing.

`python -m benchmarks.rehearse_engine FOLDER LONGEST PROMPT PACE`, as role `engine` of a run (MILES_* in the environment).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from miles.rollout.tokenizer import Tokenizer
from miles.rollout.worker import route_layout
from miles.run.coordinator import Coordinator
from miles.run.role import Role, load_run, main

# Lengths of responses, as shares of the longest: a few long ones have most of the tokens.
SHARES = (1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625)


def make_replies(folder: Path, longest: int, prompt: int, routes: bool) -> list[tuple[int, bytes]]:
    """(response length [tokens], JSON of one reply) for each of SHARES."""
    return [(length, _reply(folder, length, prompt, routes)) for length in (max(1, int(share * longest)) for share in SHARES)]


def _reply(folder: Path, length: int, prompt: int, routes: bool) -> bytes:
    random = np.random.default_rng(length)
    vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    output = random.integers(2, vocabulary, length).tolist()
    logprobs = (-random.exponential(0.7, length)).astype(np.float32).astype(float).tolist()  # a float32's digits as a double's, as SGLang writes them
    meta: dict[str, Any] = {
        "id": "0123456789abcdef0123456789abcdef", "finish_reason": {"type": "length", "length": length}, "prompt_tokens": prompt,
        "completion_tokens": length, "reasoning_tokens": 0, "cached_tokens": prompt - 1, "cached_tokens_details": None, "weight_version": "default",
        "num_retractions": 0, "dp_rank": None, "e2e_latency": 12.5, "response_sent_to_client_ts": 1700000000.0,
        "output_token_logprobs": [[value, token, None] for value, token in zip(logprobs, output, strict=True)],
        "output_token_logprobs_length": length, "input_token_logprobs": [],
    }  # fmt: skip
    if routes:
        (layers, top_k), dtype = route_layout(folder)
        experts = random.integers(0, np.iinfo(dtype).max + 1, (prompt + length - 1, layers, top_k)).astype("<i4")
        meta["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
    return orjson.dumps({"text": Tokenizer(folder).decode(output), "output_ids": output, "meta_info": meta})


class Server:
    """HTTP/1.1 with keep-alive, just enough for an engine's client. `last`: when the last reply had gone out [Unix seconds]."""

    def __init__(self, replies: list[tuple[int, bytes]], pace: float) -> None:
        self.replies, self.pace, self.last = replies, pace, 0.0

    async def serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        tasks = set()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.create_task(self._connection(connection))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _connection(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        waiting = b""
        with connection:
            while True:
                while b"\r\n\r\n" not in waiting:
                    if not (more := await loop.sock_recv(connection, 1 << 16)):
                        return
                    waiting += more
                head, _, waiting = waiting.partition(b"\r\n\r\n")
                fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
                size = int(fields.get(b"content-length", b"0"))
                while len(waiting) < size:
                    waiting += await loop.sock_recv(connection, 1 << 16)
                body, waiting = waiting[:size], waiting[size:]
                route = head.split(b" ", 2)[1]
                pieces = [part async for part in self._answer(route, body)]
                status = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {sum(map(len, pieces))}\r\n\r\n"
                for piece in (status.encode(), *pieces):
                    await loop.sock_sendall(connection, piece)
                if route == b"/generate":
                    self.last = time.time()

    async def _answer(self, route: bytes, body: bytes) -> Any:
        if route == b"/last":
            yield orjson.dumps({"last": self.last})
        elif route == b"/generate":
            chosen = list(self._choose(orjson.loads(body)))
            await asyncio.sleep(self.pace * max(length for length, _ in chosen))
            for index, (_, reply) in enumerate(chosen):
                yield b"," if index else b"["
                yield reply
            yield b"]"
        else:
            yield orjson.dumps({"engine": "rehearsal", "version": "0.5.15"})

    def _choose(self, request: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
        """A reply for each prompt, by its seed: the same in every run."""
        for params in request["sampling_params"]:
            length, reply = self.replies[params["sampling_seed"] % len(self.replies)]
            assert length <= params["max_new_tokens"], "no more than was asked for"
            yield length, reply


def run(role: Role) -> None:
    """Body of the role."""
    folder, longest, prompt, pace = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    server = Server(make_replies(folder, longest, prompt, load_run(role.run_dir).rollout.return_routed_experts), pace)
    service = Coordinator(role)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        service.register(url=f"http://127.0.0.1:{listener.getsockname()[1]}", pid=os.getpid())
        asyncio.run(server.serve(listener))


if __name__ == "__main__":
    main("engine", run)
