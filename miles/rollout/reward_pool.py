"""Processes that score groups, so that sympy and users' functions neither block the event loop nor lack the main thread for alarms.

A score travels back as a value or as (exception type, message): exceptions of users' modules need not be picklable.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from miles.config.exits import AGAIN, UserError
from miles.config.schema import Reward, RunConfig
from miles.data.sample import Draw, Sample
from miles.rollout.builtin_rewards import BY_NAME, RewardContext, boxed
from miles.rollout.imports import load_function

# Of the child: what it scores with.
_child: tuple[Callable[..., Any], Reward, RunConfig] | None = None


def reward_function(options: Reward, section: str) -> Callable[..., Any]:
    """The function that a Reward section names. Raises UserError."""
    if options.path:
        return load_function(options.path, f"{section}.path")
    name = (options.type or "").removeprefix("boxed_")
    if name not in BY_NAME:
        known = ", ".join(BY_NAME)
        raise UserError(f"{section}.type: no reward {options.type!r}; known are {known} (and boxed_ before each), or set {section}.path")
    return BY_NAME[name]


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def as_scored(samples: list[Sample], options: Reward) -> list[Sample]:
    """The samples as a reward function sees them: no routes, and with boxed_ only what the box holds."""
    only_box = options.path is None and (options.type or "").startswith("boxed_")
    return [replace(s, routes=None, response=boxed(s.response or "") if only_box else s.response) for s in samples]


class RewardPool:
    """`size` processes that score with one reward function; they start when warmed or with the first group, and end with their parent."""

    def __init__(self, options: Reward, config: RunConfig, section: str, size: int) -> None:
        self._arguments = (options, config, section)
        self._size = size
        self._pool: ProcessPoolExecutor | None = None

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._size, context, _initialise, self._arguments)
        return self._pool

    def warm(self) -> None:
        """Start the processes; each imports what it will need. A function that can't be found fails at the first group."""
        self._start().submit(os.getpid)

    async def score(self, draw: Draw, samples: list[Sample]) -> Any:
        """The function's answer. Raises UserError with the exception that it raised, or when its process dies."""
        try:
            kind, *answer = await asyncio.get_running_loop().run_in_executor(self._start(), _score, draw, samples)
        except BrokenProcessPool as error:
            raise UserError("its process died (out of memory, or a crash in native code)") from error
        if kind == "error":
            raise UserError(f"{answer[0]}: {answer[1]}")
        return answer[0]

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        if self._pool is not None:
            for child in multiprocessing.active_children():
                child.kill()
            # Waiting lets the pool unlink its semaphores; the children are gone, so it takes no time.
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _initialise(options: Reward, config: RunConfig, section: str) -> None:
    global _child
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _child = (reward_function(options, section), options, config)
    package = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}.get((options.type or "").removeprefix("boxed_"))
    if package is not None and options.path is None:
        importlib.import_module(package)  # a second or more, better now than in the first group


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a child"
    parent.join()
    os._exit(AGAIN)


def _score(draw: Draw, samples: list[Sample]) -> tuple[Any, ...]:
    assert _child is not None, "initialised"
    function, options, config = _child
    try:
        return "scores", function(samples, RewardContext(draw, options, config))
    except Exception as error:  # whatever a user's function raises is theirs to read
        return "error", type(error).__name__, " ".join(str(error).split())[:500]
