"""The report page: gather, draw, fill the template, seal."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.data.store.metrics import as_float
from miles.report.figures import figures
from miles.report.mismatch import Mismatch
from miles.report.records import RunRecord, read_run
from miles.report.scales import number
from miles.report.summary import Summary, duration, summarise
from miles.report.templates import fill, put
from miles.report.tiles import config_lines, tiles
from miles.report.transcripts import DIFFERENCE_KEY, PROBABILITY_KEY, transcripts


@dataclass
class MetricRow:
    name: str
    count: int
    first: str
    last: str
    least: str
    greatest: str


def build_report(run_dir: Path, mismatch: Mismatch | None = None) -> Path:
    """Write report/index.html of a run, finished or going on, and return its path. mismatch: what an analysis of its log-probs found.

    One page with no external resource and no script. UserError when the folder is not a run directory. Files that can't be
    read are named on the page. Reads the small files and at most four batches' shown samples.
    """
    page = render(read_run(Path(run_dir)), mismatch)
    target = Path(run_dir) / "report" / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    put(page, target)
    return target


def render(record: RunRecord, mismatch: Mismatch | None = None) -> str:
    """The page as text."""
    summary = summarise(record)
    drawn = figures(record)
    shown = transcripts(record)
    return fill(
        "page.html.j2",
        summary=summary,
        subtitle=_subtitle(record),
        progress_line=_progress_line(record, summary),
        percent=f"{100 * min(summary.steps_done / summary.total_steps, 1.0):.1f}" if summary.total_steps else "0",
        empty=not record.metrics,
        tiles=tiles(record, summary),
        mismatch=mismatch,
        config=config_lines(record),
        run_yaml=_text(record.run_dir.run_yaml),
        figures=drawn,
        curves_note=_curves_note(record),
        metrics=metric_rows(record),
        batches=shown.batches,
        token_note=shown.token_note,
        difference_key=DIFFERENCE_KEY,
        difference_note=shown.difference_note,
        probability_key=PROBABILITY_KEY,
        made=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        folder=str(record.run_dir.path),
        said="; ".join(record.damaged),
    )


def metric_rows(record: RunRecord) -> list[MetricRow]:
    """Every metric that was recorded, warm start and rollouts apart, by name."""
    found: dict[str, list[float]] = {}
    for kind, suffix in (("sft", " (warm start)"), ("rollout", ""), ("eval", "")):
        for line in record.of_kind(kind):
            for name, value in line.items():
                if name not in ("step", "time", "kind") and isinstance(value, int | float):
                    found.setdefault(name + suffix, []).append(as_float(value))
    rows = []
    for name, values in sorted(found.items()):
        known = [value for value in values if math.isfinite(value)] or [math.nan]
        rows.append(MetricRow(name, len(values), number(values[0]), number(values[-1]), number(min(known)), number(max(known))))
    return rows


def _subtitle(record: RunRecord) -> str:
    said: list[Any] = [record.setting("algorithm.advantage_estimator"), record.setting("model.name") or record.setting("model.hf_checkpoint")]
    source = record.setting("data.reasoning_gym") or record.setting("data.prompt_data")
    words = " · ".join(str(part) for part in [*said, source] if part)
    times = [float(line["time"]) for line in record.metrics if isinstance(line.get("time"), int | float)]
    began = f" · first step {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(times[0]))}" if times else ""
    return words + began


def _progress_line(record: RunRecord, summary: Summary) -> str:
    """Steps done, time taken, time left."""
    warm = len(record.of_kind("sft"))
    parts = [f"{summary.steps_done} of {summary.total_steps} steps" if summary.total_steps else f"{summary.steps_done} steps"]
    if warm:
        parts[0] += f" ({warm} warm start, {len(record.of_kind('rollout'))} rollouts)"
    times = [float(line["time"]) for line in record.metrics if isinstance(line.get("time"), int | float)]
    starts = [float(event["start"]) for event in record.events if isinstance(event.get("start"), int | float)]
    if times:
        parts.append(f"{duration(max(times) - min([*starts, *times]))} so far" if summary.state == "running" else duration(max(times) - min([*starts, *times])))
    if summary.seconds_left is not None and summary.state == "running":
        parts.append(f"about {duration(summary.seconds_left)} left")
    if summary.checkpoint is not None:
        parts.append(f"newest checkpoint: step {summary.checkpoint}")
    return " · ".join(parts)


def _curves_note(record: RunRecord) -> str:
    shaded = "Steps are counted through the whole run, the supervised warm start (shaded) first. " if record.of_kind("sft") else ""
    return f"{shaded}Hover over a plot for its values."


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
