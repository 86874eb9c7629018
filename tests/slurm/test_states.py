"""The state of a job in words, from the controller or the accounting, whichever knows it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from miles.cli.jobs import job_rows, job_words, with_jobs
from miles.config.exits import UserError
from miles.data.store.run_dir import RunDir
from miles.report.summary import Summary
from miles.slurm.minicluster import Cluster
from miles.slurm.own_jobs import entry_of
from miles.slurm.queue import parse
from miles.slurm.records import note
from miles.slurm.script import directive
from miles.slurm.states import FORGOTTEN, JobState, from_accounting, from_controller, job_state, of_parts, parse_accounting, watched, words

# squeue's lines of a job's parts: of Slurm 22.05, which prints what wait() says, and of 24.11.
CONTROLLER = (
    "15|14|1|CANCELLED|cpu0|2|15|2026-11-22T08:54:24|2026-11-22T08:54:30|2026-11-22T08:54:20|None\x1f/runs/100%%j/%j.log\x1e\n"
    "14|14|0|RUNNING|train[0-1]|2|0:0|2026-11-22T08:54:24|NONE|2026-11-22T08:54:20|None\x1f/runs/100%%j/%j.log\x1e\n"
)
ACCOUNTING = """17+0|17|PREEMPTED|0:0|train[0-1]|None
17+1|18|PREEMPTED|0:0|infer0|None
17+0|17|FAILED|9:0|train[2-3]|NonZeroExitCode
17+1|18|CANCELLED by 1000|0:0|infer1|None
"""


def test_a_silent_controller_is_waited_out() -> None:
    """While it is silent that is said once; the states of jobs that are over come last."""
    running, over = (JobState("7", state, "", (), "", 0, code) for state, code in (("RUNNING", None), ("COMPLETED", 0)))
    answers: list[JobState | None] = [running, None, None, over]

    def ask() -> list[JobState]:
        if (answer := answers.pop(0)) is None:
            raise UserError("squeue: silent")
        return [answer]

    said: list[str] = []
    assert list(watched(ask, said.append, 0.0)) == [[running], [over]]
    assert said == ["warning: squeue: silent; asked again until it answers"]


def test_components_of_a_job_in_the_controller() -> None:
    state = of_parts(parse(CONTROLLER))
    assert {(part.output, part.submitted) for part in parse(CONTROLLER)} == {("/runs/100%j/14.log", "2026-11-22T08:54:20")}
    assert state is not None
    assert (state.job_id, state.state, state.reason, state.nodes, state.restarts, state.exit_code, state.over) == (
        "14", "RUNNING", "component 1 is cancelled", "train[0-1],cpu0", 2, None, False,
    )  # fmt: skip
    assert [(each.job_id, each.group, each.state, each.nodes, each.exit_code) for each in state.components] == [
        ("14", 0, "RUNNING", "train[0-1]", None),
        ("15", 1, "CANCELLED", "cpu0", 143),
    ]
    assert of_parts(parse("")) is None


def test_the_last_execution_in_the_accounting() -> None:
    state = parse_accounting(ACCOUNTING)
    assert state is not None
    assert (state.job_id, state.state, state.reason, state.nodes, state.restarts, state.exit_code, state.over) == (
        "17", "FAILED", "ended with an error", "train[2-3],infer1", 1, 9, True,
    )  # fmt: skip
    assert [each.state for each in state.components] == ["FAILED", "CANCELLED"]
    assert parse_accounting("") is None


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Priority", "waits behind jobs of higher priority"),
        ("ReqNodeNotAvail,_UnavailableNodes:train0", "a node that it asks for, or enough nodes, are not available (UnavailableNodes:train0)"),
        ("QOSMaxGRESPerUser", "limit of its qos reached: max gresper user"),
        ("AssocGrpNodeLimit", "limit of its account reached: grp node limit"),
        ("SomeNewReason", "some new reason"),
        ("None", ""),
    ],
)
def test_reasons_in_words(reason: str, said: str) -> None:
    assert words(reason, "PENDING") == said


def test_a_job_that_completed_has_no_reason() -> None:
    """What stands there is of the execution before the requeue."""
    state = of_parts(parse("10|N/A|N/A|COMPLETED|train0|1|0|N/A|N/A|N/A|NonZeroExitCode\x1f\x1e\n"))
    assert state is not None
    assert (state.reason, job_words(state)) == ("", "10 completed, requeued 1 time, exit code 0")


def test_a_job_that_slurm_clears_up_behind_begins_nothing(tmp_path: Path) -> None:
    """What the run's files say of its end stands."""
    over, queued = (JobState("7", state, reason, (), "", 0, None) for state, reason in (("COMPLETING", ""), ("PENDING", "waits for enough free nodes")))
    found = [with_jobs(RunDir(tmp_path), Summary("run", str(tmp_path), "failed", "a bug"), jobs) for jobs in ([over], [over, queued])]
    assert [(each.state, each.reason) for each in found] == [("failed", "a bug"), ("queued", "waits for enough free nodes")]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (130, "52 ended (stopped by miles-submit cancel), exit code 130"),
        (78, "52 ended (the configuration or the input is wrong), exit code 78"),
        (75, "52 ended (the run goes on in another job, or its attempts brought nothing new), exit code 75"),
        (1, "52 failed (ended with an error), exit code 1"),
    ],
)
def test_exit_codes_of_a_run_in_words(code: int, said: str) -> None:
    state = of_parts(parse(f"52|N/A|N/A|FAILED|train0|0|{code}:0|N/A|N/A|N/A|NonZeroExitCode\x1f\x1e\n"))
    assert state is not None
    assert job_words(state) == said


def test_that_slurm_has_forgotten_matters_where_the_files_say_nothing(slurm: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in slurm.env().items():
        monkeypatch.setenv(name, value)
    run = RunDir(tmp_path)
    note(run, entry_of(run, 424242, "run", ["all"], "mini"))
    for state in ("finished", "stopped", "failed"):
        assert job_rows(run, [], Summary("run", str(tmp_path), state)) == [("job", "424242 ended")]
    ((_, text),) = job_rows(run, [], Summary("run", str(tmp_path), "lost"))
    assert text.startswith("424242 forgotten (Slurm no longer knows job 424242")


def settled(job: str) -> JobState:
    """The state once it is over."""
    deadline = time.monotonic() + 180
    while not (state := job_state(job)).over:
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
    return state


def test_jobs_of_a_real_cluster(slurm_accounting: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller and the accounting tell the same of each; none is ever unknown."""
    for name, value in slurm_accounting.env().items():
        monkeypatch.setenv(name, value)

    def submit(command: str, *options: str) -> str:
        lines = ["--partition=cpu --output=/dev/null", *options]
        text = "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in lines) + "#SBATCH hetjob\n#SBATCH --partition=h200\n" + command
        return slurm_accounting.run(["sbatch", "--parsable"], input=text).stdout.strip()

    comment = """it's a # "quoted" $HOME JobState=FAILED 'x'"""
    good, bad = submit("true", directive("comment", comment).removeprefix("#SBATCH ")), submit("exit 9")
    held, cancelled = submit("sleep 1000", "--hold"), submit("sleep 1000", "--begin=now+1hour")  # one that ran would have the signal's code
    assert f"Comment={comment} " in slurm_accounting.run(["scontrol", "-o", "show", "job", good]).stdout
    assert (job_state(held).state, job_state(held).reason, job_state(held).over) == ("PENDING", "held by its user; release it with scontrol release", False)
    slurm_accounting.run(["scancel", held, cancelled])
    for job, state, code in ((good, "COMPLETED", 0), (bad, "FAILED", 9), (held, "CANCELLED", 0), (cancelled, "CANCELLED", 0)):
        known = settled(job)
        assert (known.job_id, known.state, known.exit_code, len(known.components)) == (job, state, code, 2)
        deadline = time.monotonic() + 120
        while (recorded := from_accounting(job)) is None or not recorded.over or recorded.nodes != known.nodes:
            assert time.monotonic() < deadline, recorded
            time.sleep(0.1)
        assert (recorded.job_id, recorded.state, recorded.exit_code) == (job, state, code)
        assert from_controller(str(int(job) + 1)) is not None  # a component's own id leads there, too
    unknown = job_state("424242")
    assert unknown.over
    assert unknown.state == FORGOTTEN
    assert unknown.reason == "Slurm no longer knows job 424242: its controller forgets ended jobs, and there is no record of it in the accounting"


def test_without_accounting_and_without_controller(slurm: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in slurm.env().items():
        monkeypatch.setenv(name, value)
    job = slurm.run(["sbatch", "--parsable", "--partition=cpu", "--output=/dev/null", "--wrap=exit 3"]).stdout.strip()
    assert (settled(job).state, settled(job).exit_code, settled(job).reason) == ("FAILED", 3, "ended with an error")
    assert job_state("424242").state == FORGOTTEN
    assert from_accounting(job) is None
    text = re.sub(r"(?m)^(SlurmctldPort)=.*", r"\1=1", slurm.conf.read_text())  # nobody listens there
    (tmp_path / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(UserError, match=r"^squeue: "):
        job_state(job)
