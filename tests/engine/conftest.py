"""Engines in this process: tiny models, stepped by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_models import write_tiny

from miles.engine.engine import Engine
from miles.engine.options import EngineOptions
from miles.engine.protocol import parse_generate
from miles.engine.sequence import Sequence


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture
def make_engine(tiny_folder: Path) -> Callable[..., Engine]:
    def make(**options: Any) -> Engine:
        return Engine(EngineOptions(**{"folder": str(tiny_folder), "skip_tokenizer_init": True, "context_length": 256, **options}))

    return make


def submit(engine: Engine, done: list[Sequence], prompt: list[int], rid: str | None = None, **fields: Any) -> None:
    """Queues one request; keyword arguments that are no sampling parameters go to the body."""
    top = {name: fields.pop(name) for name in ("logprob_start_len", "return_routed_experts", "extra_key") if name in fields}
    body = {"input_ids": prompt, "sampling_params": {"ignore_eos": True, **fields}, "return_logprob": True, **top}
    if rid is not None:
        body["rid"] = rid
    engine.add(parse_generate(body, engine.limits)[0], done.append)


def drain(engine: Engine) -> None:
    """Steps until nothing is left."""
    while engine.scheduler.busy:
        assert engine.step()
