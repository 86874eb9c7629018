"""Who may enter: generate calls wait while the engine is paused or about to change its weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Counts the calls inside. As in SGLang, an update of an engine that is not paused waits until all have left, while new ones
    queue behind it; during a pause it goes ahead at once. All methods run in one event loop."""

    def __init__(self) -> None:
        self.paused = False
        self.inside = 0
        self._writers = 0
        self._changed: asyncio.Future[None] | None = None
        self._control = asyncio.Lock()

    def _notify(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
        self._changed = None

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    async def enter(self) -> None:
        """Waits until generation may begin."""
        while self.paused or self._writers:
            await self._change()
        self.inside += 1

    def leave(self) -> None:
        """A call has ended."""
        self.inside -= 1
        if self.inside == 0:
            self._notify()

    async def drained(self) -> None:
        """Waits until nobody is inside."""
        while self.inside:
            await self._change()

    @asynccontextmanager
    async def control(self) -> AsyncIterator[None]:
        """Pause and continue, one at a time."""
        async with self._control:
            yield
            self._notify()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """An update of the weights."""
        if self.paused:
            async with self._control:
                yield
            return
        self._writers += 1
        try:
            while self.inside and not self.paused:
                await self._change()
            async with self._control:
                yield
        finally:
            self._writers -= 1
            self._notify()
