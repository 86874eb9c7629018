"""Waiting for an engine to be at work, however long a busy machine takes to get there."""

from __future__ import annotations

import asyncio

from miles.engine.client import EngineClient


async def until_running(client: EngineClient, count: int) -> None:
    """Wait until the engine makes tokens for so many requests."""
    while (await client._json("GET", "/v1/loads"))["loads"][0]["num_running_reqs"] < count:
        await asyncio.sleep(0.01)
