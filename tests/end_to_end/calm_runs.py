"""Undisturbed runs of the tiny recipe, as fixtures for the folders whose tests disturb one."""

from __future__ import annotations

from pathlib import Path

import pytest
import whole_runs as runs


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    runs.run(folder)
    return folder


@pytest.fixture(scope="session")
def calm_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two trainer ranks."""
    folder = tmp_path_factory.mktemp("calm_two") / "run"
    runs.run(folder, *runs.TWO_RANKS)
    return folder
