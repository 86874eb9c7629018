"""How a role ends: the exit code survives a log that can't be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BODY = """
import sys
from miles.config.exits import TryAgain, UserError
from miles.run.role import main

def body(role):
    print("a line that waits in the buffer")
    {}

main("worker", body)
"""


@pytest.mark.parametrize(("statement", "code"), [("pass", 0), ("raise UserError('wrong')", 78), ("raise TryAgain('away')", 75), ("raise RuntimeError('bug')", 1), ("sys.stdout.close(); raise UserError('wrong')", 78)])
def test_the_exit_code_survives_a_full_disk(tmp_path: Path, statement: str, code: int) -> None:
    (tmp_path / "attempts/000001/logs").mkdir(parents=True)
    (tmp_path / "latest").symlink_to("attempts/000001")
    identity = {"PYTHONUNBUFFERED": "", "MILES_RUN_DIR": str(tmp_path), "MILES_EPOCH": "1", "MILES_RANK": "0", "MILES_WORLD_SIZE": "1", "MILES_TOKEN": "t", "MILES_SERVICE": "http://127.0.0.1:9"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", BODY.format(statement)], env={**os.environ, **identity}, stdout=full, stderr=full, timeout=180)
    assert done.returncode == code
