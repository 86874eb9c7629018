"""Seconds of `miles-submit --help`, `plan` and `status`, in turns with a bare start of Python. The goal is half a second each.

Judged are processor seconds, which a busy machine changes little; on an idle one the seconds that one waits are hardly more, and are told.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.child import ROOT
from benchmarks.table import Row

GOAL_SECONDS = 0.5
TURNS = 9
RUN = ["recipes/tiny", "num_rollout=1", "warm_start.steps=0", "eval.interval=null"]
BARE = "python -c pass"


def measure(say: Callable[[str], None], quick: bool = False) -> list[Row]:
    """A row a command: its processor seconds over half a second (median over turns). status looks at a finished run of recipes/tiny."""
    with tempfile.TemporaryDirectory() as name:
        run, environment = Path(name) / "run", installed(os.environ, Path(name)) | {"PYTHONPATH": str(ROOT)}
        say("a run for status to look at")
        subprocess.run([sys.executable, "-m", "miles.cli", "run", *RUN, "--run-dir", str(run)], check=True, capture_output=True, env=environment, cwd=name)
        miles = [sys.executable, "-c", "import sys; from miles.cli.main import main; sys.exit(main())"]  # as the installed command
        commands = {
            BARE: [sys.executable, "-c", "pass"],
            "miles-submit --help": [*miles, "--help"],
            "miles-submit plan": [*miles, "plan", "recipes/quickstart"],
            "miles-submit status": [*miles, "status", str(run)],
        }
        found: dict[str, list[tuple[float, float]]] = {command: [] for command in commands}
        for turn in range(1 if quick else TURNS + 1):
            for command, words in commands.items():
                taken = timed(words, environment, name)
                if turn or quick:  # the first turn leaves the compiled modules
                    found[command].append(taken)
            say(f"commands, turn {turn + 1}: " + ", ".join(f"{command} {each[-1][0]:.2f} s" for command, each in found.items() if each))
    processor = {command: [taken for taken, _ in each] for command, each in found.items()}
    waited = {command: [taken for _, taken in each] for command, each in found.items()}
    bare = statistics.median(processor[BARE])
    rows = []
    for command in list(commands)[1:]:
        middle, most = statistics.median(processor[command]), max(processor[command])
        note = f"{middle:.2f} s of a processor, at most {most:.2f} s in {len(processor[command])} turns; Python alone {bare:.2f} s; answered after {min(waited[command]):.2f} to {max(waited[command]):.2f} s"
        more = {"processor_seconds": processor[command], "seconds": waited[command], "bare_processor_seconds": processor[BARE]}
        rows.append(Row(f"{command} / half a second", middle / GOAL_SECONDS, 1.0, False, note, more))
    return rows


def installed(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """An environment where modules are compiled once, as those of an installed package are."""
    kept = {name: value for name, value in environment.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}


def timed(words: list[str], environment: dict[str, str], folder: str) -> tuple[float, float]:
    """(processor seconds, seconds) of a command. RuntimeError where it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=folder)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - began
