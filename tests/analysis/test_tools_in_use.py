"""The scripts of tools/analyze as they are used: piped to what doesn't read to the end, beside a run that is being written, with names that can't be written to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import random_run
from script import TOOLS, script

from miles.config.exits import UserError

NAMES = ("logprob_mismatch", "rollout_stats", "routing", "speculative", "timeline", "compare_runs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    random_run(folder, seed=4, longest=90)
    (folder / "events").mkdir()
    (folder / "events/trainer.0.1.jsonl").write_text('{"phase": "train", "step": 1, "start": 1, "end": 2}\n{"phase": "train", "step": 2, "start": 2, "end": 4}\n')
    return folder


def arguments(name: str, run: Path, other: Path) -> list[Path]:
    return [run, other] if name == "compare_runs" else [run]


def left(name: str, *words: object) -> tuple[int, str]:
    """Exit code and errors of a script whose reader leaves before it says a word."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, TOOLS / f"{name}.py", *map(str, words)], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    finally:
        os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_leaves_changes_no_exit_code(whole: Path, form: list[str]) -> None:
    assert left("logprob_mismatch", whole, *form) == (0, "")
    assert left("logprob_mismatch", whole, *form, "--above", "abs_diff=1e-9") == (1, "")
    assert left("rollout_stats", whole, *form) == (0, "")


def test_a_reader_that_leaves_learns_no_more_of_runs_that_differ(whole: Path, tmp_path: Path) -> None:
    random_run(tmp_path / "other", seed=5, longest=90)
    code, said = left("compare_runs", whole, tmp_path / "other", "--same")
    assert (code, said.count("\n"), said.startswith("FAILED: the runs differ")) == (1, 1, True)


def test_without_stdout_the_page_is_written(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "timeline.py"), str(whole), "--html", str(tmp_path / "page.html")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr, (tmp_path / "page.html").is_file()) == (0, "", True)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_that_cannot_be_written_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    os.mkfifo(tmp_path / "pipe")  # opened to see whose it is, it would wait for ever
    words = arguments(name, whole, tmp_path / "copy")
    for target, expected in (("/proc/self/page.html", "nothing can be written to /proc/self"), ("/proc/page.html", "can't be written"), (tmp_path / "no/page.html", "there is no folder"), (tmp_path, "is a folder"), (tmp_path / "pipe", "is no plain file")):
        with pytest.raises(UserError, match=f"^{target}: .*{expected}"):
            script(name, *words, "--html", target)


def test_a_trace_or_setting_that_cannot_be_written_is_named(whole: Path) -> None:
    with pytest.raises(UserError, match=r"^/proc/trace.json: can't be written"):
        script("timeline", whole, "--chrome", "/proc/trace.json")
    with pytest.raises(UserError, match=r"^/proc/setting.yaml: can't be written"):
        script("logprob_mismatch", whole, "--recommend", "/proc/setting.yaml")


@pytest.mark.parametrize("name", ["rollout_stats", "routing", "speculative", "timeline", "compare_runs"])
def test_where_a_page_goes_is_asked_before_the_run_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"page.html: there is no folder"):
        script(name, *arguments(name, tmp_path / "nowhere", tmp_path / "else"), "--html", tmp_path / "no/page.html")


@pytest.mark.parametrize(("name", "place"), [
    (name, f"{folder}{step}")
    for folder, names in {"batches": ("logprob_mismatch", "rollout_stats", "routing", "speculative", "compare_runs"), "train": ("logprob_mismatch", "routing", "compare_runs")}.items()
    for name in names
    for step in ("", "/step_000002")
])  # fmt: skip
@pytest.mark.parametrize("what", ["a file", "a link to a disk that isn't there"])
def test_what_is_no_folder_of_a_step_is_named(name: str, place: str, what: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / place)
    if what == "a file":
        (run / place).write_bytes(b"")
    else:
        (run / place).symlink_to("/mnt/gone")
    expected = "no folder" if what == "a file" else "a link to /mnt/gone, which isn't there"
    with pytest.raises(UserError, match=f"^{run / place}: {expected}, and "):
        script(name, *arguments(name, run, whole))
    if place.endswith("2"):
        assert script(name, *arguments(name, run, whole), "--last", 1) == 0


def growing(run: Path) -> None:
    """The next step as it is while a worker seals and a trainer trains: no manifest, temporary files, a folder that is still empty."""
    batch = run / "batches/step_000004"
    shutil.copytree(run / "batches/step_000003", batch)
    (batch / "manifest.json").unlink()
    (batch / ".rollout.1.h5.77.abcdef01.tmp").write_bytes(b"\x89HDF")
    (run / "batches/journal").mkdir()
    (run / "batches/journal/0.1.log").write_bytes(b"\x10\x00")
    (run / "batches/step_000009.aside.1").mkdir()
    (run / "train/step_000004").mkdir()
    (run / "train/step_000004/.node_0000.h5.78.abcdef02.tmp").write_bytes(b"")
    (run / "train/step_000003/.node_0001.h5.79.abcdef03.tmp").write_bytes(b"")
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "rol')


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_being_written_is_read_as_far_as_it_is_sealed(name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for grows in (False, True):
        if grows:
            growing(run)
        assert script(name, *arguments(name, run, whole), "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]



def test_an_error_with_a_name_of_any_bytes_is_one_line(tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"no\n\x1b[2J\xff")
    done = subprocess.run([sys.executable, TOOLS / "rollout_stats.py", name], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == f"error: {tmp_path}/no\\n\\x1b[2J\\udcff: no such folder; give a run directory\n"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_immense_integers_in_metrics_are_no_traceback(form: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, loss in (("a", 10**400), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text("num_rollout: 2\n")
        lines = [{"step": step, "kind": "rollout", "time": 1e9 + step, "train/loss": loss if step == 2 else 1} for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert script("compare_runs", tmp_path / "a", tmp_path / "b", *form) == 0
    assert "loss" in capsys.readouterr().out
