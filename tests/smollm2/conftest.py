"""The real SmolLM2-135M-Instruct: MILES_SMOLLM2_MODEL names its folder (`python -m miles.recipes.smollm2 FOLDER` makes it)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NAMED = os.environ.get("MILES_SMOLLM2_MODEL")


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The Hugging Face folder, absolute. Skips where none is named; one that is named must be there."""
    if not NAMED:
        pytest.skip("MILES_SMOLLM2_MODEL does not name SmolLM2's folder (make smollm2 does all of it)")
    folder = Path(NAMED).resolve()
    assert (folder / "model.safetensors").is_file(), f"{folder} is not SmolLM2's folder: python -m miles.recipes.smollm2 {folder}"
    return folder
