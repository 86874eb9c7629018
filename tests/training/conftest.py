import sys
from pathlib import Path

import pytest

from miles.training.distributed import start_ranks, stop_ranks

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def ranks():
    """This process as the only rank."""
    yield start_ranks(0, 1, threads=1, seed=7)
    stop_ranks()
