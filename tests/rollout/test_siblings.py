"""When a sample fails, its siblings end before their places are free and their file is closed; so do threads of cancelled tasks."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.config.compose import load_config
from miles.config.exits import UserError
from miles.data.sample import Draw, Sample
from miles.data.store.epoch import new_epoch
from miles.data.store.run_dir import RunDir
from miles.rollout.aside import Aside
from miles.rollout.engines import Engines
from miles.rollout.generate import GenerateContext
from miles.rollout.threads import in_thread
from miles.rollout.tokenizer import Tokenizer
from miles.rollout.worker import Worker

JOB = {"kind": "rollout", "step": 1, "weight_version": 0, "weight_checksum": "aa"}


async def nowhere(*_: Any) -> Any:
    raise AssertionError("no service and no engine is asked")


def test_siblings_of_a_sample_that_fails_end_first(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over: list[str] = []
    putting = threading.Event()
    put = Aside.put

    def put_slowly(aside: Aside, sample: Sample) -> None:
        putting.set()
        time.sleep(0.3)
        put(aside, sample)
        over.append("thread")

    async def generate(draw: Draw, sample: int, context: GenerateContext) -> Sample:
        if sample == 0:
            while not putting.is_set():
                await asyncio.sleep(0.01)
            raise LookupError("no tokens")
        if sample == 1:
            try:
                await asyncio.sleep(600)
            finally:
                over.append("sleeper")
        ones = np.ones(3, np.uint8)
        return Sample(draw.draw, sample, 1, np.arange(3, dtype=np.int32), 1, np.zeros(3, np.float32), ones, ones, routes=np.zeros((2, 2, 2), np.uint8))

    async def body() -> None:
        run = RunDir(tmp_path / "run")
        config = load_config(["recipes/tiny"], ["rollout.n_samples_per_prompt=3"])
        worker = Worker(config, run, 0, new_epoch(run), nowhere, Tokenizer(tokenizer_folder), Engines(nowhere), count=1)
        worker.generate = generate
        aside = Aside(tmp_path)
        with pytest.raises(UserError, match="LookupError: no tokens"):
            await worker._make(Draw(0, "1 + 1 =", "2"), worker._context(JOB), aside)
        assert sorted(over) == ["sleeper", "thread"]
        for _ in range(worker.capacity):
            await asyncio.wait_for(worker._places.acquire(), 30)
        aside.close()

    monkeypatch.setattr(Aside, "put", put_slowly)
    asyncio.run(body())


def test_a_cancelled_task_ends_with_its_thread() -> None:
    over: list[str] = []
    may_end = threading.Event()

    def slow() -> None:
        assert may_end.wait(60)
        over.append("thread")

    async def body() -> None:
        task = asyncio.create_task(in_thread(slow))
        for _ in range(2):
            await asyncio.sleep(0.05)
            task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert over == ["thread"]

    asyncio.run(body())
