"""One undisturbed run that the others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import whole_runs as runs


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the tiny recipe."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.run(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two trainer ranks."""
    folder = tmp_path_factory.mktemp("undisturbed_two") / "run"
    runs.run(folder, *runs.TWO_RANKS)
    return folder
