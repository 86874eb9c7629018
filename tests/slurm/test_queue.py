"""What the controller says of jobs whose users wrote what looks like its words, on both versions of Slurm."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytest

from miles.config.exits import UserError
from miles.slurm import queue, requeue
from miles.slurm.job_here import JobHere
from miles.slurm.minicluster import Cluster
from miles.slurm.nodes import in_words
from miles.slurm.queue import excluded, parts
from miles.slurm.states import job_state

NAME = "a JobState=FAILED Reason=None\nJobId=7 HetJobOffset=3 JobState=COMPLETED NodeList=x|y|FAILED|"
COMMENT = "x JobState=COMPLETED EndTime=2020-01-01T00:00:00 ExcNodeList=nowhere Restarts=9 ExitCode=3:0"


@pytest.mark.parametrize("version", ["slurm", "slurm24"])
def test_a_name_or_comment_is_taken_for_no_field(version: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster: Cluster = request.getfixturevalue(version)
    monkeypatch.setattr(queue, "QUICK_SECONDS", 30.0)  # on a busy machine an answer may take longer than a run would wait for it
    for name, value in cluster.env().items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "JobState=FAILED EndTime=x|y 5%\n7|N/A|N/A|COMPLETED"
    folder.mkdir(parents=True)
    output = str(folder).replace("%", "%%") + "/%j.log"

    def submit(*words: str) -> int:
        options = ["--partition=cpu", f"--output={output}", f"--job-name={NAME}", f"--comment={COMMENT}", f"--chdir={folder}", "--time=5"]
        return int(cluster.run(["sbatch", "--parsable", *options, *words]).stdout)

    runs, held = submit("--wrap=sleep 1000"), submit("--wrap=true", "--hold", "--exclude=cpu0")
    try:
        deadline = time.monotonic() + 120
        while parts(runs)[0].state != "RUNNING":
            assert time.monotonic() < deadline
        (part,), (waits,) = parts(runs), parts(held)
        assert (part.job_id, part.leader, part.state, part.restarts, part.exit_code, part.name) == (str(runs), "", "RUNNING", 0, "0:0", str(runs))
        assert (part.output, waits.output) == (f"{folder}/{runs}.log", f"{folder}/{held}.log")
        assert part.end is not None
        assert part.start is not None
        assert part.end - part.start == datetime.timedelta(minutes=5)
        assert 100 < (requeue.seconds_left(JobHere(runs, (("cpu0",),), 0)) or 0) <= 300
        assert (waits.state, waits.end, excluded(runs)[str(runs)], excluded(held)[str(held)]) == ("PENDING", None, "", "cpu0")
        assert (job_state(str(runs)).state, job_state(str(runs)).nodes) == ("RUNNING", part.nodes)
        assert (job_state(str(held)).state, job_state(str(held)).reason) == ("PENDING", "held by its user; release it with scontrol release")
        assert parts(424242) == []
    finally:
        cluster.run(["scancel", str(runs), str(held)])
    assert parts(held)[0].state == "CANCELLED"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"^squeue: command not found"):
        parts(runs, 2.0)


def test_a_nodes_comment_is_not_its_state() -> None:
    line = "NodeName=train0 Arch=x86_64 NodeAddr=127.0.0.1 State=IDLE Reason=was State=DOWN [root@2026-11-22T08:00:00] Comment=State=FAIL\n"
    assert in_words(line) == {}
    assert in_words(line.replace("State=IDLE", "State=DOWN*")) == {"train0": "Slurm says DOWN+NOT_RESPONDING"}
