"""The engines that one client suite runs against: the embedded one, started here as a process, and SGLang where its address is given.

MILES_TEST_SGLANG_URL (and MILES_TEST_SGLANG_TOKEN) name a running SGLang 0.5.15 on this host that serves a tiny random Qwen3-MoE
with --skip-tokenizer-init --enable-return-routed-experts; tests/gpu starts one and runs these files. MILES_TEST_EMBEDDED_OPTIONS adds
options of the embedded engine (a device, say).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_models import write_sibling, write_tiny

from miles.engine.client import EngineClient

TOKEN = "contract-token"


@dataclass
class Served:
    """An engine under test. `other` is a folder with other weights for the same model; `exact`: batch-invariant mode."""

    kind: str
    url: str
    token: str
    folder: Path
    other: Path
    exact: bool = False

    def run(self, body: Callable[[EngineClient], Awaitable[Any]]) -> Any:
        """Runs an async function with a client."""

        async def inner() -> Any:
            async with EngineClient(self.url, self.token, timeout=120.0) as client:
                return await asyncio.wait_for(body(client), 240.0)

        return asyncio.run(inner())


def start_embedded(folder: Path, log: Path, *options: str, token: str = TOKEN) -> tuple[subprocess.Popen[str], str]:
    """A real engine process on loopback; returns it and its address."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MILES_")} | {"MILES_TOKEN": token, "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "miles.run.engine", str(folder), "--port", "0", "--skip-tokenizer-init", *options],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=env,
        )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "ready at" in line:
            return process, line.split()[-1]
    raise AssertionError(f"the engine ended with {process.wait()}: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session", params=["sglang" if "MILES_TEST_SGLANG_URL" in os.environ else "embedded"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("contract")
    if request.param == "sglang":
        url, token = os.environ["MILES_TEST_SGLANG_URL"], os.environ.get("MILES_TEST_SGLANG_TOKEN", "")

        async def served_folder() -> Path:
            async with EngineClient(url, token) as client:
                return Path((await client.model_info())["model_path"])

        folder = asyncio.run(served_folder())
        yield Served("sglang", url, token, folder, write_sibling(root / "other", folder, seed=7))
        return
    folder = write_tiny(root / "model", seed=0)
    other = write_tiny(root / "other", seed=7)
    more = os.environ.get("MILES_TEST_EMBEDDED_OPTIONS", "").split()
    process, url = start_embedded(folder, root / "engine.log", "--max-running-requests", "16", "--context-length", "4096", *more)
    yield Served("embedded", url, TOKEN, folder, other, exact="--no-batch-invariant" not in more)
    process.terminate()
    assert process.wait(timeout=60) == 0, (root / "engine.log").read_text()[-2000:]
