"""The text of batch scripts and the options of srun, word for word."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from miles.config.allocation import Group, Slurm
from miles.config.exits import UserError
from miles.config.placement import NodeGroup
from miles.slurm.options import arguments, srun_options
from miles.slurm.script import script, setup_lines
from miles.slurm.srun import Step, srun

COMMAND = ["/opt/miles/bin/python", "-m", "miles.slurm.batch", "/runs/one run"]
LOG = Path("/runs/one run/slurm/%j.log")


def group(name: str, nodes: int = 1, gpus: int = 8, **ask: object) -> NodeGroup:
    return NodeGroup(name, nodes, gpus, (name,), Group(**ask))  # type: ignore[arg-type]


TRAIN = group("train", 2, gpu_type="h200", partition="h200", account="research", qos="high", time="4:00:00", constraint="ib", exclusive=True)
ROLLOUT = group("rollout", 4, 4, gpu_type="gb300", partition="gb300", account="infra", time="1-0:00:00", segment=4, mem="0", environment={"NCCL_MNNVL_ENABLE": "1"})

HEAD = """#!/bin/bash
#SBATCH --job-name=one
#SBATCH --requeue
#SBATCH --output='/runs/one run/slurm/%j.log'
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
"""
TRAIN_BLOCK = """#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:h200:8
#SBATCH --partition=h200
#SBATCH --account=research
#SBATCH --qos=high
#SBATCH --time=4:00:00
#SBATCH --constraint=ib
#SBATCH --exclusive
"""
ROLLOUT_BLOCK = """#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:gb300:4
#SBATCH --partition=gb300
#SBATCH --account=infra
#SBATCH --time=1-0:00:00
#SBATCH --mem=0
#SBATCH --segment=4
"""
CPU_BLOCK = """#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --partition=cpu
"""
NEXT = """#SBATCH hetjob
#SBATCH --job-name=one
#SBATCH --requeue
"""
TAIL = """
exec /opt/miles/bin/python -m miles.slurm.batch '/runs/one run'
"""

SETUP = """)
for miles_line in "${!miles_setup[@]}"; do
  eval "${miles_setup[miles_line]}" || {
    echo "error: line $((miles_line + 1)) of the group's setup ended with exit code $?: ${miles_setup[miles_line]%%$'\\n'*}"
    exit 78
  }
done"""


def text(*groups: NodeGroup, job: Slurm | None = None, device: str = "cuda") -> str:
    return script(job or Slurm(), "one", groups, COMMAND, LOG, device=device)


def cpu_only() -> NodeGroup:
    return NodeGroup("cpu", 1, 0, ("cpu",), Group(partition="cpu", cpus_per_task=16))


def test_each_group_has_its_own_partition_qos_and_segment() -> None:
    assert text(TRAIN, ROLLOUT) == HEAD + TRAIN_BLOCK + NEXT + ROLLOUT_BLOCK + TAIL


def test_a_group_without_gpus_before_and_after_one_with_them() -> None:
    assert text(cpu_only(), TRAIN) == HEAD + CPU_BLOCK + NEXT + TRAIN_BLOCK + TAIL
    assert text(TRAIN, cpu_only()) == HEAD + TRAIN_BLOCK + NEXT + CPU_BLOCK + TAIL


def test_gpus_are_asked_for_where_there_is_a_type_or_the_device_needs_them() -> None:
    assert "gres" not in text(group("train"), device="cpu")
    assert "#SBATCH --gres=gpu:8\n" in text(group("train"), device="cuda")
    assert "#SBATCH --gres=gpu:h200:8\n" in text(group("train", gpu_type="h200"), device="cpu")
    assert "#SBATCH --gres=gpu:2,shard:4\n" in text(group("train", gres="gpu:2,shard:4"), device="cpu")


def test_job_settings() -> None:
    words = text(TRAIN, job=Slurm(job_name="night run", requeue="chain", lead_seconds=90))
    assert words.startswith("#!/bin/bash\n#SBATCH --job-name='night run'\n#SBATCH --no-requeue\n")
    assert "#SBATCH --signal=B:USR1@90\n" in words


def test_own_sbatch_options_win() -> None:
    words = text(group("train", time="60", sbatch={"time": "90", "mail-type": "END", "overcommit": None}))
    assert [line for line in words.splitlines() if "time" in line or "mail" in line or "over" in line] == ["#SBATCH --time=90", "#SBATCH --mail-type=END", "#SBATCH --overcommit"]


def test_setup_of_the_first_group_is_seen_by_it_alone() -> None:
    """Its lines come after the environment was put aside for the others; those of other groups are no part of the script."""
    first = group("train", environment={"HF_HOME": "/data/it's here"}, setup=["module load cuda", "ulimit -l unlimited"])
    words = text(first, group("rollout", setup=["module load other"], environment={"OTHER": "1"}))
    assert words.partition("\n\n")[2] == (
        "exec 9< <(env -0)\n"
        "export MILES_ENVIRONMENT_FD=9\n"
        "export HF_HOME='/data/it'\"'\"'s here'\n"
        "miles_setup=(\n"
        "  'module load cuda'\n"
        "  'ulimit -l unlimited'\n" + SETUP + "\n" + TAIL
    )


def test_containers_are_for_srun() -> None:
    """pyxis adds its options to srun; sbatch would start the batch script inside of the image."""
    inside = group("train", container_image="/images/miles+x86.sqsh", container_mounts=["/data:/data", "/runs/one:/runs/one"], container_workdir="/work")
    assert "container" not in text(inside)
    assert arguments(srun_options(inside, "cuda", mounts=("/runs/one:/runs/one", "/tmp/x:/tmp/x"))) == [
        "--gres=gpu:8",
        "--container-image=/images/miles+x86.sqsh",
        "--container-mounts=/data:/data,/runs/one:/runs/one,/tmp/x:/tmp/x",
        "--container-workdir=/work",
    ]
    assert srun_options(TRAIN, mounts=("/runs/one:/runs/one",)) == {"gres": "gpu:h200:8"}


def test_srun_is_told_what_it_would_not_inherit() -> None:
    asked = group("rollout", 4, 4, gpu_type="gb300", cpus_per_task=64, setup=["module load cuda"], srun={"cpu-bind": "cores", "network": "single_node_vni"})
    step = Step(het_group=1, first_node=2, nodes=3, options=srun_options(asked), setup=tuple(asked.ask.setup))
    assert srun(step, "rollout", Path("/100%/7"), ["python", "-m", "x"]) == [
        *("srun", "--het-group=1", "--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--relative=2", "--job-name=rollout"),
        *("--overlap", "--mem=0", "--mpi=none", "--cpu-bind=cores", "--kill-on-bad-exit=0", "--wait=0", "--unbuffered", "--input=none"),
        *("--output=/100%%/7_%n_log.out", "--open-mode=append", "--cpus-per-task=64", "--gres=gpu:gb300:4", "--network=single_node_vni"),
        *("bash", "-c", "miles_setup=(\n  'module load cuda'\n" + SETUP + '\nexec "$@"', "rollout", "python", "-m", "x"),
    ]


def test_several_tasks_of_a_node_open_their_logs_themselves() -> None:
    """What they have no log for yet, srun says. Its own name for a rank differs between versions."""
    command = srun(Step(het_group=1, first_node=0, nodes=1, tasks_per_node=2), "rollout", Path("/it's 100%/7"), ["python"], merged=False)
    assert not [word for word in command if word.startswith(("--output", "--error"))]
    assert command[-5:-2] == ["bash", "-c", """miles_log='/it'"'"'s 100%/7'_${SLURM_PROCID}_log; exec >>"$miles_log.out" 2>>"$miles_log.err"\nexec "$@\""""]


@pytest.mark.parametrize("bad", [{"comment": "one\n#SBATCH --uid=0"}, {"sbatch": {"comment": "a\rb"}}], ids=["option", "extra"])
def test_a_line_break_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match="line break"):
        text(group("train", **bad))


@pytest.mark.parametrize("line", ["cd /nonexistent", "false", "no-such-command x", "if true; then", "echo 'it''s' && (exit 3)"])
def test_a_setup_line_that_fails_ends_it_by_name(line: str) -> None:
    done = subprocess.run(["bash", "-c", "\n".join([*setup_lines(["declare -x KEPT='a b'", "cd /", line, "true"]), "echo went on"])], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    (word,) = [each for each in done.stdout.splitlines() if each.startswith("error: ")]
    assert word.startswith("error: line 3 of the group's setup ended with exit code ")
    assert word.endswith(f": {line}")
    assert "went on" not in done.stdout


def test_what_setup_declares_stays() -> None:
    words = "\n".join([*setup_lines(["declare -x KEPT='a b'", "cd /usr # why", "for each in 1 2\ndo true; done"]), "env | grep ^KEPT; pwd"])
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "KEPT=a b\n/usr\n", "")
