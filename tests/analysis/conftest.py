import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def lively(tmp_path_factory: pytest.TempPathFactory):
    """A planted run of 3 steps with routes, drafts, lag, tool outputs and several engines: its folder, and the truth of it."""
    from planted import plant

    folder = tmp_path_factory.mktemp("lively") / "run"
    return folder, plant(folder, ("lag", "routing"), (1.0, 0.2), 7, steps=3, sequences=32, response=64)
