"""Diagnosers on evidence as real failures left it, and on evidence that fits nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miles.cli.doctor import doctor
from miles.config.compose import dump_config, load_config
from miles.config.exits import OK, UserError
from miles.data.store.files import seal_json
from miles.data.store.run_dir import RunDir
from miles.slurm.doctor.diagnosers import diagnose
from miles.slurm.doctor.evidence import Ended, Evidence, Line
from miles.slurm.doctor.gather import TAIL_BYTES, gather, homes, tail
from miles.slurm.sole import only_launcher
from miles.slurm.states import JobState, parse_accounting

DEAD = Evidence("/runs/a", attempts=(Ended(1, {"code": 1, "role": "trainer", "rank": 1, "reason": "trainer 1 ended with exit code 1"}, job=7, nodes=("n0", "n1")),), homes={"trainer.0": "n0", "trainer.1": "n1"}, free_bytes=1 << 40)


def job(state: str, reason: str = "", code: int | None = 1) -> JobState:
    return JobState("7", state, reason, (), "n[0-1]", 0, code)


def ended(**outcome: object) -> Evidence:
    return replace(DEAD, attempts=(replace(DEAD.attempts[0], outcome=outcome),))


# A line as it is written by those who write it (drivers, PyTorch, NCCL, gloo, Slurm), and what it must be taken for.
LINES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.12 GiB is free.", "gpu_memory"),
    ("[4321.012] NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", "xid"),
    ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "gpu_fault"),
    ("OSError: [Errno 28] No space left on device: '/runs/a/batches/step_000004'", "disk_full"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.", "memory"),
    ("[rank1]:[E1122] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, Timeout(ms)=600000) ran for 600041 milliseconds", "collective_timeout"),
    ("RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.77.2]:41234", "connection_lost"),
    ("node1:812:931 [0] NCCL WARN NET/IB : Got completion from peer 10.0.0.2<41234> with status=12 opcode=0", "nccl_network"),
    ("slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-22T05:00:00 DUE TO TIME LIMIT ***", "time_limit"),
    ("slurmstepd: error: *** JOB 7 ON n0 CANCELLED AT 2026-11-22T05:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", "node_failed"),
    ("srun: error: Unable to create step for job 7: Memory required by task is not available", "launch"),
    ("/opt/miles/bin/python: No module named miles", "library"),
    ("OSError: [Errno 116] Stale file handle: '/runs/a/journal'", "stale_files"),
    ("OSError: [Errno 98] Address already in use", "port"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "cause"), LINES, ids=[cause for _, cause in LINES])
def test_a_line_of_a_log(text: str, cause: str) -> None:
    """The cause, the node whose log it is, and the line, word for word."""
    line = Line("attempts/000001/logs/trainer.1.log:42", text, "trainer.1")
    noise = Line("attempts/000001/logs/trainer.0.log:3", "step 3: loss 0.25, reward 0.5", "trainer.0")
    found = {each.cause: each for each in diagnose(replace(DEAD, logs=(noise, line)))}
    assert found[cause].evidence[0] == line
    assert found[cause].node == "n1"
    assert "connection_lost" not in found or cause == "connection_lost"


def test_ordinary_lines_are_no_signs() -> None:
    lines = ["NCCL version 2.27.5+cuda12.9", "step 12 of 20 (rollout)", "saved checkpoint step_000012", "INFO: 127.0.0.1 - POST /generate 200 OK", "pyxis: importing docker image: lmsysorg/sglang", "Timeout of requests: 600 s"]
    seen = replace(ended(code=75, role="train", rank=0, reason="component train was stopped"), logs=tuple(Line(f"x.log:{n}", text) for n, text in enumerate(lines)))
    assert diagnose(seen) == []


def test_the_cause_comes_before_its_echo() -> None:
    """One rank runs out of memory, the others lose their connection to it."""
    lines = (
        Line("attempts/000001/logs/trainer.0.log:9", "RuntimeError: Connection closed by peer [10.0.0.2]:5", "trainer.0"),
        Line("attempts/000001/logs/trainer.1.log:9", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB", "trainer.1"),
    )
    causes = [each.cause for each in diagnose(replace(DEAD, logs=lines))]
    assert causes.index("gpu_memory") < causes.index("crashed") < causes.index("connection_lost")


def test_a_bug_names_its_exception_and_place() -> None:
    log = "attempts/000001/logs/trainer.1.log"
    lines = [Line(f"{log}:{n}", text, "trainer.1") for n, text in enumerate(["Traceback (most recent call last):", '  File "/home/me/own.py", line 3, in reward', "KeyError: 'answer'"], 1)]
    (found,) = diagnose(replace(DEAD, logs=tuple(lines)))
    assert (found.cause, found.happened, found.node) == ("crashed", "trainer 1 raised KeyError: 'answer'", "n1")
    assert [line.where for line in found.evidence] == [f"{log}:3", f"{log}:2", "attempts/000001/exit.json"]


def test_a_hung_rank_is_named_with_its_node() -> None:
    """As the watchdog leaves it: the fault's node counts, not that of the service that wrote it."""
    message = "trainer 1 on node n1 hangs: it says nothing since 61 s (last heard in phase train of step 3, at backward), and no rank got on for 60 s; stacks are in the trainers' logs"
    fault = {"code": 75, "role": "trainer", "rank": 1, "node": "n1", "message": message}
    stacks = Line("attempts/000001/logs/trainer.0.log:7", "trainer 0: the run hangs; the stacks of all threads:", "trainer.0")
    seen = ended(code=75, role="trainer", rank=1, node="n1", reason=message, told=True)
    seen = replace(seen, attempts=(replace(seen.attempts[0], faults=(("attempts/000001/logs/fault.service.0.json", fault),)),), logs=(stacks,))
    first = diagnose(seen)[0]
    assert (first.cause, first.node, first.evidence[1]) == ("hung", "n1", stacks)


@pytest.mark.parametrize(
    ("state", "cause"), [("TIMEOUT", "time_limit"), ("PREEMPTED", "preempted"), ("NODE_FAIL", "node_failed"), ("OUT_OF_MEMORY", "memory"), ("CANCELLED", "cancelled"), ("PENDING", "pending"), ("RUNNING", "alive")]
)  # fmt: skip
def test_states_of_the_job(state: str, cause: str) -> None:
    """Attempts that left no word: Slurm's is the first cause."""
    seen = replace(DEAD, attempts=(replace(DEAD.attempts[0], outcome=None),), jobs=(job(state, code=None if state in ("PENDING", "RUNNING") else 1),))
    assert diagnose(seen)[0].cause == cause


def test_exit_codes_of_a_run_are_in_words() -> None:
    """As `status` has them: Slurm calls a run that was cancelled failed."""
    seen = replace(DEAD, attempts=(), jobs=(job("FAILED", code=130),), cancelled=frozenset({7}))
    told = [line.text for found in diagnose(seen) for line in found.evidence if line.where == "Slurm, job 7"]
    assert told[:1] == ["ended (exit code 130): stopped by miles-submit cancel"]


def test_slurms_line_names_the_node_that_failed() -> None:
    """As a node left it that came back at once: its state says nothing any longer."""
    line = Line("attempts/000001/submitit/rollout/7_srun.err:2", "srun: error: Node failure on infer0")
    seen = replace(DEAD, attempts=(replace(DEAD.attempts[0], outcome=None),), jobs=(job("NODE_FAIL"),), logs=(line,))
    first = diagnose(seen)[0]
    assert (first.cause, first.node, first.evidence[1]) == ("node_failed", "infer0", line)
    assert "cluster.groups.all.exclude=infer0" in first.mend


def test_resume_without_a_checkpoint_begins_again() -> None:
    seen = replace(ended(code=75, role="worker", rank=0, reason="worker 0 was killed by SIGKILL", killed=True), saved=False)
    assert "begins again" in diagnose(seen)[0].mend
    assert "last good checkpoint" in diagnose(replace(seen, saved=True))[0].mend


def test_a_run_of_this_machine_that_lives_is_not_dead(tmp_path) -> None:
    """Its launcher holds the folder; an attempt without a word is told from one that goes on."""
    config = load_config(["recipes/tiny"])
    (tmp_path / "run.yaml").write_text(dump_config(config))
    (tmp_path / "attempts" / "000001").mkdir(parents=True)
    assert [each.cause for each in diagnose(gather(RunDir(tmp_path)))] == ["no_word"]
    with only_launcher(RunDir(tmp_path)):
        assert [each.cause for each in diagnose(gather(RunDir(tmp_path)))] == ["alive"]


def test_a_sweep_is_no_run(tmp_path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="a sweep; give one of its runs"):
        gather(RunDir(tmp_path))


def test_accounting_of_a_component_that_ran_out_of_memory() -> None:
    """sacct's rows of a heterogeneous job: the second group's node is to blame."""
    state = parse_accounting("7+0|7|CANCELLED by 0|0:15|n0|None\n7+1|8|OUT_OF_MEMORY|0:125|n1|OutOfMemory\n")
    assert state is not None
    seen = replace(DEAD, attempts=(replace(DEAD.attempts[0], outcome=None),), jobs=(state,))
    found = {each.cause: each for each in diagnose(seen)}
    assert found["memory"].node == "n1"


def test_broken_nodes_disk_and_budget() -> None:
    seen = replace(ended(code=75, role="rollout", rank=0, reason="the supervisor of component rollout on n1 was killed", killed=True), broken_nodes={"n1": "Slurm says DOWN+NOT_RESPONDING"}, jobs=(job("FAILED", code=75),))
    gave_up = Line("slurm/7.log:12", "2026-11-22 05:00:00 gave up after 4 attempts without a new step (cluster.restarts); look at: miles-submit status /runs/a")
    assert [each.cause for each in diagnose(replace(seen, logs=(gave_up,)))] == ["node_failed", "killed", "budget"]
    assert diagnose(replace(seen, free_bytes=4096))[0].cause == "disk_full"


def test_what_is_killed_in_a_stop_is_the_stops_doing() -> None:
    """As `scontrol requeue` left it: Slurm's SIGTERM reached a worker before the run had ended."""
    seen = ended(node="n0", code=75, role="worker", rank=0, reason="worker 0 was killed by SIGTERM", killed=True, stopped=True, goes_on=True)
    found = diagnose(replace(seen, attempts=(replace(seen.attempts[0], stop_by="slurm"),)))
    assert [each.cause for each in found] == ["stopped", "killed"]
    assert found[0].evidence[0] == Line("attempts/000001/stop.json", "by slurm")


def test_pending_for_ever_is_told_from_a_queue() -> None:
    waits = diagnose(replace(DEAD, attempts=(), jobs=(job("PENDING", "waits for enough free nodes", None),)))[0]
    never = diagnose(replace(DEAD, attempts=(), jobs=(job("PENDING", "held by its user; release it with scontrol release", None),)))[0]
    assert waits.mend.startswith("wait")
    assert never.mend.startswith("mend what the reason names")


def test_nothing_is_guessed_of_a_job_that_never_left_the_queue() -> None:
    """Neither that its script could not begin, where it was cancelled or forgotten without a word; a job that failed did begin."""
    causes = {state: [each.cause for each in diagnose(replace(DEAD, attempts=(), jobs=(replace(job(state), nodes=""),)))] for state in ("CANCELLED", "FORGOTTEN", "FAILED")}
    assert causes == {"CANCELLED": ["cancelled"], "FORGOTTEN": ["forgotten"], "FAILED": ["never_started"]}


def test_nothing_known_fits() -> None:
    assert diagnose(ended(code=75, role="train", rank=0, reason="component train was stopped")) == []


def test_the_end_of_a_long_log_keeps_its_line_numbers(tmp_path) -> None:
    path = tmp_path / "trainer.3.log"
    many = TAIL_BYTES // 50
    path.write_text("".join(f"line {n:06d} {'x' * 90}\n" for n in range(1, many + 1)))
    lines = tail(path, "logs/trainer.3.log")
    assert len(lines) < many
    assert lines[-1].where == f"logs/trainer.3.log:{many}"
    assert lines[-1].text.startswith(f"line {many:06d}")
    assert lines[-1].log == "trainer.3"


def test_homes_of_roles_in_two_groups() -> None:
    """2 nodes × 2 ranks, then a node with the engine and its worker; of a job of the trainer's nodes alone the engine's home is not known."""
    config = load_config(["recipes/tiny"], ["cluster.executor=slurm", "cluster.placement=het", "train.num_nodes=2", "train.num_gpus_per_node=2", "cluster.gpus_per_node=2"])
    found = homes(config, ("a", "b", "c"))
    assert found == {"service.0": "a", "trainer.0": "a", "trainer.1": "a", "trainer.2": "b", "trainer.3": "b", "engine.0": "c", "worker.0": "c"}
    assert "engine.0" not in homes(config, ("a", "b"))


def test_a_sentence_is_said_once(tmp_path, capsys) -> None:
    """However many files have it."""
    reason = "data.prompt_data: /data/train.jsonl: no such file; did you mean /data/train.json?"
    (tmp_path / "run.yaml").write_text(dump_config(load_config(["recipes/tiny"])))
    (tmp_path / "attempts" / "000001").mkdir(parents=True)
    seal_json(tmp_path / "attempts" / "000001" / "exit.json", {"code": 78, "role": "service", "rank": 0, "reason": reason, "killed": False})
    assert doctor(tmp_path, as_json=False) == OK
    said = capsys.readouterr().out
    assert (said.count(reason), said.count("attempts/000001/exit.json: as said above")) == (1, 1)


def test_a_folder_that_is_no_run(tmp_path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        gather(RunDir(tmp_path))
