"""`miles-submit status`: from files, and from a service that answers."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # the demo run's maker lives beside the report's tests
from demo_run import begin_attempt, demo_run, empty_run, end_attempt, record_step

from miles.cli.inspect import inspect
from miles.cli.status import call_service, state_of, status
from miles.config.exits import UserError
from miles.data.store.run_dir import RunDir
from miles.report.build import render
from miles.report.records import read_run
from miles.report.summary import duration, steps_behind, summarise
from miles.report.tiles import tiles

TOKEN = "a-token-of-the-test"


@pytest.fixture
def service() -> Iterator[tuple[str, dict[str, Any]]]:
    """A real HTTP server with /status behind a bearer token; its answer can be changed."""
    answer: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.path == "/status" and self.headers["Authorization"] == f"Bearer {TOKEN}"
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answer if allowed else {"error": "token"}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", answer
        server.shutdown()
        thread.join()


def make_reachable(run: RunDir, epoch: int, url: str, token: str = TOKEN) -> None:
    (run.attempt(epoch) / "service.json").write_text(json.dumps({"url": url, "run_dir": str(run.path)}))
    (run.attempt(epoch) / "token").write_text(token)


def make_old(run: RunDir) -> None:
    """Nothing has been written for an hour."""
    old = time.time() - 3600
    for path in [*run.path.rglob("*"), run.path]:
        os.utime(path, (old, old), follow_symlinks=False)


def test_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = demo_run(tmp_path / "run", batches=False)
    assert status(run.path, True) == 0
    told = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rollouts = [line for line in lines if line["kind"] == "rollout"]
    evals = [line for line in lines if line["kind"] == "eval"]
    assert told["state"] == "finished"
    assert (told["run"], told["step"], told["steps_done"], told["total_steps"]) == ("arithmetic-demo", 52, 52, 52)
    assert told["reward_mean"] == rollouts[-1]["rollout/raw_reward"]
    assert (told["accuracy"], told["accuracy_low"], told["accuracy_high"]) == tuple(evals[-1][f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
    assert (told["epoch"], told["attempts"], told["restarts"], told["tier"], told["checkpoint"]) == (2, 2, 1, "exact", 52)
    assert told["seconds_left"] is None
    assert told["alive"] is False


def test_plain_lines_when_not_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = demo_run(tmp_path / "run", batches=False)
    assert status(run.path, False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "state: finished" in lines
    assert "step: 52 of 52 (100 %), rollout" in lines
    assert "attempt: 2 (1 restart)" in lines
    assert not any("\x1b" in line for line in lines)


def test_a_resume_is_no_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = demo_run(tmp_path / "run", rollouts=3, batches=False, restarts=0)
    end_attempt(run, 1, 75, "stopped on request after step 15", stopped=True)
    begin_attempt(run)
    assert status(run.path, False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "attempt: 2" in lines
    assert next(tile.note for tile in tiles(read_run(run.path), summarise(read_run(run.path))) if tile.name == "Attempts") == "no restart; resumed by hand 1 time"


def test_a_stop_with_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=3, batches=False, restarts=0)
    end_attempt(run, 1, 75, "stopped on request after step 15", stopped=True)
    assert state_of(run.path).reason == f"stopped on request; resume with `miles-submit run {run.path}`"


def test_speed_is_a_batch_by_the_seconds_of_its_step(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=3, batches=False)
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    events = [json.loads(line) for line in run.event_file("trainer", 0, 2).read_text().splitlines()]
    seconds = sum(event["end"] - event["start"] for event in events if event["step"] == last["step"] and event["phase"] not in ("eval", "save"))
    assert state_of(run.path).tokens_per_second == pytest.approx(last["rollout/tokens"] / seconds)


@pytest.mark.parametrize(
    ("code", "more", "state", "reason"),
    [
        (78, {}, "failed", "data.prompt_data: no such file"),
        (1, {}, "failed", "data.prompt_data: no such file (exit code 1)"),
        (75, {}, "stopped", "data.prompt_data: no such file; no checkpoint yet: `miles-submit run"),
        (75, {"stopped": True}, "stopped", "stopped on request; no checkpoint yet: `miles-submit run"),
        (0, {"stopped": True}, "stopped", "stopped on request; no checkpoint yet: `miles-submit run"),
        (0, {}, "finished", ""),
    ],
)
def test_how_a_run_ended(tmp_path: Path, code: int, more: dict[str, Any], state: str, reason: str) -> None:
    run = empty_run(tmp_path / "run")
    end_attempt(run, begin_attempt(run), code, "data.prompt_data: no such file", **more)
    found = state_of(run.path)
    assert found.state == state
    assert found.reason.startswith(reason)


def test_a_run_that_stopped_early_says_how_to_go_on(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run", {"num_rollout": 5, "debug": {"stop_after": 2}})
    epoch = begin_attempt(run)
    run.checkpoint(2).mkdir(parents=True)
    (run.checkpoint(2) / "COMPLETE").write_text("{}")
    end_attempt(run, epoch, 0, "stopped after step 2 (debug.stop_after)", stopped=True)
    found = state_of(run.path)
    assert (found.state, found.reason) == ("stopped", f"stopped after step 2 (debug.stop_after); resume with `miles-submit run {run.path} debug.stop_after=null`")


def test_stages_of_a_life(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    assert (state_of(run.path).state, state_of(run.path).attempts) == ("new", 0)
    epoch = begin_attempt(run)
    assert state_of(run.path).state == "starting"
    now = time.time()
    record_step(run, epoch, 1, "sft", now - 4)
    record_step(run, epoch, 2, "sft", now)
    found = state_of(run.path)
    assert (found.state, found.alive) == ("running", False)
    assert found.seconds_per_step == pytest.approx(4, abs=0.5)
    assert found.seconds_left == pytest.approx(50 * 4, abs=25), "52 steps, 2 done"
    make_old(run)
    found = state_of(run.path)
    assert found.state == "lost"
    assert "without a word" in found.reason


def test_a_living_service_is_asked_with_the_token(tmp_path: Path, service: tuple[str, dict[str, Any]]) -> None:
    url, answer = service
    run = empty_run(tmp_path / "run")
    epoch = begin_attempt(run)
    make_reachable(run, epoch, url)
    make_old(run)
    answer |= {"run": "arithmetic-demo", "epoch": epoch, "phase": "generate", "kind": "rollout", "step": 20, "total_steps": 52, "reward_mean": 0.5, "seconds_per_step": 2.0}
    found = state_of(run.path)
    assert (found.state, found.alive, found.phase, found.step, found.reward_mean) == ("running", True, "generate", 20, 0.5)
    assert found.seconds_left == pytest.approx((52 - 19) * 2.0), "step 20 is being made, 19 are done"
    answer.clear()
    assert state_of(run.path).alive, "an answer may lack every key"
    shutil.copytree(run.path, tmp_path / "copy", symlinks=True)
    copied = state_of(tmp_path / "copy")
    assert not copied.alive, "the service is the original's"
    assert (copied.state, copied.reason.partition(":")[0]) == ("lost", f"attempt 1 was made in {run.path}, of which this is a copy")
    assert call_service(read_run(tmp_path / "copy"), "POST", "/stop") is None


def test_a_wrong_token_or_a_dead_service_leaves_the_files(tmp_path: Path, service: tuple[str, dict[str, Any]]) -> None:
    url, _ = service
    run = empty_run(tmp_path / "run")
    epoch = begin_attempt(run)
    make_reachable(run, epoch, url, "another")
    assert not state_of(run.path).alive
    make_reachable(run, epoch, "http://127.0.0.1:9")
    assert state_of(run.path).state == "starting"
    (run.attempt(epoch) / "service.json").write_text('{"url": "http')
    assert state_of(run.path).state == "starting", "a file that is being written"


def test_an_ended_attempt_is_not_asked(tmp_path: Path, service: tuple[str, dict[str, Any]]) -> None:
    url, _ = service
    run = empty_run(tmp_path / "run")
    epoch = begin_attempt(run)
    make_reachable(run, epoch, url)
    end_attempt(run, epoch)
    assert state_of(run.path).state == "finished"


def test_the_last_attempt_says_the_tier(tmp_path: Path) -> None:
    """A promise rises only past an attempt that left nothing."""
    run = empty_run(tmp_path / "run")
    found = []
    for tier in ("replayed", "exact", "exact", "accounted", "replayed", "replayed", "exact"):
        begin_attempt(run, tier)
        state = state_of(run.path)
        found.append((state.tier, state.tier_since))
    assert found == [("replayed", None), ("exact", None), ("exact", None), ("accounted", 4), ("replayed", 5), ("replayed", 5), ("exact", None)]


def test_torn_files_do_not_matter(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=3, finished=False, batches=False)
    found = state_of(run.path)
    assert (found.state, found.steps_done) == ("running", 15)


def test_a_damaged_end_is_said(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=3, batches=False)
    (run.attempt(read_run(run.path).attempts[-1].epoch) / "exit.json").write_text('{"code"')
    found = state_of(run.path)
    assert (found.state, found.seconds_left) == ("lost", None)
    assert "exit.json is damaged; " in found.reason


def test_settings_of_a_wrong_type_are_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = demo_run(tmp_path / "run", rollouts=3, batches=False)
    wrong = {"name": 7, "num_rollout": [1], "warm_start": {"steps": "many"}, "train": 3, "data": {"exclude": [1]}, "rollout": {"batch_size": {}, "sampling": []}, "cluster": None, "later": {"key": 1}}
    run.run_yaml.write_text(json.dumps(wrong))
    record = read_run(run.path)
    assert record.config == {"warm_start": {}, "data": {}, "rollout": {}, "later": {"key": 1}}
    assert f"{run.run_yaml}: num_rollout: expected a whole number, got [1]" in record.damaged
    assert sum(str(run.run_yaml) in line for line in record.damaged) == 8
    assert status(run.path, False) == 0
    assert render(record)
    assert inspect(run.path, None, False, False) == 0
    assert "note: run.yaml: train: expected keys and values, got 3" in capsys.readouterr().out


def test_not_a_run_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError) as error:
            status(path, False)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("told", "behind"),
    [
        ({}, None),
        ({"step": 5, "phase": "generate", "kind": "rollout"}, 4),
        ({"step": 5, "phase": "train"}, 4),
        ({"step": 5, "phase": "rollout"}, 5),
        ({"step": 5, "phase": "generate", "kind": "eval"}, 5),
        ({"step": 5, "phase": "eval"}, 5),
        ({"step": 0, "phase": "generate"}, 0),
        ({"step": 52, "phase": "finished"}, 52),
    ],
)
def test_steps_behind(told: dict[str, Any], behind: int | None) -> None:
    assert steps_behind(told) == behind


@pytest.mark.parametrize(("seconds", "words"), [(None, "–"), (3.25, "3.2 s"), (45.2, "45 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273_700, "3 d 4 h"), (float("nan"), "–")])
def test_durations(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_table_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    run = empty_run(tmp_path / "run")
    end_attempt(run, begin_attempt(run), 78, "data.prompt_data: no such file")
    assert status(run.path, False) == 0
    shown = capsys.readouterr().out
    assert "\x1b[31mfailed" in shown
    assert "data.prompt_data: no such file" in shown
