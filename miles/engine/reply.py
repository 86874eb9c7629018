"""Large replies of /generate: a bound on the bytes in flight, and reading them without making text of what is no text."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
from collections import deque
from collections.abc import Iterator
from typing import Any

import httpx
import orjson

LARGE_BYTES = 1 << 20
ROUTES = b'"routed_experts":"'


class ByteBudget:
    """How many bytes of replies may be under way at once. What is larger than all of it passes alone. First come, first served."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Wait for room for `size` bytes."""
        if not self._waiting and self._fits(size):
            self.used += size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(size)
            raise

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count `size` bytes that are there already: others wait for them, this one for nobody."""
        self.used += size
        try:
            yield
        finally:
            self.give(size)

    def give(self, size: int) -> None:
        """Give them back."""
        self.used -= size
        self._next()

    def _next(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.cancelled():
                self.used += size
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        return self.used == 0 or self.used + size <= self.limit


async def read_reply(response: httpx.Response, budget: ByteBudget | None) -> Any:
    """The JSON of a response whose body has not been read yet. routed_experts are bytes (a view of the body), all other texts are str."""
    size = int(response.headers.get("content-length", 0))
    if budget is not None:
        await budget.take(size)
    try:
        if size < LARGE_BYTES or "content-encoding" in response.headers:
            return parse_reply(await response.aread())
        body, end = mmap.mmap(-1, size), 0  # pages as they fill, given back at once; joining chunks would hold them twice
        async for chunk in response.aiter_raw():
            body[end : end + len(chunk)] = chunk
            end += len(chunk)
        return parse_reply(body)
    finally:
        if budget is not None:
            budget.give(size)


def parse_reply(body: bytes | mmap.mmap) -> Any:
    """orjson.loads, but routed_experts are views of the body: as text each would be checked and copied, and they are nearly all of it.

    Inside a JSON text the quotes of ROUTES would stand behind backslashes, so it is found as a key only.
    """
    paused = gc.isenabled()
    gc.disable()  # a log-prob is a list, and looking for cycles among a hundred thousand of them costs as much as making them
    try:
        return _parse(body)
    finally:
        if paused:
            gc.enable()


def _parse(body: bytes | mmap.mmap) -> Any:
    view, rest, routes, at = memoryview(body), [], [], 0
    while (start := body.find(ROUTES, at)) >= 0:
        start += len(ROUTES)
        end = body.find(b'"', start)
        if body.find(b"\\", start, end) >= 0:
            return orjson.loads(view)  # written with escapes
        rest.append(view[at:start])
        routes.append(view[start:end])
        at = end
    if not routes:
        return orjson.loads(view)
    parsed = orjson.loads(b"".join([*rest, view[at:]]))
    for reply, experts in zip(_with_routes(parsed), routes, strict=True):
        reply["meta_info"]["routed_experts"] = experts
    return parsed


def _with_routes(parsed: Any) -> list[dict[str, Any]]:
    return [reply for reply in (parsed if isinstance(parsed, list) else [parsed]) if reply["meta_info"].get("routed_experts") is not None]
