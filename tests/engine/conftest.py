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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture
def make_engine(tiny_folder: Path) -> Callable[..., Engine]:
    def make(**options: Any) -> Engine:
        return Engine(EngineOptions(**{"folder": str(tiny_folder), "skip_tokenizer_init": True, "context_length": 256, **options}))

    return make
