"""The progress of a run as the launcher shows it: a live display on a terminal, plain lines otherwise."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from miles.report.scales import number
from miles.report.summary import duration

LINE_SECONDS = 5.0  # between plain lines when nothing but time has passed
EVENTS = 4  # last events shown under the bar
NARROW = 70  # columns under which the display has one fact a line
KINDS = {"sft": "warm start", "rollout": "rollout", "eval": "evaluation"}


class Progress:
    """update(status) with the service's GET /status, at any rate; say(line) for an event; close() at the end.

    status: {"run", "epoch", "phase", "step", "total_steps", "kind", "groups_done", "groups_total", "tokens_per_second",
    "reward_mean", "accuracy", "metrics", "seconds_per_step", "message"}; any key may be missing or null. `step` is the step
    being worked on (from 1), so step - 1 are done. Everything goes to stderr; NO_COLOR and narrow terminals are honoured.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = LINE_SECONDS) -> None:
        self.console = console or Console(stderr=True, highlight=False, markup=False, soft_wrap=False)
        self.line_seconds = line_seconds
        self.status: dict[str, Any] = {}
        self.events: deque[str] = deque(maxlen=EVENTS)
        self.started = time.monotonic()
        self._said_at = -math.inf
        self._said: tuple[Any, ...] = ()
        self._live: Live | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(get_renderable=self.display, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, status: Mapping[str, Any]) -> None:
        """Take in what the service says; what it leaves out stays as it was, within an attempt."""
        known = {key: value for key, value in status.items() if value is not None}
        if self.status.get("epoch") != known.get("epoch", self.status.get("epoch")):
            self.status = {}
        if known.get("step") != self.status.get("step") or known.get("phase") != self.status.get("phase"):
            for key in ("groups_done", "groups_total"):
                self.status.pop(key, None)
        message = known.get("message")
        if message and message != self.status.get("message"):
            self.say(str(message))
        self.status.update(known)
        if self._live is None:
            self._line()

    def say(self, line: str) -> None:
        """An event: kept above the bar for good on a terminal, a line of its own otherwise."""
        line = " ".join(line.split())
        if self._live is not None:
            self.events.append(f"{time.strftime('%H:%M:%S')}  {line}")
        else:
            self.console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Take the display down; what was shown last stays as plain lines."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            for event in self.events:
                self.console.print(event, soft_wrap=True)
        if self.status and self._key() != self._said:
            self._print_line()

    # What is shown

    def display(self) -> Group:
        """The live display: a bar, the facts, the last events."""
        status, width = self.status, self.console.width
        if not status:
            return Group(Text(f"starting ({duration(time.monotonic() - self.started)})", style="dim"), *self._event_lines(width))
        head = Text.assemble((str(status.get("run") or "run"), "bold"), ("  attempt " + str(status["epoch"]) if "epoch" in status else "", "dim"))
        parts: list[Any] = [_cut(head, width)]
        total, done = status.get("total_steps"), self._done()
        if total:
            share = f" {done:g}/{total}" if width < NARROW else f" {done:g} of {total} steps, {100 * min(done / total, 1):.0f} %"
            line = Table.grid()
            line.add_column(width=max(width - len(share) - 1, 8))
            line.add_column(no_wrap=True)
            line.add_row(ProgressBar(total=float(total), completed=float(min(done, total)), width=max(width - len(share) - 1, 8)), Text(share))
            parts.append(line)
        facts = self._facts()
        if width < NARROW:
            parts += [_cut(Text.assemble((f"{name} ", "dim"), value), width) for name, value in facts]
        else:
            line_text = Text()
            for name, value in facts:
                piece = Text.assemble((f"{name} ", "dim"), value)
                if line_text and line_text.cell_len + piece.cell_len + 3 > width:
                    parts.append(line_text)
                    line_text = Text()
                line_text = Text.assemble(line_text, "   " if line_text else "", piece)
            parts.append(line_text)
        return Group(*parts, *self._event_lines(width))

    def _event_lines(self, width: int) -> list[Text]:
        return [_cut(Text(event, style="dim"), width) for event in self.events]

    def _done(self) -> int:
        step = int(self.status.get("step") or 0)
        finished = self.status.get("phase") in ("finished", "finish", "done")
        return step if finished else max(step - 1, 0)

    def _phase(self) -> str:
        status = self.status
        phase = str(status.get("phase") or "starting")
        if status.get("groups_total"):
            phase += f" {status.get('groups_done', 0)}/{status['groups_total']}"
        return phase

    def _facts(self) -> list[tuple[str, str]]:
        status = self.status
        facts = [("phase", self._phase())]
        if "step" in status:
            facts.insert(0, (KINDS.get(str(status.get("kind")), "step"), f"step {status['step']}"))
        if "reward_mean" in status:
            facts.append(("reward", _number(status["reward_mean"])))
        if "accuracy" in status:
            facts.append(("accuracy", _number(status["accuracy"])))
        if "tokens_per_second" in status:
            facts.append(("tokens/s", _number(status["tokens_per_second"])))
        left = self._seconds_left()
        if left is not None:
            facts.append(("left", f"about {duration(left)}"))
        return facts

    def _seconds_left(self) -> float | None:
        each, total = self.status.get("seconds_per_step"), self.status.get("total_steps")
        return max(int(total) - self._done(), 0) * float(each) if each and total else None

    # Plain lines

    def _key(self) -> tuple[Any, ...]:
        return self.status.get("epoch"), self.status.get("step"), self.status.get("phase")

    def _line(self) -> None:
        """One line at every new step, and every few seconds within one."""
        now = time.monotonic()
        if self._key()[:2] != self._said[:2] or now - self._said_at >= self.line_seconds:
            self._print_line()

    def _print_line(self) -> None:
        self._said_at, self._said = time.monotonic(), self._key()
        status = self.status
        total = f"/{status['total_steps']}" if status.get("total_steps") else ""
        start = f"step {status.get('step', 0)}{total}"
        kind = KINDS.get(str(status.get("kind")))
        rest = [f"{name} {value}" for name, value in self._facts() if name not in (*KINDS.values(), "step")]
        self.console.print(", ".join([f"{start} ({kind})" if kind else start, *rest]), soft_wrap=True)


def _number(value: Any) -> str:
    return number(float(value)) if isinstance(value, int | float) else str(value)


def _cut(text: Text, width: int) -> Text:
    text.truncate(max(width, 1), overflow="ellipsis")
    return text
