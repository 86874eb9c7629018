"""`miles-submit minicluster`: up in one process, used by others, down in a third."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.cli.minicluster import FIRST_RUN
from miles.slurm.minicluster.processes import look


@pytest.fixture
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="miles-slurm-", dir="/tmp"))
    yield place / "c"
    if (place / "c").exists():
        miles("down", "--dir", str(place / "c"))
    shutil.rmtree(place)


def miles(*words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    variables = os.environ | ({"PATH": path} if path is not None else {})
    return subprocess.run([sys.executable, "-m", "miles.cli", "minicluster", *words], capture_output=True, text=True, env=variables, timeout=180)


def test_up_use_status_down(folder: Path) -> None:
    up = miles("up", "--dir", str(folder), "--nodes", "train=2,infer=1,cpu=1")
    if up.returncode == 78 and not (os.environ.get("CI") or os.environ.get("MILES_REQUIRE_SLURM")):
        pytest.skip(f"NO SLURM, NOT TESTED: {up.stderr}")
    assert up.returncode == 0, up.stderr
    assert up.stdout == f"export SLURM_CONF={folder}/conf/slurm.conf\n"
    assert "gpu:gb300:4" in up.stderr
    assert f"after the export above: {FIRST_RUN}\n" in up.stderr
    nodes = subprocess.run(["bash", "-c", up.stdout + "srun -p gb300 -N2 printenv SLURMD_NODENAME"], capture_output=True, text=True, check=True).stdout
    assert sorted(nodes.split()) == ["train0", "train1"]
    status = json.loads(miles("status", "--dir", str(folder), "--json").stdout)
    assert status["missing"] == []
    assert set(status["daemons"]) == {"keeper", "munged", "slurmctld", "slurmd-train0", "slurmd-train1", "slurmd-infer0", "slurmd-cpu0"}
    again = miles("up", "--dir", str(folder))
    assert again.returncode == 78
    assert "a cluster is there" in again.stderr
    assert miles("down", "--dir", str(folder)).returncode == 0
    assert not folder.exists()
    assert not [pid for pid in status["daemons"].values() if look(pid)]
    for command in ("down", "status"):
        missing = miles(command, "--dir", str(folder))
        assert missing.returncode == 78
        assert len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--version", "19.05"), "Slurm 19.05 is not here"),
        (("--version", "new"), "Slurm version 'new': give it like 22.05"),
        (("--nodes", "train"), "'train' is no GROUP=COUNT"),
        (("--nodes", "gpu=2"), "groups are train, infer, cpu"),
        (("--nodes", "train=0,infer=0,cpu=0"), "none is left"),
    ],
    ids=["version", "number", "count", "group", "none"],
)
def test_mistakes_are_one_line(folder: Path, words: tuple[str, str], text: str) -> None:
    done = miles("up", "--dir", str(folder), *words)
    assert done.returncode == 78
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not folder.exists()


def test_absent_packages_are_named_with_the_command(folder: Path) -> None:
    """With nothing in PATH at least the commands are missing; the daemons' folders are looked into all the same."""
    done = miles("up", "--dir", str(folder), path=str(folder))
    assert done.returncode == 78
    assert "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge libpmix2" in done.stderr
    assert len(done.stderr.splitlines()) == 1
