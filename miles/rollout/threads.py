"""Calls in threads that are over when their task is, cancelled or not: what they use may be closed then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


async def in_thread(function: Callable[Arguments, Answer], *arguments: Arguments.args, **named: Arguments.kwargs) -> Answer:
    """function(*arguments, **named) in a thread. A task that is cancelled meanwhile ends when the thread has returned, since no thread can be stopped."""
    work = asyncio.get_running_loop().run_in_executor(None, partial(function, *arguments, **named))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from work.exception()
    return work.result()
