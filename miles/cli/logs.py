"""`miles-submit logs`: the logs of the newest attempt, one role or all; -f follows across attempts until the run ends."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from miles.config.exits import AGAIN, OK, UserError
from miles.data.store.run_dir import RunDir
from miles.report.records import Attempt, read_attempts, require_run_dir
from miles.slurm.records import submitted

POLL_SECONDS = 0.3
ASK_SECONDS, RARELY_SECONDS = 10.0, 30.0  # between two questions to Slurm; while nothing has ended
GRACE_SECONDS = 3.0  # after an attempt's end, in which a new attempt may begin
TAIL_BLOCK = 64 << 10
COLOURS = {"service": "magenta", "trainer": "green", "engine": "cyan", "worker": "yellow"}


def logs(run_dir: Path, component: str | None, follow: bool, lines: int) -> int:
    """Print the last lines of each log of the newest attempt; with follow, go on until the run has ended.

    component is a role (trainer) or one process of it (trainer.0). UserError for a folder that is no run, and for a component
    that the attempt has not: with the list of those that it has.
    """
    run = require_run_dir(run_dir)
    attempts = read_attempts(run)
    if not attempts and not follow:
        raise UserError(f"{run_dir}: no attempt has been made yet, so there are no logs; start it with `miles-submit run`")
    show = Printer()
    if attempts:
        files = choose(attempts[-1], component, must=not follow)
        show.width = max((len(path.stem) for path in files), default=0) if len(files) > 1 else 0
        if not files and not follow:
            show.say(f"attempt {attempts[-1].epoch} has no logs yet")
        seen = {path: _tail(path, lines, partial(show, path.stem)) for path in files}
    else:
        seen = {}
    if not follow:
        return OK
    try:
        _follow(run_dir, component, show, seen)
    except KeyboardInterrupt:
        return 130
    return OK


def choose(attempt: Attempt, component: str | None, must: bool = True) -> list[Path]:
    """Log files of an attempt: all, or a component's. UserError when there is none of that name (and must)."""
    files = sorted((attempt.folder / "logs").glob("*.*.log"))
    chosen = [path for path in files if component in (None, path.stem, path.stem.split(".")[0])]
    known = sorted({path.stem.split(".")[0] for path in files} | set(COLOURS))
    if component is not None and not chosen and (must or component.split(".")[0] not in known):
        have = sorted({path.stem.split(".")[0] for path in files}) or ["none yet"]
        raise UserError(f"{component}: attempt {attempt.epoch} has no such log; it has {', '.join(have)}")
    return chosen


class Printer:
    """One line of a log, behind the name of its process when there are several."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self.width = 0

    def __call__(self, name: str, line: str) -> None:
        text = Text.from_ansi(line) if self.console.is_terminal else Text(line)
        if self.width:
            text = Text.assemble((f"{name:<{self.width}} ", COLOURS.get(name.split(".")[0], "blue")), ("│ ", "dim"), text)
        self.console.print(text)

    def say(self, line: str) -> None:
        """A line of ours."""
        self.console.print(Text(line, style="dim"))
        sys.stdout.flush()


def _tail(path: Path, lines: int, show: Callable[[str], None]) -> int:
    """Print the last lines that are whole; returns the byte after them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        data, start = b"", size
        while start > 0 and data.count(b"\n") <= lines:
            step = min(TAIL_BLOCK, start)
            start -= step
            file.seek(start)
            data = file.read(step) + data
    ends_whole = data.endswith(b"\n")
    whole = data.split(b"\n")
    rest = b"" if ends_whole else whole[-1]
    for line in whole[:-1][-lines:] if lines else []:
        show(_text(line))
    return size - len(rest)


def _more(path: Path, start: int, show: Callable[[str], None], last: bool) -> int:
    """Print whole lines from byte start on (unfinished ones too when it is the last look); returns where to go on."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    end = len(data) if last else data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")
    for line in lines if lines[-1] else lines[:-1]:  # what comes after the last line end is no line, unless there is something
        show(_text(line))
    return start + end


def _follow(run_dir: Path, component: str | None, show: Printer, seen: dict[Path, int]) -> None:
    """Print what is added, of every attempt in turn, until the newest has ended and none followed it."""
    run = require_run_dir(run_dir)
    epoch: int | None = None
    ended, jobs = 0.0, Jobs(run)
    while True:
        attempts = read_attempts(run)
        if attempts:
            latest = attempts[-1]
            if epoch is not None and latest.epoch != epoch:
                show.say(f"── attempt {latest.epoch} ──")
                ended = 0.0
            epoch = latest.epoch
            # Looked at before the logs, so that the last look sees everything. One that was killed with its job says nothing of its end.
            over = latest.outcome is not None or jobs.over(RARELY_SECONDS)
            files = choose(latest, component, must=False)
            show.width = max([show.width, *(len(path.stem) for path in files)]) if len(files) > 1 or show.width else 0
            finished = over and ended and time.monotonic() - ended > (0.0 if _final(latest) else GRACE_SECONDS) and not _waits(latest, jobs)
            for path in files:
                seen[path] = _more(path, seen.get(path, 0), partial(show, path.stem), last=bool(finished))
            sys.stdout.flush()
            if finished:
                outcome = latest.outcome or {}
                code = f" (exit code {outcome['code']})" if "code" in outcome else ""
                show.say(f"── attempt {latest.epoch} ended: {outcome.get('reason') or 'without a word, with its job'}{code} ──")
                return
            if over and not ended:
                ended = time.monotonic()
        elif jobs.over(ASK_SECONDS):
            show.say("── no attempt was made, and no job of the run waits or runs ──")
            return
        time.sleep(POLL_SECONDS)


class Jobs:
    """Whether the run has jobs, and none of them waits or runs any more; Slurm is asked now and then."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.asked, self.answer = -math.inf, False

    def over(self, every: float) -> bool:
        """Asked at most so often [s]. False for a run without jobs: on this machine."""
        if not submitted(self.run):
            return False
        if time.monotonic() - self.asked > every:
            from miles.slurm.own_jobs import alive

            with contextlib.suppress(UserError):  # no Slurm here, or it doesn't answer: the logs still speak
                self.answer = not alive(self.run)
            self.asked = time.monotonic()
        return self.answer


def _waits(attempt: Attempt, jobs: Jobs) -> bool:
    """Whether a job of the run will go on where an attempt has ended."""
    return bool((attempt.outcome or {}).get("goes_on") and submitted(jobs.run)) and not jobs.over(ASK_SECONDS)


def _final(attempt: Attempt) -> bool:
    """Whether no further attempt follows by itself: only after exit code 75 may one."""
    outcome = attempt.outcome or {}
    if outcome.get("goes_on"):
        return False
    return outcome.get("code") != AGAIN or bool(outcome.get("stopped"))


def _text(line: bytes) -> str:
    """A line as a terminal would leave it: of a progress bar that was drawn over and over, the last state."""
    return line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]
