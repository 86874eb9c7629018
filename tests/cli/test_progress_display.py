"""The launcher's progress: plain lines, and the live display on a real pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.console import Console

from miles.cli.progress import Progress

STATUS: dict[str, Any] = {
    "run": "quickstart",
    "epoch": 1,
    "phase": "generate",
    "kind": "rollout",
    "step": 12,
    "total_steps": 40,
    "groups_done": 3,
    "groups_total": 16,
    "reward_mean": 0.4375,
    "accuracy": 0.615,
    "tokens_per_second": 1234.0,
    "seconds_per_step": 10.0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock | None = None) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, width=200, highlight=False), clock=clock or Clock()), out


def test_a_plain_line_says_everything() -> None:
    progress, out = plain()
    progress.update(STATUS)
    assert out.getvalue() == "step 12/40 (rollout), phase generate 3/16, reward 0.438, accuracy 0.615, generated tokens/s 1234, left about 4 min 50 s\n"


def test_plain_lines_come_at_steps_and_every_few_seconds() -> None:
    clock = Clock()
    progress, out = plain(clock)
    for second in range(12):
        clock.now = 100.0 + second
        progress.update({**STATUS, "groups_done": second})
    progress.update({**STATUS, "step": 13})
    steps = [re.search(r"step (\d+)/40.* (\d+)/16", line) for line in out.getvalue().splitlines()]
    assert [found.groups() for found in steps if found] == [("12", "0"), ("12", "5"), ("12", "10"), ("13", "3")]


def test_missing_and_null_keys() -> None:
    progress, out = plain()
    progress.update({})
    progress.update({"step": None, "phase": "starting"})
    progress.update({"step": 1, "total_steps": None, "reward_mean": None})
    progress.close()
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == ["starting", "step 1"]
    assert "None" not in out.getvalue()


def test_time_left_is_measured_when_the_service_does_not_say_it() -> None:
    clock = Clock()
    progress, _ = plain(clock)
    for step in range(1, 5):
        progress.update({"step": step, "total_steps": 24, "kind": "rollout", "phase": "generate"})
        clock.now += 6.0
    assert progress.seconds_left() == pytest.approx((24 - 3) * 6.0), "step 4 is being made: 3 are done"
    progress.update({"phase": "finished"})
    assert progress.seconds_left() is None


def test_warm_start_steps_tell_nothing_of_rollouts() -> None:
    clock = Clock()
    progress, _ = plain(clock)
    for step in range(1, 4):
        progress.update({"step": step, "total_steps": 20, "kind": "sft", "phase": "generate"})
        clock.now += 1.0
    progress.update({"step": 4, "total_steps": 20, "kind": "rollout", "phase": "generate"})
    assert progress.seconds_left() is None


def test_a_new_attempt_forgets_the_old_state() -> None:
    progress, out = plain()
    progress.update(STATUS)
    progress.update({"run": "quickstart", "epoch": 2, "phase": "starting"})
    assert out.getvalue().splitlines()[-1] == "starting"


def test_the_last_line_is_what_the_files_say() -> None:
    progress, out = plain()
    progress.update({**STATUS, "step": 40, "phase": "train"})
    progress.update({**STATUS, "step": 40, "phase": "finished", "message": "finished"})
    progress.close({"run": "quickstart", "epoch": 1, "step": 40, "total_steps": 40, "reward_mean": 0.9, "accuracy": 0.95, "tokens_per_second": 77.0, "phase": "finished"})
    lines = out.getvalue().splitlines()
    assert lines[-1] == "finished, step 40/40, reward 0.9, accuracy 0.95, tokens/s 77"
    assert sum("finished, step" in line for line in lines) == 1
    assert "left" not in lines[-1]


def test_nothing_is_left_after_the_last_step() -> None:
    progress, out = plain()
    progress.update({**STATUS, "step": 40, "phase": "rollout"})
    assert "left" not in out.getvalue()


def test_waiting_is_said_once_and_only_while_it_lasts() -> None:
    clock = Clock()
    progress, out = plain(clock)
    for second in range(60):
        clock.now = 100.0 + second
        progress.update({"run": "a", "epoch": 1, "total_steps": 4, "waiting": "the trainer to start" if second < 30 else "the model to be built"})
    progress.update({"run": "a", "epoch": 1, "total_steps": 4, "step": 2, "kind": "sft", "phase": "sft", "waiting": "an engine to start"})
    progress.update({"run": "a", "epoch": 1, "total_steps": 4, "step": 3, "kind": "rollout", "phase": "train"})
    assert out.getvalue().splitlines() == [
        "waiting for the trainer to start",
        "waiting for the model to be built",
        "step 2/4 (warm start), waiting for an engine to start",
        "step 3/4 (rollout), phase train",
    ]


def test_speed_in_the_warm_start_is_the_trainers() -> None:
    progress, out = plain()
    progress.update({"step": 1, "total_steps": 5, "phase": "train", "kind": "sft"})
    progress.update({"step": 2, "total_steps": 5, "phase": "train", "kind": "sft", "metrics": {"perf/actor_train_tok_per_s": 512.0}})
    progress.update({"step": 3, "total_steps": 5, "phase": "generate", "kind": "rollout"})
    assert out.getvalue().splitlines() == ["step 1/5 (warm start), phase train", "step 2/5 (warm start), phase train, trained tokens/s 512", "step 3/5 (rollout), phase generate"]


def test_an_evaluations_reward_is_not_the_next_rollouts() -> None:
    progress, _ = plain()
    progress.update({"step": 2, "total_steps": 5, "phase": "generate", "kind": "eval", "reward_mean": 0.9, "tokens_per_second": 5.0})
    assert dict(progress.facts())["reward"] == "0.9"
    progress.update({"step": 3, "total_steps": 5, "phase": "train", "kind": "rollout"})
    assert progress.facts() == [("rollout", "step 3"), ("phase", "train")]


def test_an_event_is_one_line_whatever_the_width() -> None:
    out = io.StringIO()
    Progress(Console(file=out, width=80, highlight=False)).say("attempt 1: " + 30 * "word " + "end")
    assert out.getvalue() == "attempt 1: " + 30 * "word " + "end\n"


def test_the_kind_follows_the_phase_and_no_speed_is_no_news() -> None:
    progress, out = plain()
    progress.update({"step": 2, "total_steps": 5, "phase": "generate", "kind": "eval", "tokens_per_second": 0.0})
    progress.update({"step": 3, "total_steps": 5, "phase": "rollout"})
    assert out.getvalue().splitlines() == ["step 2/5 (evaluation), phase generate", "step 3/5 (rollout), phase trained"]


def test_messages_and_events_are_lines() -> None:
    progress, out = plain()
    progress.say("attempt 1: worker 0 was killed\nby SIGKILL [bold]")
    progress.update({**STATUS, "message": "engine 0 is back"})
    progress.update({**STATUS, "message": "engine 0 is back"})
    lines = out.getvalue().splitlines()
    assert lines[0] == "attempt 1: worker 0 was killed by SIGKILL [bold]"
    assert lines.count("engine 0 is back") == 1


SHOW = """
import sys, time
from miles.cli.progress import Progress
progress = Progress()
progress.say("attempt 1 begins")
progress.update(eval(sys.argv[1]))
time.sleep(0.7)
progress.close()
"""


def on_terminal(width: int, **environment: str) -> str:
    """What a terminal of this width is sent."""
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    keep = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    process = subprocess.Popen([sys.executable, "-c", SHOW, repr(STATUS)], stdin=follower, stdout=follower, stderr=follower, env={**keep, "TERM": "xterm-256color", **environment})
    os.close(follower)
    sent, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                part = os.read(leader, 65536)
            except OSError:
                break  # the other side is closed: the process has ended
            sent += part
        elif process.poll() is not None:
            break
    assert process.wait(timeout=60) == 0, sent.decode()
    os.close(leader)
    return sent.decode()


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_live_display_fits_the_terminal(width: int) -> None:
    sent = on_terminal(width)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sent)
    assert "quickstart" in shown
    assert "generate 3/16" in shown
    assert "reward 0.438" in shown
    assert "11/40" in shown if width < 70 else "11 of 40 steps, 28 %" in shown
    assert max(len(line.rstrip()) for line in re.split(r"[\r\n]+", shown)[:-4]) <= width
    assert "\x1b[38;" in sent or re.search(r"\x1b\[[0-9;]*3[0-9]", sent), "colours on a terminal"


def test_no_color_is_honoured() -> None:
    sent = on_terminal(80, NO_COLOR="1")
    assert "quickstart" in sent
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3[0-9]|4[0-9]|9[0-9])(?:;\d+)*m", sent)


@pytest.mark.parametrize(("width", "first"), [(100, "rollout step 12   phase generate 3/16   reward 0.438"), (50, "rollout step 12")])
def test_live_display_on_any_console(width: int, first: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, height=20, force_terminal=True, color_system=None, highlight=False)
    progress = Progress(console, clock=Clock())
    try:
        console.print(progress.display())
        progress.update(STATUS)
        progress.say("an event")
        out.truncate(0)
        console.print(progress.display())
    finally:
        progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert first in [line.rstrip() if width < 70 else line[: len(first)] for line in shown.splitlines()]
    assert shown.splitlines()[-1].startswith("step 12/40 (rollout)"), "the last state stays"
    assert shown.count("an event") >= 2, "in the display, and as a line at the end"
