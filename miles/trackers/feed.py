"""Feeds the trackers from metrics.jsonl: `python -m miles.trackers.feed RUN`, until its standard input ends; then what is left, and the end.

A process of its own: whatever a tracker does, the run goes on. What goes wrong is one line on standard output, and that tracker is left alone from then on.
Each line is noted as sent before it is sent, so that a step told again after a resume, or a feed that was killed, gives no second point.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from miles.config.compose import load_config
from miles.config.schema import RunConfig
from miles.data.store.files import seal_json
from miles.data.store.metrics import read_metrics
from miles.data.store.run_dir import RunDir
from miles.trackers.sinks import SINKS, Sink, read_state, state_file

POLL_SECONDS = 2.0


class Feed:
    """The open trackers of a run."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self.run, self.config = run, config
        self.sinks: dict[str, Sink] = {}
        self.seen: tuple[int, int] | None = None

    def open(self) -> None:
        """Open each tracker under the identity that it had."""
        for name in self.config.trackers.names:
            try:
                sink = SINKS[name](self.run, self.config, read_state(self.run).get(name, {}).get("identity"))
                self._note(name, identity=sink.identity)
                self.sinks[name] = sink
            except Exception as error:  # a tracker's code is anybody's
                self._warn(name, error)

    def send(self) -> None:
        """Send the lines that are new."""
        try:
            found = os.stat(self.run.metrics)
        except FileNotFoundError:
            return
        if (found.st_ino, found.st_size) == self.seen:
            return
        self.seen = (found.st_ino, found.st_size)
        lines = read_metrics(self.run.metrics)
        for name, sink in list(self.sinks.items()):
            try:
                for line in lines:
                    self._line(name, sink, line)
            except Exception as error:
                del self.sinks[name]
                self._warn(name, error)

    def _line(self, name: str, sink: Sink, line: dict[str, Any]) -> None:
        step, kind = int(line["step"]), str(line["kind"])
        sent = read_state(self.run)[name].get("sent", {})
        if step <= sent.get(kind, -1):
            return
        self._note(name, sent={**sent, kind: step})
        numbers = {key: float(value) for key, value in line.items() if key not in ("step", "kind", "time") and _number(value)}
        if numbers:
            sink.log(numbers, step, float(line.get("time", 0.0)))

    def close(self) -> None:
        """End every tracker's run."""
        for name, sink in self.sinks.items():
            try:
                sink.close()
            except Exception as error:
                self._warn(name, error)

    def _note(self, name: str, **facts: Any) -> None:
        state = read_state(self.run)
        seal_json(state_file(self.run), {**state, name: {**state.get(name, {}), **facts}})

    def _warn(self, name: str, error: Exception) -> None:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"tracker {name}: {said}; nothing more is sent to it, metrics.jsonl has everything", flush=True)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def main(folder: str) -> None:
    """Entry point."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # those of a terminal and of a job are for the launcher
        signal.signal(number, signal.SIG_IGN)
    stopping = threading.Event()

    def wait_for_launcher() -> None:
        sys.stdin.buffer.read()  # it ends when the launcher says so, and when the launcher is no more
        stopping.set()

    threading.Thread(target=wait_for_launcher, name="launcher", daemon=True).start()
    run = RunDir(Path(folder))
    feed = Feed(run, load_config([run.run_yaml]))
    feed.open()
    while True:
        last = stopping.wait(POLL_SECONDS)
        feed.send()
        if last:
            feed.close()
            return


if __name__ == "__main__":
    main(sys.argv[1])
