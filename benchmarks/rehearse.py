"""`make rehearse`: a step at full size through the real service, worker and readers, against engines that answer from memory.

Prints what was measured, what that means for 4,096 sequences of 32k tokens and 1,024 ranks, and whether the goals hold. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rehearse_case import PROMPT, Case, Found, rehearse
from benchmarks.rehearse_memory import allowed, batch_bytes, judge_memory
from benchmarks.rehearse_scale import Line, extrapolate

LONG = 32768
CASES = (
    Case("plain", steps=5, groups=16, samples=8, longest=LONG),
    Case("routes", steps=4, groups=6, samples=8, longest=LONG, routes=True),
    Case("large batch", steps=1, groups=64, samples=8, longest=LONG, routes=True, large=True),
    Case("many steps", steps=200, groups=4, samples=4, longest=128, layers=4, routes=True),
)
QUICK = (Case("routes", steps=3, groups=3, samples=4, longest=256, layers=6, routes=True),)
GOALS = {"plain": 500_000.0, "routes": 50_000.0}
GROWN_BYTES, GROWN_FILES = 4 << 20, 2  # over the last three quarters of many steps; before, each thread fills its heap


def rate(found: Found) -> float:
    """Response tokens a second, from the trainer's asking to its reading of the first micro-batch; the first step, which starts things, aside."""
    lines = found.steps[1:] or found.steps
    return sum(line["tokens"] for line in lines) / sum(line["first"] - line["asked"] for line in lines)


def judge(found: Found) -> list[dict[str, Any]]:
    """Goals of one case, each with what was found."""
    case = found.case
    said = []
    if case.name in GOALS:
        said.append({"what": f"{case.name}: tokens/s of a worker", "found": rate(found), "goal": GOALS[case.name], "passed": rate(found) >= GOALS[case.name]})
    said.extend(judge_memory(found))
    if case.steps >= 100:
        for role, (grown, files) in found.growth.items():
            said.append({"what": f"{case.name}: growth of {role} [B]", "found": grown, "goal": GROWN_BYTES, "passed": grown <= GROWN_BYTES})
            said.append({"what": f"{case.name}: growth of {role} [open files]", "found": files, "goal": GROWN_FILES, "passed": files <= GROWN_FILES})
    if found.files:
        said.append({"what": f"{case.name}: new files a step (one node)", "found": max(found.files), "goal": 4, "passed": max(found.files) <= 4})
    return said


def measured(found: Found) -> Table:
    """What a case showed, a line each."""
    case, lines = found.case, found.steps[1:] or found.steps
    table = Table(title=f"{case.name}: {case.steps} steps of {case.groups} × {case.samples} samples, up to {case.longest:,} tokens"
                  + (f", routes {case.layers} × {case.top_k}" if case.routes else ""), title_justify="left", show_header=False)  # fmt: skip

    def middle(of: Any) -> float:
        return statistics.median(of(line) for line in lines)

    table.add_row("response tokens a step", f"{middle(lambda line: line['tokens']):,.0f}")
    table.add_row("tokens/s of the worker, from the asking to the first micro-batch", f"{rate(found):,.0f}")
    table.add_row("  of its processor time alone", f"{sum(line['tokens'] for line in lines) / sum(line['cpu']['worker'] for line in lines):,.0f}")
    table.add_row("seconds from the last token to the first micro-batch", f"{middle(lambda line: line['first'] - line['last_token']):.2f}")
    table.add_row("  of it to the manifest", f"{middle(lambda line: line['sealed'] - line['last_token']):.2f}")
    table.add_row("seconds to read all micro-batches, to write the record", f"{middle(lambda line: line['read'] - line['first']):.2f}, {middle(lambda line: line['recorded'] - line['read']):.2f}")
    if found.files:
        table.add_row("new files a step", f"{max(found.files)}")
        table.add_row("bytes of them", f"{statistics.median(found.bytes):,.0f}")
    table.add_row("bytes of journals, at most", f"{max(found.journals):,.0f}")
    table.add_row("bytes of a batch in arrays", f"{batch_bytes(found):,.0f}")
    for role, high in found.memory.items():
        may = allowed(found, role)
        table.add_row(f"peak memory of {role}", f"{high / 1e6:,.0f} MB of {may.wide / 1e6:,.0f} = 1 GB + 2 slices ({may.words})")
        kept = f" + {may.kept / 1e6:,.1f} of its record" if may.kept else ""
        parts = f"{may.fixed / 1e6:,.0f} of buffers{kept} + 2 × {may.slice / 1e6:,.1f}"
        table.add_row(f"  its rise over {found.idle[role] / 1e6:,.0f} MB idle", f"{found.rise[role] / 1e6:,.0f} MB of {may.narrow / 1e6:,.0f} = {parts}")
    if case.steps >= 100:
        for role, (grown, files) in found.growth.items():
            table.add_row(f"growth of {role} from step {case.steps // 4} to {case.steps}", f"{grown / 1e6:+,.1f} MB, {files:+d} open files")
    return table


def table_of(title: str, lines: list[Line]) -> Table:
    """Quantity, formula, value."""
    table = Table("quantity", "formula", "value", title=title, title_justify="left")
    for line in lines:
        table.add_row(line.what, line.formula, line.value)
    return table


def main() -> int:
    """Rehearse, print, judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rehearse", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--quick", action="store_true", help="a few seconds of small steps: shows that it runs, judges no speed")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one case")
    parser.add_argument("--folder", type=Path, help="where the runs are made (and left); default: a temporary folder")
    given = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {line}", file=sys.stderr, flush=True)

    folder = given.folder or Path(tempfile.mkdtemp(prefix="rehearse."))
    try:
        results = [rehearse(case, folder / case.name.replace(" ", "_"), say) for case in (QUICK if given.quick else CASES) if given.only in (None, case.name)]
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    goals = [goal for found in results for goal in judge(found) if not (given.quick and "tokens/s" in goal["what"])]
    lines = extrapolate({found.case.name: found for found in results}, {found.case.name: rate(found) for found in results}, PROMPT)
    if given.json:
        told = {"cases": [asdict(found) for found in results], "scale": [asdict(line) for line in lines], "goals": goals}
        print(json.dumps(told, indent=1))
    else:
        console = Console(width=150, highlight=False, markup=False)
        for found in results:
            console.print(measured(found))
        console.print(table_of("4,096 sequences of 32,768 tokens, 1,024 ranks", lines))
        for goal in goals:
            console.print(f"{'held  ' if goal['passed'] else 'MISSED'} {goal['what']}: {goal['found']:,.0f} (goal {goal['goal']:,.0f})")
    return 0 if all(goal["passed"] for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
