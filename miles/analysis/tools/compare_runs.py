"""tools/analyze/compare_runs.py: tables and plots of runs side by side."""

from __future__ import annotations

from typing import Any

from miles.analysis.compare_runs import differs, shown
from miles.analysis.contents import ASPECTS
from miles.analysis.tools.findings import Findings
from miles.analysis.tools.plots import COLOURS, placed
from miles.report.plain_page import Section, Table
from miles.report.scales import number
from miles.report.svg import Series
from miles.report.tiles import Tile

WORDS = {
    "reward": ("Reward", "mean reward"), "accuracy": ("Evaluation accuracy", "accuracy"), "response_length": ("Response length", "tokens"),
    "mismatch_abs_diff": ("Mismatch, mean |d|", "nats"), "mismatch_max": ("Mismatch, greatest |d|", "nats"), "mismatch_k3": ("Mismatch, k3", "nats"),
    "tokens_per_second": ("Speed", "tokens/s"), "step_seconds": ("Time of a step", "seconds"), "entropy": ("Entropy", "nats per token"),
    "grad_norm": ("Gradient norm", "norm"), "loss": ("Policy loss", "loss"),
}  # fmt: skip
LOGARITHMIC = ("mismatch_abs_diff", "mismatch_max", "mismatch_k3")
OF_STEP = ("reward", "response_length", "mismatch_abs_diff", "tokens_per_second")
MOST_STEPS = 12  # rows of the table by step, evenly over all
MOST_NAMES = 6  # metrics that are named where they differ first


def findings(found: dict[str, Any]) -> Findings:
    """Of what miles.analysis.compare_runs gives."""
    names = [run["name"] for run in found["runs"]]
    metrics = {name: found["metrics"][name] for name in WORDS if name in found["metrics"]}
    rows = [[WORDS[name][0], *of["mean"], of["first_difference"], of["greatest_difference"], of["greatest_at"], len(of["steps"])] for name, of in metrics.items()]
    summary = Table(["mean over common steps", *names, "differ from step", "by at most", "at step", "common steps"], rows, "figures")
    sections = [Section("Differences", [_first(found), summary, *_damaged(found)])]
    sections.append(Section("By step", [*(_plot(name, of, names) for name, of in metrics.items()), *_by_step(metrics, names)]))
    for key, title in (("settings", "Settings that differ"), ("environment", "Environment that differs")):
        if found[key]:
            sections.append(Section(title, [Table(["", *names], [[row["name"], *(shown(value) for value in row["values"])] for row in found[key]], title.lower())]))
        else:
            sections.append(Section(title, [f"{title.split()[0].lower()}: no difference"]))
    said = differs(found)
    facts = f"{', '.join(names)}: {'first difference: ' + said[0] if said else 'no difference in what was computed'}; {len(found['settings'])} settings differ"
    return Findings("comparison of runs", " · ".join(names), facts, sections, found, _tiles(metrics, names))


def _first(found: dict[str, Any]) -> Table:
    metric, batch = found["first_difference"]["metrics"], found["first_difference"]["batches"]
    more = f" and {len(metric['first']) - MOST_NAMES} more" if len(metric["first"]) > MOST_NAMES else ""
    rows = [["recorded metrics, speed aside", "never" if metric["step"] is None else f"{metric['kind']} step {metric['step']}", ", ".join(metric["first"][:MOST_NAMES]) + more, metric["compared"]]]
    rows += [[ASPECTS[aspect], "never" if step is None else f"step {step}", "", batch["compared"]] for aspect, step in batch["first"].items() if batch["compared"]]
    return Table(["of", "differ first at", "which", "steps compared"], rows, "first differences, in bits")


def _plot(name: str, of: dict[str, Any], names: list[str]) -> Any:
    title, unit = WORDS[name]
    series = [Series(label, of["steps"], [row[place] for row in of["values"]], COLOURS[place % len(COLOURS)], dashed=place >= len(COLOURS)) for place, label in enumerate(names)]
    same = "The same at every common step." if of["first_difference"] is None else f"The same before step {of['first_difference']}." if of["first_difference"] > of["steps"][0] else ""
    return placed(name, title, unit, series, same, log=name in LOGARITHMIC)


def _by_step(metrics: dict[str, Any], names: list[str]) -> list[Table]:
    found = []
    for name in OF_STEP:
        if name in metrics:
            steps, values = metrics[name]["steps"], metrics[name]["values"]
            chosen = sorted({round(place * (len(steps) - 1) / max(min(MOST_STEPS, len(steps)) - 1, 1)) for place in range(min(MOST_STEPS, len(steps)))})
            more = f", {len(chosen)} of {len(steps)} steps" if len(chosen) < len(steps) else ""
            found.append(Table(["step", *names], [[steps[place], *values[place]] for place in chosen], f"{WORDS[name][0].lower()}{more}"))
    return found


def _damaged(found: dict[str, Any]) -> list[str]:
    return [f"{run['name']}: {line}" for run in found["runs"] for line in run["damaged"]]


def _tiles(metrics: dict[str, Any], names: list[str]) -> list[Tile]:
    made = []
    for name in ("reward", "accuracy", "response_length", "mismatch_abs_diff", "tokens_per_second", "step_seconds"):
        if name in metrics and len(names) == 2:
            of = metrics[name]
            made.append(Tile(WORDS[name][0], number(of["mean"][1]), f"{names[1]}, mean of {len(of['steps'])} common steps; before: {names[0]}", number(of["mean"][0])))
    return made
