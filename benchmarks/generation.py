"""Tokens per second: the embedded engine over HTTP, in batch-invariant and in plain mode, and transformers.generate, in turns."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import start
from benchmarks.served import serve
from benchmarks.table import Row
from benchmarks.workload import Workload, make_workload

BATCH_SIZES = (8, 16, 32, 64)
FINALISTS = 2  # settings of generate that are timed in every turn


@dataclass(frozen=True)
class Case:
    """A model and its goal. `rounds`: how often each setting of generate is tried on a workload whose responses are 1 / `shorter` as long,
    before the best ones meet the engine in `turns` turns over the whole workload."""

    name: str
    build: Callable[[Path], Path]
    goal: float
    prompt: int
    orders: tuple[bool, ...]  # of generate's batches: by length, as they come
    rounds: int
    shorter: int
    turns: int


def measure(case: Case, say: Callable[[str], None], quick: bool = False) -> list[Row]:
    """Rows of a case. Ratios are the median over turns of what was measured side by side in a turn."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = case.build(Path(name) / "model")
        requests, longest, turns = (8, 24, 1) if quick else (64, 256, case.turns)
        work = make_workload(_vocabulary(folder), case.prompt, requests, longest)
        short = make_workload(_vocabulary(folder), case.prompt, requests, max(16, longest // case.shorter))
        context = work.longest
        say(f"{case.name}: starting engines and generate")
        plain_engine = stack.enter_context(serve(folder, False, context))
        engine = stack.enter_context(serve(folder, True, context))
        generate = stack.enter_context(start("generate", str(folder)))
        warm = make_workload(_vocabulary(folder), case.prompt, requests, 16)
        sides: dict[str, Callable[[Workload], float]] = {
            "engine": engine,
            "plain": plain_engine,
        }
        if case.rounds > 1:  # on a slow model HTTP is lost in the noise
            bare = stack.enter_context(start("engine", str(folder), "--context-length", str(context)))
            sides["bare"] = lambda given: bare(prompts=given.prompts, lengths=given.lengths)
        for run in sides.values():
            run(warm)
        settings = [(size, order) for size in BATCH_SIZES if size <= requests for order in case.orders]
        trial: dict[tuple[int, bool], list[float]] = {setting: [] for setting in settings}
        for number in range(1 if quick else case.rounds):
            for setting in settings:
                say(f"{case.name}: trial {number + 1} of generate, {_words(setting)}")
                trial[setting].append(_generate(generate, short, setting))
        finalists = sorted(settings, key=lambda setting: min(trial[setting]))[:FINALISTS]
        seconds: dict[Any, list[float]] = {key: [] for key in (*sides, *finalists)}
        for turn in range(turns):
            if turn == 1 and case.rounds == 1:  # a slow model: the second best has had its turn
                finalists = [min(finalists, key=lambda setting: seconds[setting][0])]
            for key in (*finalists, *sides):
                say(f"{case.name}: turn {turn + 1} of {turns}, {key if isinstance(key, str) else 'generate, ' + _words(key)}")
                seconds[key].append(sides[key](work) if isinstance(key, str) else _generate(generate, work, key))
    best = min(finalists, key=lambda setting: statistics.median(seconds[setting]))
    return _rows(case, work, seconds, best, trial, short)


def _rows(
    case: Case, work: Workload, seconds: dict[Any, list[float]], best: tuple[int, bool], trial: dict[tuple[int, bool], list[float]], short: Workload
) -> list[Row]:
    speed = {key: work.tokens / statistics.median(values) for key, values in seconds.items()}
    tried = {_words(setting): round(short.tokens / min(values)) for setting, values in trial.items()}
    found = {"engine": speed["engine"], "generate": speed[best], "generate_setting": _words(best), "generate_trials": tried}
    rows = [
        Row(
            f"{case.name}: engine over HTTP / transformers.generate", _ratio(seconds[best], seconds["engine"]), case.goal, at_least=True,
            note=f"{speed['engine']:.0f} and {speed[best]:.0f} tokens/s; generate at its best: {_words(best)}", found=found,
        ),
        Row(
            f"{case.name}: engine, batch-invariant / plain", _ratio(seconds["plain"], seconds["engine"]),
            note=f"{speed['engine']:.0f} and {speed['plain']:.0f} tokens/s", found={"invariant": speed["engine"], "plain": speed["plain"]},
        ),
    ]  # fmt: skip
    if "bare" in seconds:
        name, note = f"{case.name}: engine over HTTP / without HTTP", f"{speed['engine']:.0f} and {speed['bare']:.0f} tokens/s"
        rows.append(Row(name, _ratio(seconds["bare"], seconds["engine"]), note=note, found={"http": speed["engine"], "bare": speed["bare"]}))
    for row in rows:
        row.found["seconds"] = {key if isinstance(key, str) else f"generate, {_words(key)}": values for key, values in seconds.items()}
    return rows


def _ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _generate(ask: Callable[..., Any], work: Workload, setting: tuple[int, bool]) -> float:
    size, by_length = setting
    return float(ask(prompts=work.prompts, lengths=work.lengths, batch_size=size, by_length=by_length))


def _words(setting: tuple[int, bool]) -> str:
    size, by_length = setting
    return f"batches of {size} {'by length' if by_length else 'as they come'}"


def _vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])
