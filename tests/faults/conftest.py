"""Long tests of faults, apart from `make test`: `make test-faults SEED=1 COUNT=100` (COUNT: kills; the others take their share of it)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / folder) for folder in ("end_to_end", "slurm", "convert"))]

import shared  # noqa: E402
import whole_runs as runs  # noqa: E402
from calm_jobs import calm_steps  # noqa: E402, F401
from calm_runs import calm, calm_two  # noqa: E402, F401
from clusters import cluster_or_skip  # noqa: E402

from miles.slurm.minicluster import Cluster, Settings  # noqa: E402


@pytest.fixture(scope="session")
def seed() -> int:
    """What all moments are drawn from."""
    return int(os.environ.get("SEED", "1"))


@pytest.fixture(scope="session")
def count() -> int:
    """How many kills; other tests take their share."""
    return int(os.environ.get("COUNT", "100"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[int], shared.Undisturbed]:
    """The undisturbed run of so many trainer ranks, made once."""
    made: dict[int, shared.Undisturbed] = {}

    def get(ranks: int) -> shared.Undisturbed:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"undisturbed_{ranks}") / "run"
            began = shared.now()
            with shared.environment(folder.parent / "generated"):
                runs.run(folder, *shared.words(ranks))
            made[ranks] = shared.Undisturbed(folder, shared.now() - began)
            shared.say(f"undisturbed run, {ranks} trainer rank(s): {made[ranks].seconds:.0f} s")
        return made[ranks]

    return get


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A private Slurm of a module's own, with NODES and of VERSION, and with time enough to save on a busy machine."""
    nodes = getattr(request.module, "NODES", {"train": 2, "infer": 2, "cpu": 0})
    with cluster_or_skip(nodes=nodes, version=getattr(request.module, "VERSION", None), settings=Settings(grace_seconds=60, kill_wait_seconds=60)) as made:
        yield made
