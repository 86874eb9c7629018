"""The progress of a run as the launcher shows it: a live display on a terminal, plain lines otherwise."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from miles.report.scales import number
from miles.report.summary import duration, steps_behind

LINE_SECONDS = 5.0  # between plain lines when nothing but time has passed
EVENTS = 4  # last events shown under the bar
NARROW = 70  # columns under which the display has one fact a line
RECENT = 6  # steps that the time of a step is taken from
ENDS = ("finished", "failed", "stopped")
KINDS = {"sft": "warm start", "rollout": "rollout", "eval": "evaluation"}


class Progress:
    """update(status) with the service's GET /status, at any rate; say(line) for an event; close() at the end.

    status: {"run", "epoch", "phase", "waiting", "step", "total_steps", "kind", "groups_done", "groups_total",
    "tokens_per_second", "reward_mean", "accuracy", "metrics", "seconds_per_step", "message"}; any key may be missing or null.
    Everything goes to stderr; NO_COLOR and narrow terminals are honoured.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = LINE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.line_seconds = line_seconds
        self.clock = clock
        self.status: dict[str, Any] = {}
        self.events: deque[str] = deque(maxlen=EVENTS)
        self.started = clock()
        self._marks: deque[tuple[float, int]] = deque(maxlen=RECENT)  # when how many steps were behind us, in this phase of the run
        self._said_at = -math.inf
        self._said: tuple[Any, ...] = ()
        self._last_line = ""
        self._live: Live | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(get_renderable=self.display, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, status: Mapping[str, Any]) -> None:
        """Take in what the service says; what it leaves out stays as it was, within an attempt."""
        known = {key: value for key, value in status.items() if value is not None}
        if "kind" not in known and known.get("phase") in KINDS:
            known["kind"] = known["phase"]  # a step that is done is told by its kind as the phase
        if self.status.get("epoch") != known.get("epoch", self.status.get("epoch")):
            self.status = {}
        if known.get("step") != self.status.get("step") or known.get("phase") != self.status.get("phase"):
            for key in ("groups_done", "groups_total"):
                self.status.pop(key, None)
        if known.get("kind", self.status.get("kind")) != self.status.get("kind"):
            for key in ("reward_mean", "tokens_per_second"):  # of an evaluation they tell nothing about a rollout
                self.status.pop(key, None)
        if known.get("kind", self.status.get("kind")) != self.status.get("kind") and "eval" not in (known.get("kind"), self.status.get("kind")):
            self._marks.clear()  # a warm-start step tells nothing about the time of a rollout
        if "waiting" not in known:
            self.status.pop("waiting", None)
        message = known.get("message")
        if message and message != self.status.get("message"):
            self.say(str(message))
        self.status = {**self.status, **known}
        behind = steps_behind(self.status)
        if behind is not None and (not self._marks or behind != self._marks[-1][1]):
            if self._marks and behind < self._marks[-1][1]:
                self._marks.clear()
            self._marks.append((self.clock(), behind))
        if self._live is None:
            self._line()

    def say(self, line: str) -> None:
        """An event: under the bar on a terminal, a line of its own otherwise."""
        line = " ".join(line.split())
        if self._live is not None:
            self.events.append(f"{time.strftime('%H:%M:%S')}  {line}")
        else:
            self.console.print(Text(line), soft_wrap=True)

    def close(self, final: Mapping[str, Any] | None = None) -> None:
        """Take the display down; the last events stay as plain lines, and one line of the last state.

        final: what the run's files say once it has ended (keys as in status): the service is asked now and then, so its last
        word is older than the last step.
        """
        if self._live is not None:
            self._live.stop()
            self._live = None
            for event in self.events:
                self.console.print(Text(event), soft_wrap=True)
        if final is not None:
            self.status = {key: value for key, value in final.items() if value is not None}
        if self.status:
            self._print_line()

    # What is shown

    def display(self) -> Group:
        """The live display: a bar, the facts, the last events."""
        width = self.console.width
        status = dict(self.status)
        if not status:
            return Group(Text(f"starting ({duration(self.clock() - self.started)})", style="dim"), *self._event_lines(width))
        if status.get("waiting") and "step" not in status:
            return Group(_cut(Text(f"waiting for {status['waiting']} ({duration(self.clock() - self.started)})"), width), *self._event_lines(width))
        head = Text.assemble((str(status.get("run") or "run"), "bold"), (f"  attempt {status['epoch']}" if "epoch" in status else "", "dim"))
        parts: list[Any] = [_cut(head, width)]
        if status.get("total_steps"):
            parts.append(_bar(steps_behind(status) or 0, int(status["total_steps"]), width))
        parts += _flow([Text.assemble((f"{name} ", "dim"), value) for name, value in self.facts()], width)
        return Group(*parts, *self._event_lines(width))

    def facts(self) -> list[tuple[str, str]]:
        """(name, value) of what is known, in reading order."""
        status = self.status
        facts = []
        if "step" in status:
            facts.append((KINDS.get(str(status.get("kind") or status.get("phase")), "at"), f"step {status['step']}"))
        facts.append(("phase", self._phase()))
        reward = status.get("reward_mean", (status.get("metrics") or {}).get("rollout/raw_reward"))
        for name, value in (("reward", reward), ("accuracy", status.get("accuracy")), self._speed()):
            if value is not None and not (name.endswith("tokens/s") and value == 0):  # 0: nothing has come in yet
                facts.append((name, number(float(value)) if isinstance(value, int | float) else str(value)))
        left = self.seconds_left()
        if left is not None:
            facts.append(("left", f"about {duration(left)}"))
        return facts

    def seconds_left(self) -> float | None:
        """Steps left times the seconds of a step, as the service says or as seen here; None while unknown."""
        total, behind = self.status.get("total_steps"), steps_behind(self.status)
        each = self.status.get("seconds_per_step")
        if each is None and len(self._marks) > 1:
            (first, before), (last, after) = self._marks[0], self._marks[-1]
            each = (last - first) / (after - before)
        if not each or not total or behind is None or behind >= int(total) or self.status.get("phase") in ENDS:
            return None
        return (int(total) - behind) * float(each)

    def _speed(self) -> tuple[str, Any]:
        """What is done at which speed: tokens/s, as `status` and the report have it, are a batch's by the seconds of its whole step; while
        a run lives, those of generation are known, and in the warm start, where nothing is generated, those of training."""
        if self.status.get("phase") in ENDS:
            return "tokens/s", self.status.get("tokens_per_second")
        if self.status.get("kind") == "sft":
            return "trained tokens/s", (self.status.get("metrics") or {}).get("perf/actor_train_tok_per_s")
        return "generated tokens/s", self.status.get("tokens_per_second")

    def _phase(self) -> str:
        if self.status.get("waiting"):
            return f"waiting for {self.status['waiting']}"
        phase = str(self.status.get("phase") or "starting")
        phase = {"sft": "trained", "rollout": "trained"}.get(phase, phase)
        if self.status.get("groups_total"):
            phase += f" {self.status.get('groups_done', 0)}/{self.status['groups_total']}"
        return phase

    def _event_lines(self, width: int) -> list[Text]:
        return [_cut(Text(event, style="dim"), width) for event in list(self.events)]

    # Plain lines

    def _key(self) -> tuple[Any, ...]:
        """A line is due when this changes: a step was done, an evaluation came in, an attempt began, it waits for something."""
        status = self.status
        return status.get("epoch"), steps_behind(status), status.get("accuracy"), status.get("waiting")

    def _line(self) -> None:
        """One line for every step done, and every few seconds within one if it says something new."""
        if self.status.get("phase") in ENDS:
            return  # close() tells the end, by the run's files
        if self._key() != self._said or (self.clock() - self._said_at >= self.line_seconds and self._state() != self._last_line):
            self._print_line()

    def _print_line(self) -> None:
        self._said_at, self._said, line = self.clock(), self._key(), self._state()
        if line != self._last_line:
            self.console.print(Text(line), soft_wrap=True)
        self._last_line = line

    def _state(self) -> str:
        """The last state in one line."""
        status = self.status
        if "step" not in status:
            return self._phase()
        total = f"/{status['total_steps']}" if status.get("total_steps") else ""
        kind = KINDS.get(str(status.get("kind") or status.get("phase")))
        start = f"step {status['step']}{total}" + (f" ({kind})" if kind else "")
        facts = [(name, value) for name, value in self.facts() if not value.startswith("step ")]
        if status.get("phase") in ENDS:  # what a phase is of a run that has ended
            return ", ".join([str(status["phase"]), start, *(f"{name} {value}" for name, value in facts if name != "phase")])
        return ", ".join([start, *(value if status.get("waiting") and name == "phase" else f"{name} {value}" for name, value in facts)])


def _bar(behind: int, total: int, width: int) -> Table:
    share = f"{behind}/{total}" if width < NARROW else f"{behind} of {total} steps, {100 * min(behind / total, 1):.0f} %"
    room = max(min(width, 110) - len(share) - 2, 6)
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(width=room)
    line.add_column(no_wrap=True)
    line.add_row(ProgressBar(total=float(total), completed=float(min(behind, total)), width=room, complete_style="cyan", finished_style="green"), Text(share))
    return line


def _flow(pieces: list[Text], width: int) -> list[Text]:
    """As many pieces a line as fit; one a line on a narrow terminal."""
    lines: list[Text] = []
    for piece in pieces:
        if lines and width >= NARROW and lines[-1].cell_len + piece.cell_len + 3 <= width:
            lines[-1] = Text.assemble(lines[-1], "   ", piece)
        else:
            lines.append(_cut(piece, width))
    return lines


def _cut(text: Text, width: int) -> Text:
    text.truncate(max(width, 1), overflow="ellipsis")
    return text
