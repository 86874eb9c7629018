"""Submitting to a real Slurm: what is written is what is submitted, all jobs or none, chains and jobs that go together. All are held: nothing runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.cli.main import main
from miles.config.compose import load_config
from miles.config.exits import OK, WRONG, UserError
from miles.config.schema import RunConfig
from miles.data.store.files import seal_json
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster import Cluster
from miles.slurm.records import submitted
from miles.slurm.submission import prepare, submit

GROUPS = ["cluster.groups.train={partition: gb300, gpu_type: gb300, gpus_per_node: 4}", "cluster.groups.rollout={partition: h200, gpu_type: h200, gpus_per_node: 8}"]
HELD = ["cluster.executor=slurm", "cluster.groups.all.time=60", "cluster.groups.all.sbatch.hold=null"]


@pytest.fixture
def here(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    yield slurm
    for job in queue(slurm):
        slurm.run(["scancel", job])


def queue(cluster: Cluster) -> dict[str, str]:
    """Job ids (leaders of heterogeneous ones), and why they wait."""
    lines = cluster.run(["squeue", "-h", "-o", "%i|%r"]).stdout.splitlines()
    return {line.split("|")[0].removesuffix("+0"): line.split("|")[1] for line in lines if "+" not in line or "+0|" in line}


def config(*overrides: str) -> RunConfig:
    return load_config(["recipes/tiny"], [*HELD, *overrides])


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["miles-submit", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    "overrides",
    [["cluster.placement=het", *GROUPS], ["cluster.placement=colocate", "cluster.groups.all.partition=cpu", "train.num_nodes=2"], ["cluster.placement=jobs", *GROUPS]],
    ids=["het", "colocate", "jobs"],
)  # fmt: skip
def test_render_writes_what_run_submits(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], overrides: list[str]) -> None:
    """Byte for byte: the files of render and of run, and the script that Slurm got; and by hand the same job comes of it."""
    folder, words = tmp_path / "a run", ["recipes/tiny", *HELD, *overrides]
    assert command(monkeypatch, "render", str(folder), *words) == OK
    lines = capsys.readouterr().out.splitlines()
    rendered = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in rendered} >= {"run.yaml", "plan.json"}
    assert command(monkeypatch, "run", *words, "--run-dir", str(folder)) == OK
    assert {path: (folder / path).read_bytes() for path in rendered} == rendered
    assert {path.relative_to(folder).name for path in folder.rglob("*") if path.is_file()} - {path.name for path in rendered} == {"job.json", "job.lock", "chain.json"}
    entries = json.loads((folder / "slurm" / "job.json").read_text())["submissions"]
    assert [entry["groups"] for entry in entries] == ([["train"], ["rollout"]] if "cluster.placement=jobs" in overrides else [["train", "rollout"]] if GROUPS[0] in overrides else [["all"]])
    for entry, line in zip(entries, lines, strict=True):
        written = folder / "slurm" / f"{'-'.join(entry['groups'])}.sbatch"
        by_hand = here.run(["bash", "-c", line]).stdout.strip()
        for job in (str(entry["job_id"]), by_hand):  # of a heterogeneous job sbatch leaves the empty lines out
            kept = here.run(["scontrol", "write", "batch_script", job, "-"]).stdout
            assert list(filter(None, kept.splitlines())) == list(filter(None, written.read_text().splitlines()))


def test_all_jobs_or_none(here: Cluster, tmp_path: Path) -> None:
    """The second job is refused by Slurm: the first is taken back, and nothing is on record."""
    run = RunDir(tmp_path / "run")
    first, _ = prepare(config("cluster.placement=jobs", *GROUPS), run)
    _, second = prepare(config("cluster.placement=jobs", *GROUPS, "cluster.groups.rollout.partition=nowhere"), run)
    with pytest.raises(UserError, match="invalid partition"):
        submit(run, [first, second])
    assert queue(here) == {}
    assert submitted(run) == []


@pytest.mark.parametrize("placement", ["het", "colocate"])
def test_a_chain_waits_for_itself(here: Cluster, tmp_path: Path, placement: str) -> None:
    """One job after another, by their name; a run of the same name in another folder doesn't wait for it."""
    overrides = [f"cluster.placement={placement}", "cluster.slurm.requeue=chain", "cluster.slurm.chain=3", *(GROUPS if placement == "het" else ["cluster.groups.all.partition=cpu"])]
    free = load_config(["recipes/tiny"], ["cluster.executor=slurm", "cluster.groups.all.time=60", "cluster.groups.all.sbatch={begin: now+1hour}", *overrides])
    run, other = RunDir(tmp_path / "run"), RunDir(tmp_path / "other")
    jobs = [str(entry["job_id"]) for entry in submit(run, prepare(free, run))]
    assert len(jobs) == 3
    stranger = str(submit(other, prepare(free, other)[:1])[0]["job_id"])
    reasons = queue(here)
    assert [reasons[job] for job in (jobs[1], jobs[2])] == ["Dependency", "Dependency"]
    assert {reasons[jobs[0]], reasons[stranger]} <= {"BeginTime", "None"}
    assert [entry["job_id"] for entry in submitted(run)] == [int(job) for job in jobs]


def test_nodes_that_failed_are_left_out(here: Cluster, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    (run.path / "slurm").mkdir(parents=True)
    seal_json(run.path / "slurm" / "exclude.json", {"nodes": {"train2": {"reason": "test"}}})
    (entry,) = submit(run, prepare(config("cluster.placement=het", *GROUPS, "cluster.groups.train.exclude=train1"), run))
    said = here.run(["scontrol", "-o", "show", "job", str(entry["job_id"])]).stdout.splitlines()
    assert ["ExcNodeList=train[1-2]" in line for line in sorted(said, key=lambda line: "HetJobOffset=1" in line)] == [True, False]
    assert "ExcNodeList=train2" in next(line for line in said if "HetJobOffset=1" in line)


def test_a_folder_that_is_no_run_is_not_rendered_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert command(monkeypatch, "render", str(tmp_path), "recipes/tiny", *HELD) == WRONG
    assert "not empty, and not a run" in capsys.readouterr().err
    assert command(monkeypatch, "render", str(tmp_path / "new"), "recipes/tiny") == WRONG
    assert "submits nothing; compose with a cluster" in capsys.readouterr().err
