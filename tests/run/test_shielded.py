"""Roles of a job outlive the SIGTERM that Slurm sends to every process, whatever they run in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from miles.run.component import shielded

POOL = "import multiprocessing as m; m.set_start_method('spawn'); q = m.Queue(); "  # its resource tracker unblocks SIGTERM
SERVER = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('handled')); "  # as uvicorn does
BODY = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('lives', flush=True)"


@pytest.mark.parametrize("first", ["", POOL, SERVER], ids=["plain", "multiprocessing", "server"])
def test_term_does_nothing(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", first + BODY], preexec_fn=shielded, capture_output=True, text=True, timeout=120, env=os.environ)
    assert (done.returncode, done.stdout) == (0, "lives\n")


def test_what_it_starts_is_shielded_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inner = [sys.executable, "-c", BODY]
    done = subprocess.run([sys.executable, "-c", f"import subprocess; subprocess.run({inner!r}, check=True)"], preexec_fn=shielded, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "lives\n")
    assert signal.getsignal(signal.SIGTERM) is before
