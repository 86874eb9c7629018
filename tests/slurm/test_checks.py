"""What is refused before anything is submitted, held against real Slurms: unknown names, too much of anything, options of newer versions."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from miles.cli.main import main
from miles.config.compose import configs_dir, dump_config, load_config
from miles.config.exits import OK, WRONG, UserError
from miles.config.schema import RunConfig
from miles.data.store.run_dir import RunDir
from miles.slurm import checks, records, site, start
from miles.slurm.minicluster import Cluster
from miles.slurm.submission import prepare

HET = [
    "cluster.executor=slurm", "cluster.placement=het", "cluster.groups.all.time=60",
    "cluster.groups.train={partition: gb300, gpu_type: gb300, gpus_per_node: 4}", "cluster.groups.rollout={partition: h200, gpu_type: h200, gpus_per_node: 8}",
]  # fmt: skip


@pytest.fixture
def here(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    return slurm


def config(*overrides: str) -> RunConfig:
    return load_config(["recipes/tiny"], [*HET, *overrides])


def errors(run: RunConfig, folder: Path) -> list[str]:
    return [str(finding) for finding in checks.refused(run, RunDir(folder), site.ask()) if finding.level == "error"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("cluster.groups.rollout.partition=h20", "cluster.groups.rollout.partition: no partition 'h20' in this cluster; did you mean h200?"),
        ("cluster.groups.train.partition=cpu", "cluster.groups.train.partition: partition cpu has no GPUs; set cluster.groups.train.partition=gb300"),
        ("cluster.groups.train.gpu_type=h200", "cluster.groups.train.gpu_type: no GPU of type 'h200' in partition gb300; set cluster.groups.train.partition=h200"),
        ("cluster.groups.train.gpu_type=gb30", "cluster.groups.train.gpu_type: no GPU of type 'gb30' in partition gb300; did you mean gb300?"),
        ("cluster.groups.train.gpus_per_node=8", "cluster.groups.train.gpus_per_node: 8 GPUs a node, but the nodes of partition gb300 have 4 gb300; set cluster.groups.train.gpus_per_node=4"),
        ("train.num_nodes=5", "cluster.groups.train.nodes: 5 nodes are needed, partition gb300 has 4 with 4 gb300; lower train.num_nodes"),
        ("cluster.groups.rollout.nodes=9", "cluster.groups.rollout.nodes: 9 nodes are needed, partition h200 has 4 with 8 h200; lower cluster.groups.rollout.nodes"),
        ("cluster.groups.train.constraint=x86_64", "cluster.groups.train.constraint: no node of partition gb300 has the feature 'x86_64'; there are aarch64"),
        ("cluster.groups.train.segment=1", "cluster.groups.train.segment: --segment needs Slurm 23.11, this is 22.05.8; leave it out; switches or constraint keep nodes together here"),
        ("cluster.groups.train.sbatch.stepmgr=null", "cluster.groups.train.sbatch.stepmgr: --stepmgr needs Slurm 24.05, this is 22.05.8; leave it out"),
        ("cluster.groups.train.container_image=/no/such.sqsh", "cluster.groups.train.container_image: /no/such.sqsh: no such file; import it first (docs/slurm.md), or name an image of a registry"),
    ],
)  # fmt: skip
def test_refused_by_name(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, line: str) -> None:
    """`run` ends with that line, and makes nothing."""
    assert command(monkeypatch, ["miles-submit", "run", "recipes/tiny", *HET, override, "--run-dir", str(tmp_path / "run")]) == WRONG
    idle = "warning: cluster.groups.rollout.nodes: 9 nodes are allocated, 8 of them run nothing; set it to 1, or leave it out\n" if "nodes=9" in override else ""
    assert capsys.readouterr() == ("", f"{idle}miles-submit: {line}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("cluster.groups.rollout.mem=9000G", "cluster.groups.rollout.mem: sbatch --test-only: Requested node configuration is not available; mend it, or ask the cluster's operators"),
        ("cluster.groups.train.cpus_per_task=999", "cluster.groups.train.cpus_per_task: sbatch --test-only: Requested node configuration is not available; mend it, or ask the cluster's operators"),
        ("cluster.groups.train.reservation=nothing", "cluster.groups.train.reservation: sbatch --test-only: Requested reservation is invalid; mend it, or ask the cluster's operators"),
        ("cluster.groups.rollout.sbatch.nonsense=1", "cluster.groups.rollout.sbatch.nonsense: sbatch --test-only: unrecognized option '--nonsense=1'; mend it, or ask the cluster's operators"),
    ],
)  # fmt: skip
def test_what_slurm_alone_refuses_has_its_key(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, line: str) -> None:
    assert command(monkeypatch, ["miles-submit", "run", "recipes/tiny", *HET, override, "--run-dir", str(tmp_path / "run")]) == WRONG
    assert capsys.readouterr().err == f"miles-submit: {line}\n"
    assert not (tmp_path / "run").exists()


def test_a_plan_that_slurm_refuses_names_no_start(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor for the job of the two that it would take: all are submitted, or none."""
    words = ["recipes/tiny", *HET, "cluster.placement=jobs", "cluster.groups.rollout.mem=9000G", "--run-dir", str(tmp_path / "run")]
    assert command(monkeypatch, ["miles-submit", "plan", *words]) == WRONG
    assert {line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("start ")} == {"not before the errors are mended"}


def test_paths_that_pyxis_would_read_otherwise(here: Cluster, tmp_path: Path) -> None:
    run = config("cluster.groups.train.container_image=registry#image")
    (line,) = errors(run, tmp_path / "a,b")
    assert line == f"--run-dir: {tmp_path}/a,b holds ',', which divides container mounts (group train has an image); choose another --run-dir"
    assert errors(run, tmp_path / "ab") == []


def test_nothing_is_wrong(here: Cluster, tmp_path: Path) -> None:
    run = config("train.num_nodes=4", "rollout.num_gpus=32")
    assert errors(run, tmp_path / "run") == []
    (only,) = prepare(run, RunDir(tmp_path / "run"))
    words, taken = start.estimate(only)
    assert taken
    assert words == "now, on infer[0-3],train[0-3]"


def test_limits_of_a_partition(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here.run(["scontrol", "update", "PartitionName=gb300", "MaxTime=30", "MaxNodes=2", "AllowAccounts=lab,infra"])
    try:
        found = errors(config("train.num_nodes=3", "cluster.groups.train.account=labs"), tmp_path / "run")
        assert found == [
            "cluster.groups.train.account: partition gb300 doesn't take account 'labs'; did you mean lab?",
            "cluster.groups.train.time: 60 is over the limit of partition gb300, 0:30:00 (30 min); set cluster.groups.train.time=0:30:00",
            "cluster.groups.train.nodes: 3 nodes are needed, partition gb300 allows 2 with 4 gb300; lower train.num_nodes",
        ]
        assert command(monkeypatch, ["miles-submit", "run", "recipes/tiny", *HET, "cluster.groups.train.account=lab", "--run-dir", str(tmp_path / "run")]) == WRONG
        assert capsys.readouterr() == ("", f"miles-submit: {found[1]}\n")
    finally:
        here.run(["scontrol", "update", "PartitionName=gb300", "MaxTime=INFINITE", "MaxNodes=UNLIMITED", "AllowAccounts=ALL"])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can ask as somebody whom Slurm hides a partition from")
def test_a_hidden_partition_is_there(here: Cluster) -> None:
    """Slurm denies it and its nodes to those who don't ask for all; jobs run in it all the same."""
    ask = f"""
import os, sys
from miles.slurm import site
from miles.slurm.srun import addresses
os.setuid({pwd.getpwnam("nobody").pw_uid})
found = site.ask()
os.environ["SLURM_JOB_NODELIST"] = "infer[0-1]"
print("h200" in found.partitions, sorted(node.name for node in found.within(["h200"])), sorted(addresses()))
"""
    over_nodes = ("h200", "low", "high")
    try:
        for name in over_nodes:
            here.run(["scontrol", "update", f"PartitionName={name}", "Hidden=YES"])
        said = here.run([sys.executable, "-c", ask], env=here.env() | {"PYTHONPATH": os.pathsep.join(sys.path)}).stdout
    finally:
        for name in over_nodes:
            here.run(["scontrol", "update", f"PartitionName={name}", "Hidden=NO"])
    assert said == "True ['infer0', 'infer1', 'infer2', 'infer3'] ['infer0', 'infer1']\n"


def test_nodes_that_are_down_are_a_warning(here: Cluster, tmp_path: Path) -> None:
    try:
        for _ in range(10):  # a node that happens to register just then (a test before had the controller read its files again) is up once more
            here.run(["scontrol", "update", "NodeName=train3", "State=DOWN", "Reason=test"])
            found = [str(finding) for finding in checks.refused(config("train.num_nodes=4"), RunDir(tmp_path / "run"), site.ask())]
            if found:
                break
        assert found == ["cluster.groups.train.nodes: 4 nodes are needed, only 3 of the 4 in partition gb300 are up: the job waits"]
    finally:
        here.run(["scontrol", "update", "NodeName=train3", "State=RESUME"], check=False)  # refused where it is up again


def test_nodes_that_are_left_out_as_bad(here: Cluster, tmp_path: Path) -> None:
    records.exclude(RunDir(tmp_path), {"train1": "preflight: clock", "infer0": "preflight: files"}, 0)
    assert errors(config("train.num_nodes=3"), tmp_path) == []
    mend = "remove what is good again from the exclude list (slurm/exclude.json of the run, or cluster.slurm.exclude_file)"
    assert errors(config("train.num_nodes=4"), tmp_path) == [f"cluster.groups.train.nodes: 4 nodes are needed, but partition gb300 has 3 besides those that are left out as bad; {mend}"]
    (line,) = errors(config("cluster.groups.train.nodelist=train[0-1]", "train.num_nodes=2"), tmp_path)
    assert line.startswith("cluster.groups.train.nodelist: asks for train1, which is left out as a bad node; name others")


def test_qos(slurm_accounting: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm_accounting.conf))
    assert command(monkeypatch, ["miles-submit", "run", "recipes/tiny", *HET, "cluster.groups.train.qos=urgnt", "--run-dir", str(tmp_path / "run")]) == WRONG
    assert capsys.readouterr() == ("", "miles-submit: cluster.groups.train.qos: no qos 'urgnt' in this cluster; did you mean urgent?\n")
    assert errors(config("cluster.groups.train.qos=urgent"), tmp_path / "run") == []


def test_segment_where_slurm_has_it(slurm24: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks of two nodes: four nodes in segments of two can be had, in one segment of four they can't."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm24.env()[name])
    for segment, taken in ((2, True), (4, False)):
        run = config("train.num_nodes=4", f"cluster.groups.train.segment={segment}")
        assert errors(run, tmp_path / "run") == []
        (only,) = prepare(run, RunDir(tmp_path / "run"))
        assert start.estimate(only)[1] is taken


def test_a_run_in_use_is_refused(here: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    held = config("cluster.groups.all.sbatch.hold=null")
    (tmp_path / "held.yaml").write_text(dump_config(held))
    folder = tmp_path / "run"
    words = ["miles-submit", "run", str(tmp_path / "held.yaml"), "--run-dir", str(folder)]
    assert command(monkeypatch, words) == OK
    job = capsys.readouterr().err.split("submitted job ")[1].split(":")[0]
    assert command(monkeypatch, words) == WRONG
    mend = f"follow it with `miles-submit status {folder}`, end it with `miles-submit cancel {folder}`, or choose another --run-dir"
    assert capsys.readouterr() == ("", f"miles-submit: --run-dir: {folder} is in use by job {job} (pending); {mend}\n")
    here.run(["scancel", job])
    assert command(monkeypatch, words) == OK
    job = capsys.readouterr().err.split("submitted job ")[1].split(":")[0]
    here.run(["scancel", job])


def command(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int:
    """miles-submit in this process; returns its exit code."""
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_without_slurm_there_is_the_local_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"command not found; .* set cluster.executor: local"):
        site.ask()
    assert command(monkeypatch, ["miles-submit", "run", "recipes/tiny", *HET, "--run-dir", str(tmp_path / "run")]) == WRONG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": command not found; is this a node of a Slurm cluster? Without Slurm, set cluster.executor: local")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_made(here: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, ["miles-submit", "run", "recipes/tiny", *HET, "--run-dir", "/proc/nothing/here"]) == WRONG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("miles-submit: /proc/nothing/here: can't be made (")
    assert line.endswith("); choose another --run-dir")


def test_a_run_directory_without_permission(here: Cluster) -> None:
    """Root may write everywhere, so it gives that up first."""
    plain = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    environment = here.env() | {"PYTHONPATH": str(configs_dir().parent)}
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o555)
        words = [*plain, sys.executable, "-m", "miles.cli", "run", "recipes/tiny", *HET, "--run-dir", str(folder / "run")]
        done = subprocess.run(words, env=environment, cwd="/", capture_output=True, text=True, timeout=180)
        folder.chmod(0o700)
    assert (done.returncode, done.stderr) == (WRONG, f"miles-submit: --run-dir: {folder / 'run'} can't be written (no permission in {folder}); choose another --run-dir\n")
