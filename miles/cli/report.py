"""`miles-submit report`: make the page and say where it is."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from miles.analysis.of_run import mismatch_of_run
from miles.config.exits import OK
from miles.report.build import build_report
from miles.report.records import require_run_dir


def report(run_dir: Path, as_json: bool) -> int:
    """Make the report of a run, finished or not, with the mismatch verdict of what it recorded. UserError when the folder is not a run directory."""
    require_run_dir(run_dir)
    waiting = Console(stderr=True)
    with waiting.status("comparing log-probs; the first time on a machine its loops are compiled, for some 20 s") if waiting.is_terminal else nullcontext():
        mismatch = mismatch_of_run(run_dir)
    page = build_report(run_dir, mismatch)
    verdict = mismatch.verdict if mismatch else None
    if as_json:
        why = verdict.why if verdict else [mismatch.facts] if mismatch else []
        print(json.dumps({"report": str(page), "bytes": page.stat().st_size, "mismatch": verdict.word if verdict else None, "mismatch_why": why}))
        return OK
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(f"report: {page}")
    if mismatch:
        console.print(f"rollout against training: {verdict.word}: {'; '.join(verdict.why)}" if verdict else f"rollout against training: not judged: {mismatch.facts}")
    return OK
