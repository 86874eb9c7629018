"""`make quickstart-slurm`: a recipe as a heterogeneous job of a private Slurm, and the same on this machine without Slurm. Are the weights the same, bit for bit?

    python -m miles.slurm.minicluster.same_bits RECIPE FOLDER [--reference RUN] [WORDS ...]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from miles.config.compose import load_config
from miles.config.exits import WRONG, UserError
from miles.data.store.files import checksum
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster.cluster import Cluster
from miles.slurm.minicluster.folder import ClusterError

NODES = {"train": 2, "infer": 1, "cpu": 0}
WORLD = ["train.num_nodes=2", "train.num_gpus_per_node=1"]
HET = [
    "cluster.executor=slurm", "cluster.placement=het", "cluster.groups.all.time=120",
    "cluster.groups.train.partition=gb300", "cluster.groups.train.gpu_type=gb300", "cluster.groups.train.gpus_per_node=4",
    "cluster.groups.rollout.partition=h200", "cluster.groups.rollout.gpu_type=h200",
]  # fmt: skip
WEIGHTS = "model.safetensors"
FAILED = 1


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def run(words: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> int:
    """`miles-submit run`, or the same run's rest if it was interrupted; its exit code."""
    began = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "miles.cli", "run", *words, "--run-dir", str(folder)], env=environment).returncode
    say(f"{folder}: exit code {code} after {time.monotonic() - began:.0f} s")
    return code


def on_slurm(words: list[str], folder: Path) -> int:
    """Two nodes train, one of another partition and GPU type generates; the cluster is gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix="miles-slurm-", dir="/tmp"))
    try:
        with Cluster(place, nodes=NODES) as cluster:
            say(f"a private Slurm {cluster.version}: {cluster.run(['sinfo', '-h', '-o', '%P: %N with %G']).stdout.strip()}".replace("\n", ", "))
            return run([*words, *HET, "--wait"], folder, cluster.env())
    finally:
        shutil.rmtree(place, ignore_errors=True)


def weights(folder: Path) -> Path:
    """The final weights of a run. UserError where there are none."""
    path = RunDir(folder).hf / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: not there; the run {folder} is not finished, or exports no weights (checkpoint.save_hf)")
    return path


def ranks(folder: Path) -> int:
    """Trainer ranks of a run. UserError where there is no run."""
    path = RunDir(folder).run_yaml
    if not path.is_file():
        raise UserError(f"{folder}: no run is there; name the directory of a finished run")
    train = load_config([path]).train
    return int(train.num_nodes * train.num_gpus_per_node)


def compare(one: Path, other: Path) -> int:
    """Say whether two runs have the same final weights; 0 if they do."""
    first, second = weights(one), weights(other)
    same = first.read_bytes() == second.read_bytes()
    for path in (first, second):
        print(f"{path}: {path.stat().st_size} bytes, xxh3 {checksum(path)}")
    print("the final weights are equal, bit for bit" if same else "THE FINAL WEIGHTS DIFFER")
    return 0 if same else FAILED


def main(arguments: list[str]) -> int:
    """Both runs, then the verdict; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m miles.slurm.minicluster.same_bits", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", help="such as recipes/quickstart")
    parser.add_argument("folder", type=Path, help="run directories are made in it: slurm, and local unless a reference is given")
    parser.add_argument("--reference", type=Path, help="a finished run of the same recipe with two trainer ranks, in place of a new one")
    parser.add_argument("words", nargs="*", help="further settings of both runs")
    given = parser.parse_intermixed_args(arguments)
    words = [given.recipe, *given.words]
    try:
        if given.reference is not None:
            weights(given.reference)
            if (found := ranks(given.reference)) != 2:
                raise UserError(f"{given.reference}: has {found} trainer rank(s); the sum of gradients, and so the bits, depend on them: compare with a run of 2")
        if code := on_slurm([*words, *WORLD], given.folder / "slurm"):
            return code
        reference = given.reference or given.folder / "local"
        if given.reference is None and (code := run([*words, "train.num_gpus_per_node=2"], reference)):
            return code
        return compare(given.folder / "slurm", reference)
    except UserError as error:
        say(f"error: {error}")
        return WRONG
    except ClusterError as error:
        say(f"the private Slurm did not start: {error}")
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
