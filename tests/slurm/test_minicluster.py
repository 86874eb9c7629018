"""The private Slurm itself: what starts, what a job sees, and that nothing is left."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import cluster_or_skip

import miles
from miles.cli.minicluster import FIRST_RUN
from miles.config.compose import configs_dir, load_config
from miles.config.exits import UserError
from miles.config.placement import node_groups
from miles.data.store.run_dir import RunDir
from miles.slurm.checks import refused
from miles.slurm.minicluster import Cluster, Settings
from miles.slurm.minicluster.folder import SOCKET, ClusterError, create, mounts_below, remove
from miles.slurm.minicluster.processes import environment, everybody
from miles.slurm.site import ask

SMALL = {"train": 1, "infer": 1, "cpu": 0}
HET = """#!/bin/bash
#SBATCH --partition=gb300 --nodes=2 --gpus-per-node=4 --output={folder}/batch
#SBATCH hetjob
#SBATCH --partition=h200 --nodes=1 --gres=gpu:h200:3
srun --het-group=0 --gpus-per-node=4 --output={folder}/train.%n {show} &
srun --het-group=1 --gres=gpu:h200:3 --output={folder}/infer.%n {show} &
wait
"""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def state(cluster: Cluster, job: str) -> str:
    return cluster.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]).stdout.split()[0]


def mentions(folder: Path) -> list[int]:
    """Processes whose variables or working directory name the folder, found without what the cluster records."""
    found = []
    for process in everybody():
        try:
            here = os.readlink(f"/proc/{process.pid}/cwd")
        except OSError:
            here = ""
        if process.pid != os.getpid() and (str(folder) in here or any(str(folder) in value for value in environment(process).values())):
            found.append(process.pid)
    return found


def test_nothing_is_left_even_of_a_job_that_hides() -> None:
    """A task forks away from its step, into a session of its own, with an empty environment; then its slurmd dies. It ends with the cluster all the same."""
    cluster = cluster_or_skip(nodes=SMALL)
    with cluster:
        pid_file = cluster.folder / "hidden"
        script = f"#!/bin/bash\nsetsid env -i /bin/bash -c 'cd /; echo $$ > {pid_file}; exec sleep 1000' &\nsleep 1000\n"
        cluster.run(["sbatch", "--output=/dev/null"], input=script)
        wait_for(lambda: pid_file.exists() and bool(pid_file.read_text().strip()), "the job does not run")
        hidden = int(pid_file.read_text())
        cluster.kill_node("train0")
        seen = cluster.processes()
        assert hidden in {process.pid for process in seen}
        assert {"munged", "slurmctld", "slurmd", "slurmstepd"} <= {process.name for process in seen}
        mount_count = len(Path("/proc/self/mountinfo").read_text().splitlines())
    assert not [process for process in seen if process.alive()]
    assert not mentions(cluster.folder)
    assert not cluster.folder.exists()
    assert len(Path("/proc/self/mountinfo").read_text().splitlines()) <= mount_count


def test_it_ends_with_a_killed_owner() -> None:
    """kill -9 of the process that has the cluster as a context: the keeper sees its pipe close."""
    cluster = cluster_or_skip(nodes=SMALL)
    code = f"import time\nfrom pathlib import Path\nfrom miles.slurm.minicluster import Cluster\nwith Cluster(Path({str(cluster.folder)!r}), nodes={SMALL!r}): print('up', flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        seen = cluster.processes()
        owner.kill()
    assert len(seen) > 4
    wait_for(lambda: not any(process.alive() for process in seen), "some of it lives")
    assert not cluster.folder.exists()


def test_half_a_request_ends_nothing() -> None:
    """Somebody who is killed while he asks the keeper for a daemon."""
    with cluster_or_skip(nodes=SMALL) as cluster:
        for half in (b"", b'{"name": "slurmd-'):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(cluster.folder / SOCKET))
                connection.sendall(half)
        cluster.kill_node("train0")
        cluster.start_node("train0")
        assert cluster.run(["srun", "-p", "gb300", "echo", "x"]).stdout == "x\n"
        assert stat.S_IMODE((cluster.folder / "keeper").stat().st_mode) == 0o700


def test_down_after_a_killed_keeper() -> None:
    """kill -9 of the keeper: its daemons die with it, steps and tasks are found by their variables."""
    cluster = cluster_or_skip(nodes=SMALL)
    cluster.up()
    cluster.run(["sbatch", "--output=/dev/null", "--wrap=sleep 1000"])
    wait_for(lambda: "sleep" in {process.name for process in cluster.processes()}, "the job does not run")
    seen = cluster.processes()
    cluster.daemons()["keeper"].kill()
    cluster.down()
    assert not [process for process in seen if process.alive()]
    assert not cluster.folder.exists()


def test_two_clusters_side_by_side(slurm: Cluster) -> None:
    with cluster_or_skip(nodes=SMALL) as other:
        for cluster, nodes in ((slurm, "train0,train1,train2,train3"), (other, "train0")):
            names = cluster.run(["sinfo", "-h", "-N", "-p", "gb300", "-o", "%N"]).stdout.split()
            assert ",".join(names) == nodes
        job = other.run(["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"]).stdout.strip()
        assert state(other, job) == "PENDING"
        assert slurm.run(["squeue", "-h"]).stdout == ""
    assert slurm.run(["srun", "-N1", "echo", "still"]).stdout == "still\n"


def test_het_job_sees_its_groups_gpus(slurm: Cluster, tmp_path: Path) -> None:
    show = "bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    job = slurm.run(["sbatch", "--parsable", "--wait"], input=HET.format(folder=tmp_path, show=show)).stdout.strip()
    assert state(slurm, job) == "COMPLETED"
    assert {path.name: path.read_text().split() for path in tmp_path.glob("train.*")} == {"train.0": ["train0", "0,1,2,3"], "train.1": ["train1", "0,1,2,3"]}
    assert [path.read_text().split() for path in tmp_path.glob("infer.*")] == [["infer0", "0,1,2"]]


def test_restarted_controller_knows_its_jobs() -> None:
    with cluster_or_skip(nodes=SMALL) as cluster:
        job = cluster.run(["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"]).stdout.strip()
        before = cluster.daemons()["slurmctld"]
        cluster.restart_controller()
        assert cluster.daemons()["slurmctld"].pid != before.pid
        assert state(cluster, job) == "PENDING"


def test_outer_slurm_is_not_seen(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a job of another cluster our commands would otherwise take its job for theirs."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    assert slurm.run(["srun", "-p", "cpu", "printenv", "SLURM_JOB_ID"]).stdout != "4711\n"
    assert "SBATCH_PARTITION" not in slurm.env()


def test_crashed_node_goes_down_and_its_job_is_requeued() -> None:
    """The node's slurmd, slurmstepd and task die at once: only the controller's own timeouts notice."""
    quick = Settings(slurmd_timeout_seconds=2, message_timeout_seconds=2)
    with cluster_or_skip(nodes=SMALL, settings=quick) as cluster:
        job = cluster.run(["sbatch", "--parsable", "-p", "gb300", "--output=/dev/null", "--wrap=sleep 1000"]).stdout.strip()
        wait_for(lambda: "sleep" in {process.name for process in cluster.processes()}, "the job does not run")
        cluster.kill_node("train0", tasks=True)
        assert state(cluster, job) == "RUNNING"
        assert {process.name for process in cluster.processes()} & {"sleep", "slurmstepd"} == set()
        wait_for(lambda: cluster.node_state("train0") == "down*" and state(cluster, job) == "PENDING", "the node is not called down")
        assert " Restarts=1 " in cluster.run(["scontrol", "-o", "show", "job", job]).stdout
        cluster.start_node("train0")
        assert cluster.node_state("train0") == "idle"
        cluster.run(["scancel", job])


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as a plain user already")
def test_as_a_plain_user_with_nothing_but_python() -> None:
    """As nobody, by the system's Python and the few modules it takes, in a folder that root doesn't touch."""
    ready = cluster_or_skip(nodes=SMALL)
    package = Path(miles.__file__).parent
    for part in ("__init__.py", "config/__init__.py", "config/exits.py", "slurm/__init__.py"):
        (ready.folder / "miles" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / part, ready.folder / "miles" / part)
    shutil.copytree(package / "slurm" / "minicluster", ready.folder / "miles" / "slurm" / "minicluster")
    (ready.folder / "own").mkdir()
    shutil.chown(ready.folder / "own", "nobody", "nogroup")
    ready.folder.chmod(0o755)
    code = f"""
import os
from pathlib import Path
from miles.slurm.minicluster import Cluster
with Cluster(Path({str(ready.folder / "own" / "c")!r}), nodes={SMALL!r}) as cluster:
    print(cluster.run(["srun", "-p", "h200", "--gpus-per-node=2", "sh", "-c", "echo $(id -un) $CUDA_VISIBLE_DEVICES"]).stdout, end="")
    seen = cluster.processes()
print(len(seen) > 4, os.listdir({str(ready.folder / "own")!r}), [process for process in seen if process.alive()])
"""
    words = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "/usr/bin/python3", "-c", code]
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ready.folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(words, env=variables, cwd="/", capture_output=True, text=True, timeout=180)
    finally:
        shutil.rmtree(ready.folder)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["nobody 0,1", "True [] []"]


def test_accounting_has_rows_and_refuses_strangers(slurm_accounting: Cluster) -> None:
    jobs = [
        slurm_accounting.run(["sbatch", "--parsable", "--wait", "--output=/dev/null", *options, f"--wrap={command}"], check=False).stdout.strip()
        for options, command in ((["-A", "infra", "--qos=urgent"], "true"), ([], "exit 3"))
    ]
    rows = ["infra|urgent|COMPLETED|0:0", "research|normal|FAILED|3:0"]
    words = ["sacct", "-nPX", "-j", ",".join(jobs), "-o", "account,qos,state,exitcode"]
    wait_for(lambda: slurm_accounting.run(words).stdout.splitlines() == rows, "sacct has other rows")
    refused = slurm_accounting.run(["sbatch", "-A", "nobodys", "--wrap=true"], check=False)
    assert refused.returncode != 0
    assert "Invalid account" in refused.stderr


def test_segments_are_honoured_by_24_11(slurm24: Cluster) -> None:
    """Blocks are train[0-1] and train[2-3]. With one node of each taken, a segment of two has no place; two segments of one have."""
    taken = [slurm24.run(["sbatch", "--parsable", "--exclusive", "-p", "gb300", "-w", node, "--output=/dev/null", "--wrap=sleep 1000"]).stdout.strip() for node in ("train0", "train2")]
    wait_for(lambda: [state(slurm24, job) for job in taken] == ["RUNNING"] * 2, "the nodes are not taken")
    whole = slurm24.run(["sbatch", "--parsable", "-p", "gb300", "-N2", "--segment=2", "--output=/dev/null", "--wrap=true"]).stdout.strip()
    assert slurm24.run(["srun", "-p", "gb300", "-N2", "--segment=1", "printenv", "SLURMD_NODENAME"]).stdout.split() in (["train1", "train3"], ["train3", "train1"])
    assert state(slurm24, whole) == "PENDING"
    slurm24.run(["scancel", taken[0]])
    wait_for(lambda: state(slurm24, whole) == "COMPLETED", "the segment does not get its block")
    assert slurm24.run(["scontrol", "-o", "show", "job", whole]).stdout.count(" NodeList=train[0-1] ") == 1
    slurm24.run(["scancel", taken[1]])


def test_blocks_with_what_is_left_over() -> None:
    """train[0-2] is one block of three, infer[0] is in none: 24.11 starts with it and uses all of them."""
    with cluster_or_skip(version="24.11", nodes={"train": 3, "infer": 1, "cpu": 0}) as cluster:
        assert cluster.run(["scontrol", "show", "topology"]).stdout.split() == ["BlockName=train-block0", "BlockIndex=0", "Nodes=train0,train1,train2", "BlockSize=2"]
        assert cluster.run(["srun", "-p", "gb300", "-N3", "echo", "x"]).stdout == "x\n" * 3
        assert cluster.run(["srun", "-p", "h200", "echo", "x"]).stdout == "x\n"


def test_tasks_of_24_11_have_this_python(slurm24: Cluster) -> None:
    """Its daemons use libraries of their own, down to the C library; a task must not see them."""
    code = "import sys, torch; print(sys.executable, torch.ones(2).sum().item(), 'slurm-24' in open('/proc/self/maps').read())"
    assert slurm24.run(["srun", "-p", "cpu", sys.executable, "-c", code], timeout=300).stdout.split() == [sys.executable, "2.0", "False"]


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("x")
    with pytest.raises(UserError, match="no folder of a private cluster"):
        remove(tmp_path)
    folder = Path(tempfile.mkdtemp(prefix="miles-slurm-", dir="/tmp"))
    (folder / "theirs").write_text("x")
    try:
        with pytest.raises(UserError, match="not empty"):
            create(folder)
        with pytest.raises(UserError, match="too long"):
            create(folder / ("x" * 60))
        assert [path.name for path in folder.iterdir()] == ["theirs"]
    finally:
        shutil.rmtree(folder)


def test_a_path_that_cannot_be_is_refused_in_one_line_and_leaves_nothing() -> None:
    place = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
    try:
        for wrong, why in (
            (place / "new" / "m 3", r"' ' can't stand in the path"), (place / "new" / "%n", r"'%' can't stand"), (place / "a\nb", r"'\\n' can't stand"),
            (Path("/proc/x"), "/proc/x: can't be made or written"), (Path("/dev/null/x"), "not a directory"), (Path("/dev/null"), "is a file"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=why) as error:
                create(wrong)
            assert "\n" not in str(error.value)
        assert list(place.iterdir()) == []
    finally:
        shutil.rmtree(place)


def test_a_start_that_fails_leaves_no_folder() -> None:
    """Neither its own nor those above it that it made; what was there before stays."""
    place = cluster_or_skip().folder
    try:
        cluster = Cluster(place / "a" / "b", nodes={"train": 1, "infer": 0, "cpu": 0}, settings=Settings(lines=("SlurmctldPort=none",)))
        with pytest.raises(ClusterError, match="slurmctld"):
            cluster.up()
        assert list(place.iterdir()) == []
    finally:
        shutil.rmtree(place)


def test_nothing_is_removed_below_which_something_is_mounted() -> None:
    """/proc is one place where something is mounted on any machine."""
    assert mounts_below(Path("/proc"))
    assert mounts_below(Path(tempfile.gettempdir()) / "nowhere") == []


@pytest.mark.parametrize("placement", ["het", "jobs", "split", "colocate"])
def test_the_cluster_file_of_a_first_run_fits(slurm: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, placement: str) -> None:
    """What `up` and the documentation say to type, held against the cluster itself: no placement needs another setting."""
    for name, value in slurm.env().items():
        monkeypatch.setenv(name, value)
    config = load_config(FIRST_RUN.split()[2:4], [f"cluster.placement={placement}"])
    assert [str(finding) for finding in refused(config, RunDir(tmp_path / "run"), ask()) if finding.level == "error"] == []
    expected = {"train": "gb300", "rollout": "h200"} if placement in ("het", "jobs") else {"all": "gb300"}
    assert {group.name: group.ask.partition for group in node_groups(config)} == {group.name: group.ask.gpu_type for group in node_groups(config)} == expected
    for page in ("README.md", "docs/slurm.md"):
        assert f"\n{FIRST_RUN}\n" in (configs_dir().parent / page).read_text().replace("\n    ", "\n")
