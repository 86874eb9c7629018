"""`make bench`: every benchmark, one table, exit code 1 when a goal is missed. Ratios are of things measured in this one run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from benchmarks.analyze import measure as measure_analysis
from benchmarks.cli_start import measure as measure_commands
from benchmarks.convert import measure as measure_conversion
from benchmarks.generation import Case, measure
from benchmarks.slurm_launch import measure as measure_launch
from benchmarks.table import Row, show
from benchmarks.train_step import measure as measure_train_step
from benchmarks.workload import THREADS, build_quickstart, build_smollm2

CASES = {
    "quickstart": Case("quickstart's model", build_quickstart, 3.0, prompt=10, orders=(True, False), rounds=2, shorter=1, turns=7),
    # In their own order batches only get longer, so on this slow model that is not tried.
    "smollm2": Case("SmolLM2-135M", build_smollm2, 1.3, prompt=32, orders=(True,), rounds=1, shorter=4, turns=2),
}


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--quick", action="store_true", help="one short turn of each: shows that it runs, judges nothing")
    parser.add_argument("--only", choices=[*CASES, "train_step", "commands", "slurm_launch", "convert", "analysis"], help="one part")
    given = parser.parse_args()
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {line}", file=sys.stderr, flush=True)

    rows: list[Row] = []
    for name, case in CASES.items():
        if given.only in (None, name):
            rows += measure(case, say, given.quick)
    if given.only in (None, "train_step"):
        rows += measure_train_step(say, repeats=1 if given.quick else 3)
    if given.only in (None, "commands"):
        rows += measure_commands(say, given.quick)
    if given.only in (None, "slurm_launch"):
        rows += measure_launch(say, given.quick)
    if given.only in (None, "convert"):
        rows += measure_conversion(say, given.quick)
    if given.only in (None, "analysis"):
        rows += measure_analysis(say, given.quick)
    if given.json:
        load = os.getloadavg()[0]
        print(json.dumps({"threads": THREADS, "quick": given.quick, "load_average": load, "results": [row.as_json() for row in rows]}, indent=1))
    else:
        show(rows, judged=not given.quick)
    return 0 if given.quick or all(row.passed is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
