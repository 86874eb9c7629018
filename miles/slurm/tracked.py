"""The trackers' process beside a launcher, on one machine and in a job."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from miles.config.schema import RunConfig
from miles.data.store.run_dir import RunDir

FEED = "miles.trackers.feed"
END_SECONDS = 20.0


@contextlib.contextmanager
def tracked(run: RunDir, config: RunConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Feed the configured trackers meanwhile. Their warnings are said; nothing of them is raised, and they are not waited for longer than END_SECONDS."""
    if not config.trackers.names:
        yield
        return
    feed = subprocess.Popen([sys.executable, "-m", FEED, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace")
    listening = threading.Thread(target=_listen, args=(feed, say), name="trackers", daemon=True)
    listening.start()
    try:
        yield
    finally:
        assert feed.stdin is not None, "a pipe"
        feed.stdin.close()
        try:
            feed.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            feed.kill()
            say(f"warning: trackers: did not end within {END_SECONDS:g} s; metrics.jsonl has everything")
        listening.join(1.0)


def _listen(feed: subprocess.Popen[str], say: Callable[[str], None]) -> None:
    assert feed.stdout is not None, "a pipe"
    for line in feed.stdout:
        if line.startswith("tracker "):  # libraries print what they like
            say(f"warning: {line.strip()}")
    if feed.wait() > 0:
        say(f"warning: trackers: their process ended with exit code {feed.returncode}; metrics.jsonl has everything")
