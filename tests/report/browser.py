"""A real browser for the tests: headless Chromium, a new profile for every start."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
]
SECONDS = 240


def chromium(*arguments: str) -> str:
    """Run it once and return what it wrote to stdout (the document, with --dump-dom)."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "no Chromium here; mend: apt-get install -y chromium (make test does it)"
    with tempfile.TemporaryDirectory(prefix="chromium") as profile:
        done = subprocess.run([program, *FLAGS, f"--user-data-dir={profile}", *arguments], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def dump(url: str, *arguments: str) -> str:
    """The document as the browser has it after loading."""
    return chromium("--dump-dom", *arguments, url)


def screenshot(url: str, target: Path, width: int, height: int) -> Path:
    """A picture of the page at this size [CSS pixels]."""
    chromium(f"--window-size={width},{height}", f"--screenshot={target}", url)
    return target
