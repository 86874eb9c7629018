"""The model of all cases, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.recipes.quickstart import build_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of the tiny recipe's model."""
    folder = tmp_path_factory.mktemp("tiny_model") / "model"
    build_tiny(folder, 1)
    return folder
