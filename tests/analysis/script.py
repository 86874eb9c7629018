"""A script of tools/analyze in this process: what it returns; capsys has what it printed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest import mock

TOOLS = Path(__file__).resolve().parents[2] / "tools/analyze"


def script(name: str, *arguments: object) -> int:
    """main() of the script with these words; UserError passes."""
    with mock.patch.object(sys, "path", sys.path[:]), mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
        return int(runpy.run_path(str(TOOLS / f"{name}.py"))["main"]())
