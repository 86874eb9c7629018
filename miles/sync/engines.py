"""The engines that a transport serves: the same call to all of them at once, failures by name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from miles.config.exits import TryAgain
from miles.engine.client import EngineClient, EngineError
from miles.sync.contract import SyncError

PauseMode = Literal["abort", "retract"]


class Engines:
    """Engines at these addresses (http://host:port), with the run's token. Calls block; engines answer concurrently.

    may_leave: one that is lost is no failure; it goes from `urls` to `lost`, and the others go on.
    """

    def __init__(self, urls: Sequence[str], token: str, timeout: float = 600.0, may_leave: bool = False) -> None:
        self.urls = list(urls)
        self.lost: list[str] = []
        self.may_leave = may_leave
        self._token = token
        self._timeout = timeout

    def call(self, function: Callable[[EngineClient], Awaitable[Any]]) -> list[Any]:
        """Results of function(client) for every engine that is left, in order. After all have answered, raises TryAgain naming those that are lost, else SyncError naming those that refuse."""

        async def one(url: str) -> Any:
            async with EngineClient(url, self._token, timeout=self._timeout) as client:
                return await function(client)

        async def everyone() -> list[Any]:
            return await asyncio.gather(*(one(url) for url in self.urls), return_exceptions=True)

        results = asyncio.run(everyone())
        failed: list[str] = []
        lost: dict[str, str] = {}
        for url, result in zip(self.urls, results, strict=True):
            if isinstance(result, EngineError):
                if result.status == 0 or result.status >= 500:  # gone, or falling
                    lost[url] = f"engine {url}: {result}"
                else:
                    failed.append(f"engine {url}: {result}")
            elif isinstance(result, BaseException):
                raise result
        if lost and not self.may_leave:
            raise TryAgain("; ".join(lost.values()))  # the attempt is over, and the next one has new engines
        if failed:
            raise SyncError("; ".join(failed))
        results = [result for url, result in zip(self.urls, results, strict=True) if url not in lost]
        self.lost += lost
        self.urls = [url for url in self.urls if url not in lost]
        return results

    def pause(self, mode: PauseMode) -> bool:
        """Pause generation and empty prefix caches; returns whether they are empty.

        abort: requests end, caches are empty afterwards. retract: requests wait and are prefilled anew under the new weights; an
        engine with waiting requests refuses to flush, so its update must not ask for a flush either.
        """
        self.call(lambda client: client.pause(mode))
        if mode == "abort":
            self.call(lambda client: client.flush())
            return True
        return all(self.call(_try_flush))

    def verify(self, checksum: str, version: int) -> None:
        """Raise SyncError unless every engine serves this version with weights of this checksum.

        The embedded engine hashes the tensors as the trainer does. SGLang hashes its own fused parameters, which nobody else has:
        there all engines must agree with one another.
        """
        found = self.call(_identity)
        wrong = [
            f"engine {url} serves weight version {has_version}, not {version}"
            for url, (_, has_version, _) in zip(self.urls, found, strict=True)
            if has_version != str(version)
        ]
        wrong += [
            f"engine {url} holds weights {whole}, the trainer {checksum}"
            for url, (kind, _, whole) in zip(self.urls, found, strict=True)
            if kind == "miles" and whole != checksum
        ]
        others = {whole for kind, _, whole in found if kind != "miles"}
        if len(others) > 1:
            wrong.append("engines disagree about their weights: " + ", ".join(f"{url} has {whole}" for url, (_, _, whole) in zip(self.urls, found, strict=True)))
        if wrong:
            raise SyncError("; ".join(wrong))

    def resume(self) -> None:
        """Let generation go on."""
        self.call(lambda client: client.resume())


async def _try_flush(client: EngineClient) -> bool:
    try:
        await client.flush(timeout=0)
    except EngineError as error:
        if error.status != 400:
            raise
        return False
    return True


async def _identity(client: EngineClient) -> tuple[str, str, str]:
    info = await client.server_info()
    model = await client.model_info()
    sums = await client.checksums()
    return str(info.get("engine", "sglang")), str(model.get("weight_version")), str(sums["per_engine_checksum"])
