"""Seconds of `miles-submit --help`, `plan` and `status`, in turns with a bare start of Python. The goal is half a second each."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.child import ROOT
from benchmarks.table import Row

GOAL_SECONDS = 0.5
TURNS = 9
RUN = ["recipes/tiny", "num_rollout=1", "warm_start.steps=0", "eval.interval=null"]
BARE = "python -c pass"


def measure(say: Callable[[str], None], quick: bool = False) -> list[Row]:
    """A row a command: its seconds over half a second (median over turns). status looks at a finished run of recipes/tiny."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        say("a run for status to look at")
        subprocess.run([sys.executable, "-m", "miles.cli", "run", *RUN, "--run-dir", str(run)], check=True, capture_output=True, env=environment, cwd=name)
        miles = [sys.executable, "-c", "import sys; from miles.cli.main import main; sys.exit(main())"]  # as the installed command
        commands = {
            BARE: [sys.executable, "-c", "pass"],
            "miles-submit --help": [*miles, "--help"],
            "miles-submit plan": [*miles, "plan", "recipes/quickstart"],
            "miles-submit status": [*miles, "status", str(run)],
        }
        seconds: dict[str, list[float]] = {command: [] for command in commands}
        for turn in range(1 if quick else TURNS):
            for command, words in commands.items():
                began = time.perf_counter()
                subprocess.run(words, check=True, capture_output=True, env=environment, cwd=name)
                seconds[command].append(time.perf_counter() - began)
            say(f"commands, turn {turn + 1}: " + ", ".join(f"{command} {each[-1]:.2f} s" for command, each in seconds.items()))
    bare = statistics.median(seconds[BARE])
    rows = []
    for command in list(commands)[1:]:
        found = statistics.median(seconds[command])
        note = f"{found:.2f} s, at most {max(seconds[command]):.2f} s of {len(seconds[command])}; Python alone {bare:.2f} s"
        rows.append(Row(f"{command} / half a second", found / GOAL_SECONDS, 1.0, False, note, {"seconds": seconds[command], "bare_seconds": seconds[BARE]}))
    return rows
