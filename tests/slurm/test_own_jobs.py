"""Which jobs are a run's own on a real Slurm: ids that are another's by now, copies, hand-submitted jobs, commands at once, and interrupted ones."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import REPOSITORY, with_path
from jobs import command as command_line

from miles.cli.main import main
from miles.config.compose import load_config
from miles.config.exits import AGAIN, UserError
from miles.data.store.files import read_json, seal_json
from miles.data.store.run_dir import RunDir
from miles.slurm.all_or_none import AllOrNone
from miles.slurm.job_here import JobHere
from miles.slurm.minicluster import Cluster
from miles.slurm.minicluster.processes import everybody
from miles.slurm.own_jobs import entry_of
from miles.slurm.queue import excluded
from miles.slurm.records import cancel, cancelled, exclude, note, submitted
from miles.slurm.requeue import go_on
from miles.slurm.states import Marks, parse_accounting

WORDS = ["recipes/tiny", "cluster.executor=slurm", "cluster.groups.all.partition=cpu", "cluster.groups.all.time=30", "cluster.groups.all.mem=100"]
HELD = [*WORDS, "cluster.groups.all.sbatch.hold=null"]


@pytest.fixture
def empty(slurm: Cluster) -> Iterator[Cluster]:
    yield slurm
    for job in queue(slurm):
        slurm.run(["scancel", str(job)])
    until(lambda: not queue(slurm), "the queue is empty")


Say = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def say(slurm: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """miles-submit in this process."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", ["miles-submit", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return subprocess.CompletedProcess(words, int(stop.value.code or 0), *capsys.readouterr())

    return run


def queue(cluster: Cluster) -> list[int]:
    return sorted(map(int, cluster.run(["squeue", "-h", "-o", "%A"]).stdout.split()))


def until(condition: Callable[[], object], what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def started(cluster: Cluster, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "miles.cli", *words], env=with_path(cluster, REPOSITORY), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_id_that_is_anothers_by_now(empty: Cluster, say: Say, tmp_path: Path) -> None:
    """As after a controller began to count again: the run's number leads to a stranger's job, which nothing touches or speaks of."""
    folder = tmp_path / "run"
    assert say("run", *HELD, "--run-dir", str(folder)).returncode == 0
    (entry,) = submitted(RunDir(folder))
    assert (entry["cluster"], entry["run_dir"], entry["output"]) == (empty.run(["scontrol", "show", "config"]).stdout.split("ClusterName ")[1].split()[1], str(folder), f"{folder}/slurm/{entry['job_id']}.log")
    empty.run(["scancel", str(entry["job_id"])])
    stranger = int(empty.run(["sbatch", "--parsable", "--hold", "--partition=cpu", "--output=/dev/null", "--wrap=true"]).stdout)
    seal_json(folder / "slurm" / "job.json", {"submissions": [entry | {"job_id": stranger, "output": f"{folder}/slurm/{stranger}.log"}]})
    refused = say("cancel", str(folder), "--now")
    assert (refused.returncode, refused.stderr.count("nothing to cancel")) == (78, 1)
    said = say("status", str(folder)).stdout
    assert f"job: {stranger} forgotten (Slurm no longer knows job {stranger} of cluster {entry['cluster']}" in said
    assert "forgotten" in [each["cause"] for each in json.loads(say("doctor", str(folder), "--json").stdout)["diagnoses"]]
    assert say("resume", str(folder)).returncode == 0
    assert queue(empty) == [stranger, submitted(RunDir(folder))[-1]["job_id"]]


def test_a_copy_has_none_of_the_originals_jobs(empty: Cluster, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, copy, link = (tmp_path / name for name in ("run", "copy", "link"))
    assert say("run", *HELD, "--run-dir", str(folder)).returncode == 0
    shutil.copytree(folder, copy)
    link.symlink_to(folder)
    assert say("cancel", str(copy), "--now").returncode == 78
    assert json.loads(say("status", str(copy), "--json").stdout)["state"] == "new"
    assert json.loads(say("status", str(link), "--json").stdout)["state"] == "queued"
    assert len(queue(empty)) == 1
    monkeypatch.chdir(tmp_path)
    assert say("cancel", "link").returncode == 0
    assert queue(empty) == []


def test_two_commands_at_once_submit_one_job(empty: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    both = [started(empty, "run", *HELD, "--run-dir", str(folder)) for _ in range(2)]
    said = [each.communicate(timeout=300)[1] for each in both]
    assert sorted(each.returncode for each in both) == [0, 78], said
    assert queue(empty) == [entry["job_id"] for entry in submitted(RunDir(folder))]
    assert len(queue(empty)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_leaves_no_job_that_nobody_knows(empty: Cluster, say: Say, tmp_path: Path, number: int) -> None:
    """Ended by a signal it takes its jobs back; killed outright, all but at most the last are on record."""
    folder = tmp_path / "run"
    command = started(empty, "run", *HELD, "cluster.slurm.requeue=chain", "cluster.slurm.chain=300", "--run-dir", str(folder))
    until(lambda: command.poll() is not None or len(submitted(RunDir(folder))) > 2, "jobs are submitted")
    assert command.poll() is None, command.communicate()
    command.send_signal(number)
    _, said = command.communicate(timeout=180)
    known = [entry["job_id"] for entry in submitted(RunDir(folder))]
    if number == signal.SIGKILL:
        until(lambda: not any(str(folder) in " ".join(command_line(each)) for each in everybody()), "the sbatch that it left behind has ended")
        assert queue(empty)[: len(known)] == known
        assert len(queue(empty)) - len(known) in (0, 1)
        assert say("cancel", str(folder)).returncode == 0
    else:
        assert (command.returncode, queue(empty), known) == (128 + number, [], []), said


def test_a_controller_that_goes_as_soon_as_it_has_the_job(empty: Cluster, tmp_path: Path) -> None:
    """The job is on record; `--wait` follows it from when Slurm answers again, and calls no job that was cancelled finished."""
    folder, controller = tmp_path / "run", empty.daemons()["slurmctld"].pid
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    goes = f'case "$*" in *test-only*) ;; *) kill {controller}; while kill -0 {controller}; do sleep 0.05; done 2>/dev/null;; esac'
    sbatch.write_text(f'#!/bin/bash\n{shutil.which("sbatch", path=empty.env()["PATH"])} "$@" || exit\n{goes}\n')
    sbatch.chmod(0o755)
    environment = with_path(empty, REPOSITORY)
    environment["PATH"] = f"{sbatch.parent}:{environment['PATH']}"
    words = [sys.executable, "-m", "miles.cli", "run", *HELD, "--run-dir", str(folder), "--wait"]
    command = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: submitted(RunDir(folder)), "the job is on record")
    finally:
        empty._start_controller()
    (entry,) = submitted(RunDir(folder))
    assert (queue(empty), entry["output"]) == ([entry["job_id"]], f"{folder}/slurm/{entry['job_id']}.log")
    assert command.stdout is not None, "a pipe"
    said = "".join(iter(lambda: line if (line := command.stdout.readline()) and "held by its user" not in line else "", ""))
    assert command.poll() is None, said
    empty.run(["scancel", str(entry["job_id"])])
    rest = command.communicate(timeout=180)[0]
    assert (command.returncode, rest.count("finished"), rest.count(f"job {entry['job_id']} cancelled")) == (AGAIN, 0, 1), rest
    until(lambda: all(empty.node_state(node) == "idle" for node in empty.layout.nodes), "the nodes have answered the new controller")


def test_a_signal_while_jobs_are_made(empty: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, also when it comes after the last of them, and when a later one is refused; handlers are as before afterwards."""
    monkeypatch.setenv("SLURM_CONF", str(empty.conf))
    job = ["sbatch", "--parsable", "--hold", "--partition=cpu", "--output=/dev/null", "--wrap=true"]
    before = signal.getsignal(signal.SIGTERM)
    jobs = AllOrNone()

    def asked_to_end() -> None:
        with jobs:
            jobs.sbatch(job)
            os.kill(os.getpid(), signal.SIGTERM)

    def refused() -> None:
        with jobs:
            jobs.sbatch(job)
            jobs.sbatch([*job[:-1], "--partition=nowhere", job[-1]])

    with pytest.raises(SystemExit) as stop:
        asked_to_end()
    assert (stop.value.code, jobs.taken_back, len(jobs.jobs), queue(empty)) == (143, True, 1, [])
    jobs = AllOrNone()
    with pytest.raises(UserError, match="invalid partition"):
        refused()
    assert (len(jobs.jobs), queue(empty), signal.getsignal(signal.SIGTERM)) == (1, [], before)


def test_a_sites_sbatch_may_say_more_than_the_id() -> None:
    jobs = AllOrNone()
    assert jobs.sbatch(["printf", "%s\\n", "project: x, 3 h left", "4711;cluster"]) == 4711
    with pytest.raises(UserError, match=r"named no id, but 'Submitted batch job 12': find it with squeue"):
        jobs.sbatch(["echo", "Submitted batch job 12"])


def test_a_run_submitted_by_hand_is_known(empty: Cluster, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It notes itself as it starts: status, doctor and cancel find its job, as that of `run` would be."""
    folder = tmp_path / "run"
    (tmp_path / "builds_slowly.py").write_text("import time\n\n\ndef build(folder, seed):\n    time.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    rendered = say("render", str(folder), *WORDS, "model.build=builds_slowly.build")
    assert rendered.returncode == 0, rendered.stderr
    (line,) = rendered.stdout.splitlines()
    made = empty.run(shlex.split(line), env=with_path(empty, REPOSITORY, tmp_path), cwd=tmp_path)
    job = int(made.stdout)
    until(lambda: submitted(RunDir(folder)), "the job notes itself")
    (entry,) = submitted(RunDir(folder))
    assert (entry["job_id"], entry["groups"], entry["output"], entry["run_dir"]) == (job, ["all"], f"{folder}/slurm/{job}.log", str(folder))
    assert f"job: {job} running" in say("status", str(folder)).stdout
    assert json.loads(say("doctor", str(folder), "--json").stdout)["diagnoses"][0]["cause"] == "alive"
    assert f"in use by job {job}" in say("resume", str(folder)).stderr
    assert say("cancel", str(folder), "--now").returncode == 0
    until(lambda: not queue(empty), "the job is gone")
    assert json.loads(say("doctor", str(folder), "--json").stdout)["diagnoses"][0]["cause"] == "cancelled"


def test_a_chain_keeps_its_own_jobs_off_failed_nodes(empty: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those after the one that ends, and no other's that has such an id by now."""
    monkeypatch.setenv("SLURM_CONF", str(empty.conf))
    run = RunDir(tmp_path)
    jobs = [int(empty.run(["sbatch", "--parsable", "--hold", "--partition=cpu", "--output=/dev/null", "--wrap=true"]).stdout) for _ in range(4)]
    for job in jobs:
        note(run, entry_of(run, job, "wrap", ["all"], "mini") | ({"output": "/another"} if job == jobs[3] else {}))
    exclude(run, {"cpu1": "test"}, 1)
    said: list[str] = []
    assert go_on(run, load_config(["recipes/tiny"], [*HELD[1:], "cluster.slurm.requeue=chain"]), JobHere(jobs[1], (("cpu0",),), 0), said.append) == AGAIN
    assert said == ["ended; the next job of the chain goes on"]
    assert [excluded(job)[str(job)] for job in jobs] == ["", "", "cpu1", ""]


def test_rows_of_the_accounting_that_are_another_jobs() -> None:
    """sacct -D of an id that was given three times; the second is ours, requeued once."""
    rows = [
        "7|7|FAILED|1:0|n0|None|2026-11-01T10:00:00|mine", "7|7|REQUEUED|0:0|n1|None|2026-11-02T10:00:00|mine",
        "7|7|COMPLETED|0:0|n2|None|2026-11-02T10:09:00|mine", "7|7|CANCELLED by 5|0:0|n3|None|2026-11-03T10:00:00|theirs",
    ]  # fmt: skip
    state = parse_accounting("\n".join(rows), Marks(lambda output: True, "mine", "2026-11-02T10:00:00"))
    assert state is not None
    assert (state.state, state.nodes, state.restarts) == ("COMPLETED", "n2", 1)
    assert parse_accounting(rows[0], Marks(lambda output: True, "mine", "2026-11-02T10:00:00")) is None


def test_a_number_that_an_earlier_cancelled_job_had(tmp_path: Path) -> None:
    """The new job is not taken for the one that was cancelled."""
    run = RunDir(tmp_path)
    entry = {"job_id": 7, "name": "x", "groups": ["all"], "time": 0.0, "cluster": "c", "submitted": "", "output": "/x/7.log", "run_dir": str(tmp_path)}
    for _ in range(2):
        cancel(run, [6, 7])
        note(run, entry)
        assert (cancelled(run), read_json(tmp_path / "slurm" / "job.json")) == ({6}, {"submissions": [entry]})


def test_a_record_that_says_too_little_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    seal_json(tmp_path / "slurm" / "job.json", {"submissions": [{"job_id": 7, "name": "x", "groups": ["all"], "time": 0.0, "cluster": "c", "submitted": ""}]})
    with pytest.raises(UserError, match=rf"^{tmp_path}/slurm/job.json: submission 1 has no output, run_dir$"):
        submitted(RunDir(tmp_path))
