"""Private clusters for tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from miles.config.exits import UserError
from miles.slurm.minicluster import Cluster


def cluster_or_skip(**options: object) -> Cluster:
    """A cluster in a short folder of its own, not yet up. Without its packages: a skip that says why, or a failure where CI or MILES_REQUIRE_SLURM is set."""
    folder = Path(tempfile.mkdtemp(prefix="miles-slurm-", dir="/tmp"))
    try:
        return Cluster(folder, **options)  # type: ignore[arg-type]
    except UserError as error:
        shutil.rmtree(folder)
        if os.environ.get("CI") or os.environ.get("MILES_REQUIRE_SLURM"):
            pytest.fail(f"Slurm is required here: {error}")
        pytest.skip(f"NO SLURM, NOT TESTED: {error}")
