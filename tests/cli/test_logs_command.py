"""`miles-submit logs`: tails, names, and following to the end of a run."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from demo_run import begin_attempt, empty_run, end_attempt

from miles.cli.logs import logs
from miles.config.exits import UserError
from miles.data.store.run_dir import RunDir
from miles.slurm.records import note

FOLLOW = "import sys; from pathlib import Path; from miles.cli.logs import logs; sys.exit(logs(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None, True, 5))"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = empty_run(tmp_path / "run")
    epoch = begin_attempt(made)
    write(made, epoch, "trainer.0", "".join(f"train {number}\n" for number in range(40_000)))
    write(made, epoch, "engine.0", "engine up\n")
    write(made, epoch, "engine.1", "second engine up\nhalf a li")
    return made


def write(run: RunDir, epoch: int, name: str, text: str) -> None:
    with (run.attempt(epoch) / "logs" / f"{name}.log").open("a") as file:
        file.write(text)


def test_a_submitted_run_is_followed_where_slurm_is_silent(run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or not there: its files still speak."""
    monkeypatch.setenv("SLURM_CONF", "/nope/slurm.conf")
    entry = {"job_id": 7, "name": "run", "groups": ["all"], "time": 0.0, "cluster": "mini", "submitted": "", "output": str(run.path / "slurm" / "7.log"), "run_dir": str(run.path)}
    note(run, entry)
    begun = threading.Timer(1.0, lambda: end_attempt(run, 1, 0, "finished"))
    begun.start()
    assert logs(run.path, "trainer", True, 1) == 0
    assert capsys.readouterr().out == "train 39999\n── attempt 1 ended: finished (exit code 0) ──\n"


def test_last_lines_of_one_component(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(run.path, "trainer", False, 3) == 0
    assert capsys.readouterr().out == "train 39997\ntrain 39998\ntrain 39999\n"


def test_all_components_with_their_names(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(run.path, None, False, 1) == 0
    assert capsys.readouterr().out == "engine.0  │ engine up\nengine.1  │ second engine up\ntrainer.0 │ train 39999\n"


def test_one_process_of_a_component(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(run.path, "engine.0", False, 9) == 0
    assert capsys.readouterr().out == "engine up\n"
    assert logs(run.path, "trainer", False, 0) == 0
    assert capsys.readouterr().out == ""


def test_unknown_component_is_answered_with_the_list(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"^traner: attempt 1 has no such log; it has engine, trainer$"):
        logs(run.path, "traner", False, 3)
    with pytest.raises(UserError, match="traner"):
        logs(run.path, "traner", True, 3)


def test_no_attempt_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no attempt has been made yet"):
        logs(empty_run(tmp_path / "new").path, None, False, 3)
    with pytest.raises(UserError, match="no such run directory"):
        logs(tmp_path / "missing", None, False, 3)


def test_an_attempt_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = empty_run(tmp_path / "run")
    begin_attempt(run)
    assert logs(run.path, None, False, 3) == 0
    assert capsys.readouterr().out == "attempt 1 has no logs yet\n"


def test_newest_attempt_counts(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, begin_attempt(run), "trainer.0", "again\n")
    assert logs(run.path, None, False, 9) == 0
    assert capsys.readouterr().out == "again\n"


def test_long_lines_and_foreign_bytes(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with (run.attempt(1) / "logs" / "worker.0.log").open("wb") as file:
        file.write(b"x" * 200_000 + b"\n 0 %|   |\r 50 %|#  |\r[bold]\xff\r\n")
    assert logs(run.path, "worker", False, 2) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "x" * 200_000
    assert second == "[bold]\ufffd"


class Follower:
    """`logs -f` in a process of its own, its lines with the time they came."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", FOLLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, line: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while line not in self.lines:
            assert time.monotonic() < deadline, (line, self.lines)
            time.sleep(0.02)

    def end(self) -> int:
        code = self.process.wait(timeout=120)
        self.reader.join(timeout=60)
        return code


def test_follow_goes_on_through_attempts_to_the_end(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    epoch = begin_attempt(run)
    write(run, epoch, "trainer.0", "one\ntw")
    follower = Follower(str(run.path))
    follower.wait_for("one")
    write(run, epoch, "trainer.0", "o\n")
    follower.wait_for("two")
    write(run, epoch, "worker.0", "hello\n")
    follower.wait_for("worker.0  │ hello")
    end_attempt(run, epoch, 75, "worker 0 was killed by SIGKILL")
    epoch = begin_attempt(run)
    follower.wait_for("── attempt 2 ──")
    write(run, epoch, "trainer.0", "three\nunfinished")
    follower.wait_for("trainer.0 │ three")
    assert follower.process.poll() is None
    end_attempt(run, epoch, 0, "finished")
    assert follower.end() == 0
    assert follower.lines[-2:] == ["trainer.0 │ unfinished", "── attempt 2 ended: finished (exit code 0) ──"]
    assert follower.lines.count("one") == 1


def test_follow_ends_after_a_crash_that_nobody_restarts(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    epoch = begin_attempt(run)
    write(run, epoch, "trainer.0", "last words\n")
    end_attempt(run, epoch, 75, "no service")
    follower = Follower(str(run.path), "trainer")
    assert follower.end() == 0
    assert follower.lines[-1] == "── attempt 1 ended: no service (exit code 75) ──"


def test_follow_of_a_run_that_has_ended_prints_and_returns(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    end_attempt(run, 1, 78, "rollout.reward.path: no such function")
    assert logs(run.path, "engine", True, 5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["engine.0 │ engine up", "engine.1 │ second engine up"]
    assert lines[2:] == ["engine.1 │ half a li", "── attempt 1 ended: rollout.reward.path: no such function (exit code 78) ──"]
