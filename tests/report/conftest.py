"""Run directories that several tests look at; made once a session."""

from __future__ import annotations

import pytest
from demo_run import demo_run

from miles.data.store.run_dir import RunDir


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run with equal bits everywhere."""
    return demo_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that is going on, with differing log-probs and torn last lines."""
    return demo_run(tmp_path_factory.mktemp("runs") / "noisy", rollouts=30, noise=3e-3, finished=False)
