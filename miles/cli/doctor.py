"""`miles-submit doctor`: what happened to a run that is dead, on which node, and what to do. Changes nothing."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from miles.config.exits import OK
from miles.data.store.run_dir import RunDir
from miles.slurm.doctor.diagnosers import diagnose
from miles.slurm.doctor.evidence import Diagnosis, Evidence, Line
from miles.slurm.doctor.gather import gather

SHOWN = 300  # characters of a line of evidence
SHORT = 40  # of one that may stand there twice


def doctor(run_dir: Path, as_json: bool) -> int:
    """Print the diagnoses, the likeliest first. UserError when the folder is no run directory."""
    seen = gather(RunDir(run_dir.absolute()))
    found = diagnose(seen)
    if as_json:
        whole = {"run_dir": seen.run, "known": bool(found), "diagnoses": [asdict(each) for each in found], "look_at": places(seen), "not_checked": seen.unasked or None}
        print(json.dumps(whole, indent=1, ensure_ascii=False))
        return OK
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
    said: set[str] = set()
    for number, each in enumerate(found, 1):
        _show(console, number, each, shlex.quote(str(run_dir)), said)
    if not found:
        console.print("nothing known fits. Where to look:")
        for place in places(seen):
            console.print(f"  {place}")
    if seen.unasked:
        console.print(f"not checked: Slurm's records ({seen.unasked})")
    return OK


def places(seen: Evidence) -> list[str]:
    """Where a person would look next."""
    logs = list(dict.fromkeys(line.where.rpartition(":")[0] for line in seen.logs))
    return [*([seen.last.where] if seen.last and seen.last.outcome else []), *logs, *(f"sacct -j {job}; scontrol show job {job}" for job in seen.submitted[-1:])]


def _show(console: Console, number: int, each: Diagnosis, run: str, said: set[str]) -> None:
    """said: what was printed so far; a sentence is printed once, however many files have it."""
    where = f" [node {each.node}]" if each.node else ""
    console.print(f"{number}. {each.happened}{where}", style="bold" if number == 1 else "")
    said.add(each.happened)
    for line in each.evidence:
        console.print(f"     {line.where}: as said above" if line.text in said and len(line.text) > SHORT else f"     {_text(line)}", style="dim")
        said.add(line.text)
    console.print(f"   what to do: {each.mend.replace('RUN`', f'{run}`')}")


def _text(line: Line) -> str:
    text = line.text if len(line.text) <= SHOWN else line.text[:SHOWN] + " …"
    return f"{line.where}: {text}"
