"""Processes that score groups, so that sympy and users' functions neither block the event loop nor lack the main thread for alarms.

A score travels back as a value or as (exception type, message): exceptions of users' modules need not be picklable. Each process
has a pipe of its own, so that what ended it is known: a signal (out of memory, a crash in native code) is not the user's fault.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import multiprocessing
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from miles.config.exits import AGAIN, TryAgain, UserError
from miles.config.schema import Reward, RunConfig
from miles.data.sample import Draw, Sample
from miles.rollout.builtin_rewards import BY_NAME, RewardContext, boxed
from miles.rollout.imports import load_function

GRACE_SECONDS = 1.0  # rewards that keep to the timeout by themselves come first
Answer = tuple[Any, ...]  # ("scores", what the function returned), or ("error", exception type, message)

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


class TooSlow(Exception):
    """A reward function took longer than its timeout."""


async def within(seconds: float, work: Awaitable[Any]) -> Any:
    """What `work` gives. Raises TooSlow after so many seconds; a TimeoutError of the work's own passes as it is."""
    try:
        async with asyncio.timeout(seconds) as clock:
            return await work
    except TimeoutError:
        if clock.expired():
            raise TooSlow from None
        raise


class RewardPool:
    """At most `size` processes that score with one reward function; they start as groups need them, and end with their parent."""

    def __init__(self, options: Reward, config: RunConfig, section: str, size: int) -> None:
        self._arguments = (options, config, section)
        self._timeout = options.timeout + GRACE_SECONDS
        self._places = asyncio.Semaphore(size)
        self._threads = ThreadPoolExecutor(size, "reward")  # one waits for each process
        self._idle: list[_Process] = []
        self._all: list[_Process] = []

    def warm(self) -> None:
        """Start one process; it imports what it will need while the engines start."""
        if not self._all:
            self._idle.append(self._start())

    async def score(self, draw: Draw, samples: list[Sample]) -> Any:
        """The function's answer. Raises UserError with the exception that it raised, or when it ends its process; TooSlow (time
        in the queue, and of starting a process, does not count); TryAgain when its process is killed."""
        loop = asyncio.get_running_loop()
        async with self._places:
            process = self._idle.pop() if self._idle else self._start()
            try:
                await loop.run_in_executor(self._threads, process.wait_ready)
                kind, *answer = await within(self._timeout, loop.run_in_executor(self._threads, process.ask, draw, samples))
            except BaseException:
                process.kill()  # it may be busy with what nobody waits for; its thread ends with it
                raise
            self._idle.append(process)
        if kind == "error":
            raise UserError(f"{answer[0]}: {answer[1]}")
        return answer[0]

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._all:
            process.kill()
        for process in self._all:
            process.join()
        self._all, self._idle = [], []
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> _Process:
        process = _Process(self._arguments)
        self._all.append(process)
        return process


class _Process:
    """One process that scores a group at a time. wait_ready and ask block."""

    def __init__(self, arguments: tuple[Reward, RunConfig, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *arguments))
        self._process.start()
        theirs.close()
        self._ready = False

    def wait_ready(self) -> None:
        """Until it has imported what it scores with. Raises like ask, and UserError when the function can't be found there."""
        if not self._ready:
            kind, *answer = self._receive()
            if kind == "error":
                raise UserError(f"{answer[0]}: {answer[1]}")
            self._ready = True

    def ask(self, draw: Draw, samples: list[Sample]) -> Answer:
        """Its answer. Raises UserError when the process ends itself, TryAgain when it is killed."""
        try:
            self._pipe.send((draw, samples))
        except BrokenPipeError:
            raise self._ended() from None
        return self._receive()

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()

    def join(self) -> None:
        """Until it has ended."""
        self._process.join()

    def _receive(self) -> Answer:
        try:
            answer: Answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None
        return answer

    def _ended(self) -> UserError | TryAgain:
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            return TryAgain(f"its process was killed by {signal.Signals(-code).name} (out of memory, or a crash in native code)")
        return UserError(f"its process ended with exit code {code}; a reward function must return")


def _serve(pipe: Connection, options: Reward, config: RunConfig, section: str) -> None:
    """Body of a process: says when it is ready, then answers group after group."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function = reward_function(options, section)
        package = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}.get((options.type or "").removeprefix("boxed_"))
        if package is not None and options.path is None:
            importlib.import_module(package)  # a second or more, better now than in the first group
    except Exception as error:  # whatever the import of a user's module raises
        pipe.send(_error(error))
        return
    pipe.send(("ready",))
    while True:
        try:
            draw, samples = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("scores", function(samples, RewardContext(draw, options, config))))
        except Exception as error:  # whatever a user's function raises is theirs to read; what it returns may not be picklable either
            pipe.send(_error(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a child"
    parent.join()
    os._exit(AGAIN)


def _error(error: Exception) -> Answer:
    return "error", type(error).__name__, " ".join(str(error).split())[:500]
