"""The embedded engine as a worker meets it: its server process, over HTTP, in calls of a group's samples each."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.child import environment, sampling
from benchmarks.workload import CALL, THREADS, Workload
from miles.engine.client import EngineClient

TOKEN = "benchmark"  # the server asks for one in every run, so it does here


@contextlib.contextmanager
def serve(folder: Path, batch_invariant: bool, context_length: int) -> Iterator[Callable[[Workload], float]]:
    """A server; call what it yields with a workload for the seconds from the first call to the last reply."""
    flags = ["--threads", str(THREADS), "--context-length", str(context_length), "--batch-invariant" if batch_invariant else "--no-batch-invariant"]
    process = subprocess.Popen(
        [sys.executable, "-m", "miles.run.engine", str(folder), "--port", "0", "--skip-tokenizer-init", *flags],
        env={**environment(), "MILES_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = next((line.split()[-1] for line in process.stdout if "ready at" in line), None)
        if url is None:
            raise RuntimeError(f"the engine ended with code {process.wait()}")
        with asyncio.Runner() as runner:
            client = EngineClient(url, TOKEN)
            try:
                yield lambda work: runner.run(_run(client, work))
            finally:
                runner.run(client.close())
    finally:
        process.terminate()
        process.wait()


async def _run(client: EngineClient, work: Workload) -> float:
    await client.flush()  # no prefix of an earlier turn may help
    began = time.perf_counter()
    calls = []
    for at in range(0, len(work.prompts), CALL):
        part = slice(at, at + CALL)
        calls.append(client.generate({"input_ids": work.prompts[part], "sampling_params": sampling(work.lengths[part], at), "return_logprob": True}))
    replies = [reply for call in await asyncio.gather(*calls) for reply in call]
    seconds = time.perf_counter() - began
    assert [len(reply["output_ids"]) for reply in replies] == work.lengths
    assert all(len(reply["meta_info"]["output_token_logprobs"]) == length for reply, length in zip(replies, work.lengths, strict=True))
    return seconds
