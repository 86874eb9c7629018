"""Scripts of tools/convert in this process: libraries are loaded once."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools/convert"


@dataclass(frozen=True)
class Done:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def script(name: str, *words: object) -> Done:
    """`python tools/convert/NAME.py WORDS`."""
    out, err, argv, path = io.StringIO(), io.StringIO(), sys.argv, list(sys.path)
    sys.argv = [f"{name}.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        return Done(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv, sys.path[:] = argv, path
    raise AssertionError("scripts end by sys.exit")
