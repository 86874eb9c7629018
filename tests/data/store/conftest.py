"""Samples for the store's tests, and a run directory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from store_samples import make_sample as _make

from miles.data.sample import Sample
from miles.data.store.run_dir import RunDir


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    return _make


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")
