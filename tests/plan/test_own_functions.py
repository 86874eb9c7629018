"""Modules of a user's functions are looked for without being run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from miles.plan.own_functions import fault_of


@pytest.mark.parametrize(
    ("module", "missing"),
    [("outer.inner.own", "None"), ("outer.inner.other", "outer.inner.other"), ("outer.away.own", "outer.away"), ("away.own", "away"), ("whole.own", "None")],
)
def test_folders_without_init_are_looked_into(tmp_path: Path, module: str, missing: str) -> None:
    for folder in ("outer/inner", "whole"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "own.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "whole/__init__.py").touch()
    code = f"from miles.plan.own_functions import first_missing; print(first_missing({module!r}))"
    # From another folder's process: what this one has imported must not help.
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == missing, found.stderr


MODULE = """
import json as notes
import os.path
from math import *
from pathlib import Path
def plain(samples, context): ...
async def later(draw, sample, context): ...
class Callable: ...
made = plain
if os:
    def inside(): ...
else:
    inside = None
try:
    import re as fallback
except ImportError:
    fallback = 1
AT, WORDS, NUMBER = 1, "two", 3
LIMIT: int = 3
TEXTS = ["a"]
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", None),
        ("later", None),
        ("Callable", None),
        ("made", None),
        ("Path", None),
        ("AT", None),  # not judged: what a tuple holds
        ("sqrt", None),  # the star may have brought it
        ("notes", "mine.notes is a module, not a function"),
        ("os", "mine.os is a module, not a function"),
        ("LIMIT", "mine.LIMIT is a number, not a function"),
        ("TEXTS", "mine.TEXTS is a list, not a function"),
    ],
)
def test_what_a_module_defines_is_read_off_its_text(tmp_path: Path, name: str, message: str | None) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    found = fault_of(f"mine.{name}", [str(tmp_path)])
    assert (found and found[0]) == message


def test_a_name_that_is_nowhere_is_refused_where_the_text_tells(tmp_path: Path) -> None:
    roots = [str(tmp_path)]
    (tmp_path / "mine.py").write_text("def reward(samples, context): ...\nLIMIT = 1\n")
    assert fault_of("mine:rewrad", roots) == ("mine has no function 'rewrad'", "did you mean mine.reward?")
    assert fault_of("mine.LIMITS", roots) == ("mine has no function 'LIMITS'", "mend the path mine.LIMITS")
    (tmp_path / "mine.py").write_text("globals()['reward'] = print\n")
    assert fault_of("mine.reward", roots) is None
    (tmp_path / "mine.py").write_text("def __getattr__(name): return print\n")
    assert fault_of("mine.reward", roots) is None
    (tmp_path / "mine.py").write_text("def reward(:\n")
    message, mend = fault_of("mine.reward", roots) or ("", "")
    assert message.startswith(f"{tmp_path}/mine.py:1: not Python (")
    assert mend == "mend it"
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/__init__.py").touch()
    (tmp_path / "whole/own.py").touch()
    assert fault_of("whole.own", roots) == ("whole.own is a module, not a function", "write whole.own.FUNCTION")


@pytest.mark.parametrize("path", ["miles.recipes.quickstart.build_tiny", "os.getpid", "math.sqrt", "builtins.print", "json.dumps", "numpy.mean", "torch.nn.functional.relu"])
def test_functions_that_are_there_pass(path: str) -> None:
    assert fault_of(path) is None


def test_a_module_of_the_library_is_no_function() -> None:
    assert fault_of("os.path") == ("os.path is a module, not a function", "write os.path.FUNCTION")
    assert fault_of("importlib.util") == ("importlib.util is a module, not a function", "write importlib.util.FUNCTION")
