"""timeline: seconds by phase and process of made events, and the same of a fine grid of moments; the trace as Chrome reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from script import TOOLS, script

from miles.analysis.timeline import Interval, chrome_trace, length, read_timeline, timeline, tracks, union, write_trace
from miles.config.exits import UserError
from miles.data.store.events import PassedOver
from miles.report.gantt import coarse

EVENTS = {
    "trainer.0.1": [("wait", 1, 100, 104), ("train", 1, 104, 107), ("sync", 1, 107, 108), ("step", 1, 100, 108), ("wait", 2, 108, 110), ("train", 2, 110, 111)],
    "worker.0.1": [("generate", 1, 100, 103), ("seal", 1, 103, 103.5), ("generate", 2, 103.5, 109), ("seal", 2, 109, 109.5)],
    "engine.0.1": [("update_weights", 1, 107.25, 107.75)],
    "trainer.0.2": [("wait", 2, 131, 135), ("train", 2, 135, 139)],
    "worker.0.2": [("generate", 2, 130, 134)],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timeline") / "run"
    (folder / "events").mkdir(parents=True)
    for name, phases in EVENTS.items():
        lines = [json.dumps({"phase": phase, "step": step, "start": start, "end": end, "tokens": 5}) for phase, step, start, end in phases]
        (folder / "events" / f"{name}.jsonl").write_text("\n".join(lines) + '\n{"phase": "tra')  # torn by a kill
    return folder


def grid(attempt: int, *, of: str | None = None, waiting: bool = False) -> np.ndarray:
    """Processes that work (or have any phase) at each moment of an attempt, in steps of 1/64 s: the times here are multiples of it."""
    chosen = {name: phases for name, phases in EVENTS.items() if name.endswith(f".{attempt}")}
    everything = [phase for phases in chosen.values() for phase in phases if phase[0] != "step"]
    first, last = min(phase[2] for phase in everything), max(phase[3] for phase in everything)
    moments = np.arange(first * 64, last * 64) / 64
    found = np.zeros(len(moments), int)
    for name, phases in chosen.items():
        if of is None or name.startswith(of):
            inside = np.zeros(len(moments), bool)
            for phase, _, start, end in phases:
                if phase != "step" and (waiting or phase != "wait"):
                    inside |= (moments >= start) & (moments < end)
            found += inside
    return found


def test_seconds_are_those_of_a_fine_grid(run: Path) -> None:
    found = timeline(run, read_timeline(run), PassedOver())
    assert [row["attempt"] for row in found["attempts"]] == [1, 2]
    assert found["between_attempts"] == [130 - 111]
    for row in found["attempts"]:
        work = grid(row["attempt"])
        assert row["seconds"] == len(work) / 64
        assert row["nobody"] == (work == 0).sum() / 64
        assert row["overlap"] == (work > 1).sum() / 64
        for process in row["processes"]:
            mine, present = (grid(row["attempt"], of=process["process"].replace(" ", "."), waiting=waiting) for waiting in (False, True))
            assert process["working"] == mine.sum() / 64
            assert process["waiting"] == (present - mine).sum() / 64
            assert process["idle"] == (mine == 0).sum() / 64
            assert process["idle_share"] == pytest.approx((mine == 0).mean())
    trainer = found["attempts"][0]["processes"][0]
    assert trainer["process"] == "trainer 0"
    assert trainer["phases"]["train"] == {"count": 2, "seconds": 4, "longest": 3, "longest_step": 1, "errors": 0}
    assert "step" not in trainer["phases"]
    only = timeline(run, read_timeline(run, 1, 1), PassedOver())["attempts"]
    assert [(row["attempt"], row["start"], row["end"]) for row in only] == [(1, 100, 108)]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=12))
def test_union_is_the_set_of_moments(pairs: list[tuple[int, int]]) -> None:
    intervals: list[Interval] = [(start, start + size) for start, size in pairs]
    found = union(intervals)
    assert length(found) == len({moment for start, end in intervals for moment in range(int(start), int(end))})
    assert all(before[1] < after[0] for before, after in pairwise(found))


def test_the_trace_has_every_phase_once_and_nothing_overlaps_in_a_track(run: Path) -> None:
    trace = chrome_trace(read_timeline(run))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == sum(phase[0] != "step" for phases in EVENTS.values() for phase in phases)
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert sorted(names.values()) == sorted(f"{name.split('.')[0]} 0, attempt {name[-1]}" for name in EVENTS)
    (update,) = (event for event in spans if event["name"] == "update_weights")
    assert (update["ts"], update["dur"], update["args"]) == (7.25e6, 0.5e6, {"step": 1, "tokens": 5})
    for pid in names:
        for tid in {event["tid"] for event in spans if event["pid"] == pid}:
            mine = sorted((event["ts"], event["ts"] + event["dur"]) for event in spans if (event["pid"], event["tid"]) == (pid, tid))
            assert all(before[1] <= after[0] for before, after in pairwise(mine))
    nested = [{"start": 0, "end": 4}, {"start": 1, "end": 2}, {"start": 2, "end": 5}, {"start": 4, "end": 6}]
    assert tracks(nested) == [[nested[0], nested[3]], [nested[1], nested[2]]]


def test_a_trace_replaces_none_but_its_own_kind(run: Path, tmp_path: Path) -> None:
    attempts, target = read_timeline(run), tmp_path / "trace.json"
    for _ in range(2):
        write_trace(attempts, target)
    assert json.loads(target.read_text()) == chrome_trace(attempts)
    target.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="is there already, and is no trace that miles made"):
        write_trace(attempts, target)
    assert target.read_text() == '{"mine": 1}'


def test_a_long_run_is_a_picture_of_bounded_size() -> None:
    bars = [(i / 100, (i + 0.9) / 100, "generate" if i % 3 else "seal", str(i)) for i in range(100_000)] + [(1000.0, 1100.0, "train", "long")]
    found = coarse(bars, 2.0)
    assert len(found) == 501
    assert found[-1] == bars[-1]
    assert {bar[2] for bar in found[:-1]} == {"generate"}  # two of three


def test_the_tool_tells_draws_and_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("timeline", run, "--html", tmp_path / "page.html", "--chrome", tmp_path / "trace.json") == 0
    told = capsys.readouterr().out
    assert "2 attempts" in told
    assert "Between attempts" in told
    assert (tmp_path / "page.html").read_text().count("<rect") > 10
    assert json.loads((tmp_path / "trace.json").read_text())["displayTimeUnit"] == "ms"
    assert "5 lines of events/ passed over, torn by a kill or no phase; the first: " in told
    assert script("timeline", run, "--json") == 0
    passed = PassedOver()
    assert json.loads(capsys.readouterr().out) == timeline(run, read_timeline(run, passed=passed), passed)
    assert passed == PassedOver(5, f"{run}/events/engine.0.1.jsonl, line 2: no whole JSON object")
    with pytest.raises(UserError, match="nothing to analyse: events/ holds no phase"):
        script("timeline", tmp_path)


WHOLE_LINE = {"phase": "train", "step": 3, "start": 100.0, "end": 104.0}
NO_PHASES = {
    "not JSON": "}{", "no object": "[1, 2]", "a number": "7", "nested": "[" * 100_000, "not UTF-8": b"\xff\xfe\x00", "binary": bytes(range(256)).replace(b"\n", b""),
    "no phase": {"phase": None}, "a phase that is a list": {"phase": ["train"]}, "a phase that moves a cursor": {"phase": "\x1b[2J"}, "half a pair": {"phase": "\ud800"},
    "no step": {"step": None}, "a step in words": {"step": "3"}, "half a step": {"step": 2.5}, "a step before the first": {"step": -1}, "true for a step": {"step": True},
    "an immense step": {"step": 10**400}, "no start": {"start": None}, "no end": {"end": None}, "an end in words": {"end": "104"}, "a negative start": {"start": -5.0},
    "an end before its start": {"end": 99.0}, "an endless phase": {"end": float("inf")}, "a start that is no number": {"start": float("nan")},
    "an immense end": {"end": 10**400}, "an end after the year 10000": {"end": 1e15}, "a list for a start": {"start": [[[1]]]},
}  # fmt: skip


@pytest.mark.parametrize("name", NO_PHASES)
def test_lines_that_are_no_phase_are_counted_and_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = NO_PHASES[name]
    line = json.dumps(WHOLE_LINE | content) if isinstance(content, dict) else content
    whole, wrong = json.dumps(WHOLE_LINE).encode(), line if isinstance(line, bytes) else line.encode()
    target = tmp_path / "events/trainer.0.1.jsonl"
    target.parent.mkdir()
    target.write_bytes(b"\n".join([whole, b"", wrong, whole, b""]))
    assert script("timeline", tmp_path, "--html", tmp_path / "page.html", "--chrome", tmp_path / "trace.json") == 0
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "passed over, torn" in line)
    assert said.startswith(f"1 line of events/ passed over, torn by a kill or no phase; the first: {target}, line 3: ")
    assert script("timeline", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed_over"]["count"], found["attempts"][0]["processes"][0]["phases"]["train"]["count"]) == (1, 2)
    target.write_bytes(wrong)
    with pytest.raises(UserError, match=r"holds no phase; 1 line passed over, the first: .*trainer.0.1.jsonl, line 1: ") as refused:
        script("timeline", tmp_path)
    assert str(refused.value).isprintable()


def test_whatever_else_a_line_says_is_shown_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of a process come from the file alone, and JSON for Chrome has no NaN."""
    deep: list = []
    for _ in range(300):
        deep = [deep]
    more = {"component": 7, "rank": None, "epoch": "x", "tokens": None, "deep": deep, "text": "<b>\x1b\ud800", "large": 10**400, "loss": float("inf")}
    (tmp_path / "events").mkdir()
    (tmp_path / "events/odd <b>.0.1.jsonl").write_text(json.dumps(WHOLE_LINE | more) + "\n" + json.dumps(WHOLE_LINE | {"phase": "<i>odd"}))
    assert script("timeline", tmp_path, "--html", tmp_path / "page.html", "--chrome", tmp_path / "trace.json") == 0
    assert "odd <b> 0" in capsys.readouterr().out
    assert "<b>" not in (tmp_path / "page.html").read_text().replace("&lt;b>", "")
    trace = json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)
    assert next(event["args"] for event in trace["traceEvents"] if event["ph"] == "X") == {"step": 3, "tokens": None, "text": "<b>\x1b\ud800", "large": 10**400, "loss": None}


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "events/trainer.0.1.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"trainer.0.1.jsonl: a file of phases expected, a folder found"):
        script("timeline", tmp_path)


def test_names_of_any_bytes_are_told_and_drawn(tmp_path: Path) -> None:
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run \xff"))
    (run / "events").mkdir(parents=True)
    (run / "events" / os.fsdecode(b"\xfe\x1b.0.1.jsonl")).write_text(json.dumps(WHOLE_LINE))
    done = subprocess.run([sys.executable, TOOLS / "timeline.py", run, "--html", tmp_path / "page.html"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run \\udcff: 1 attempt" in done.stdout
    assert "\x1b" not in done.stdout
    assert "run \\udcff" in (tmp_path / "page.html").read_text()
