"""The engines of one worker: requests go to the least busy one, samples of a group in one HTTP call, hiccups are retried."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from miles.config.exits import TryAgain, UserError
from miles.engine.client import EngineClient, EngineError
from miles.engine.reply import ByteBudget

TRIES = 4
PAUSE_SECONDS = 0.25
REPLY_BYTES = 128 << 20  # of replies that are read at a time (one of a long response with routes is 84 MB), and of routes that are written
RECORDED = (
    "engine", "version", "device", "dtype", "attention_backend", "sampling_backend", "batch_invariant", "enable_deterministic_inference", "max_running_requests",
)  # fmt: skip


class Engines:
    """`generate` of single samples, coalesced: what a group asks for in one turn of the event loop is one call to one engine.

    Engines are looked for when the first sample needs one: a user's generate function may do without.
    """

    def __init__(self, find: Callable[[], Coroutine[Any, Any, list[EngineClient]]], **fields: Any) -> None:
        """find: this worker's engines. fields: go into every /generate body (such as return_routed_experts)."""
        self._find = find
        self._fields = fields
        self.budget = ByteBudget(REPLY_BYTES)
        self._found = asyncio.Lock()
        self._clients: list[EngineClient] = []
        self._described: list[dict[str, Any]] = []
        self._busy: list[int] = []
        self._waiting: dict[int, list[tuple[list[int], dict[str, Any], asyncio.Future[Any]]]] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(self, group: int, input_ids: list[int], sampling_params: dict[str, Any]) -> dict[str, Any]:
        """SGLang's reply to one prompt i32 [L], with log-probs, and the address that gave it under "engine".

        Raises UserError for what the engine refuses (400), TryAgain when it stays away.
        """
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(group, [])
        waiting.append((input_ids, sampling_params, future))
        if len(waiting) == 1:
            asyncio.get_running_loop().call_soon(self._flush, group)
        del waiting  # the siblings' futures are in it, and with them replies that are used already
        return await future

    def _flush(self, group: int) -> None:
        waiting = self._waiting.pop(group)
        # With routes a reply of one sample is tens of megabytes, and nothing of a reply is used before all of it is there.
        size = 1 if self._fields.get("return_routed_experts") else len(waiting)
        for start in range(0, len(waiting), size):
            task = asyncio.ensure_future(self._call(group, waiting[start : start + size]))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _call(self, group: int, waiting: list[tuple[list[int], dict[str, Any], asyncio.Future[Any]]]) -> None:
        try:
            replies = await self._send(group, [ids for ids, _, _ in waiting], [params for _, params, _ in waiting])
        except BaseException as error:
            for _, _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, _, future), reply in zip(waiting, replies, strict=True):
            if not future.done():
                future.set_result(reply)

    async def _send(self, group: int, ids: list[list[int]], params: list[dict[str, Any]]) -> list[dict[str, Any]]:
        body = {"input_ids": ids, "sampling_params": params, "return_logprob": True, **self._fields}
        await self._look()
        for again in range(TRIES):
            index = min(range(len(self._clients)), key=lambda i: (self._busy[i], i))
            client = self._clients[index]
            self._busy[index] += len(ids)
            try:
                replies = await client.generate(body)
                why = next((_abort(reply) for reply in replies if _abort(reply)), None)
                if why is None:
                    return [{**reply, "engine": client.url} for reply in replies]
            except EngineError as error:
                if 400 <= error.status < 500:
                    raise UserError(f"draw {group}: the engine refuses the request: {error.message} If it is too long, lower max_response_len of its sampling section, or shorten the prompt") from error
                why = str(error)
            finally:
                self._busy[index] -= len(ids)
            if again + 1 < TRIES:
                await asyncio.sleep(PAUSE_SECONDS * 2**again)
        raise TryAgain(f"engine {client.url} failed {TRIES} times: {why}")

    async def _look(self) -> None:
        async with self._found:
            if not self._clients:
                self._clients = await self._find()
                for client in self._clients:
                    client.budget = self.budget
                self._busy = [0] * len(self._clients)

    async def describe(self) -> list[dict[str, Any]]:
        """What a manifest records of each engine that was used: address, version, kernels."""
        if not self._described:
            for client in self._clients:
                try:
                    info = await client.server_info()
                except EngineError as error:
                    raise TryAgain(str(error)) from error
                self._described.append({"address": client.url, **{name: info[name] for name in RECORDED if info.get(name) is not None}})
        return self._described

    async def close(self) -> None:
        """Close connections."""
        for client in self._clients:
            await client.close()


def _abort(reply: dict[str, Any]) -> str | None:
    """Why the engine gave up on a request, None when it ended by itself."""
    reason = reply["meta_info"].get("finish_reason") or {}
    return str(reason.get("message") or "aborted") if reason.get("type") == "abort" else None
