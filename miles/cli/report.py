"""`miles-submit report`: make the page and say where it is."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from miles.config.exits import OK
from miles.report.build import build_report


def report(run_dir: Path, as_json: bool) -> int:
    """Make the report of a run, finished or not. UserError when the folder is not a run directory."""
    page = build_report(run_dir)
    if as_json:
        print(json.dumps({"report": str(page), "bytes": page.stat().st_size}))
    else:
        Console(soft_wrap=True, markup=False, emoji=False, highlight=False).print(f"report: {page}")
    return OK
