"""Modules of a user's functions are looked for without being run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("module", "missing"),
    [("outer.inner.own", "None"), ("outer.inner.other", "outer.inner.other"), ("outer.away.own", "outer.away"), ("away.own", "away"), ("whole.own", "None")],
)
def test_folders_without_init_are_looked_into(tmp_path: Path, module: str, missing: str) -> None:
    for folder in ("outer/inner", "whole"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "own.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "whole/__init__.py").touch()
    code = f"from miles.plan.model_folder import first_missing; print(first_missing({module!r}))"
    # From another folder's process: what this one has imported must not help.
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == missing, found.stderr
